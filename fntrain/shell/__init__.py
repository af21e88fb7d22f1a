"""The shell: the only place with effects: devices, graphs, processes, files, signals, clocks.

May import: `fntrain.core`, `steps`, `data`, `events`, `evaluation`. Launching and weights are loaded on first use.
Read first: `steps` (a step on the module's own memory), then `checkpoints`.
"""

from typing import TYPE_CHECKING

from fntrain.lazy import imported_on_first_use
from fntrain.shell.distributed.connected import alone, ranks
from fntrain.shell.distributed.distribute import distribute
from fntrain.shell.setup import setup
from fntrain.shell.steps.graphs import cuda_step
from fntrain.shell.steps.in_place import in_place
from fntrain.shell.steps.programs import compile_step

if TYPE_CHECKING:
    from fntrain.shell.launching.launch import launch
    from fntrain.shell.weights.dcp import from_dcp, to_dcp

__all__ = [  # noqa: RUF022 (by theme)
    # steps
    "compile_step", "cuda_step", "in_place",
    # processes
    "alone", "distribute", "launch", "ranks", "setup",
    # weights
    "from_dcp", "to_dcp",
]  # fmt: skip

_ON_FIRST_USE = {"launching.launch": "launch", "weights.dcp": "from_dcp to_dcp"}
__getattr__, __dir__ = imported_on_first_use(globals(), _ON_FIRST_USE)
