"""The shell: the only place with effects: devices, graphs, processes, files, signals, clocks.

May import: `fntrain.core`, `steps`, `data`, `events`, `evaluation`. On first use it imports
`cuda_step`, `compile_step`, `distribute`, launching and weights.
Read first: `steps` (a step on the module's own memory), then `checkpoints`.
"""

from typing import TYPE_CHECKING

from fntrain.lazy import imported_on_first_use
from fntrain.shell.distributed.connected import alone, ranks
from fntrain.shell.setup import setup
from fntrain.shell.steps.in_place import in_place

if TYPE_CHECKING:
    from fntrain.shell.distributed.distribute import distribute
    from fntrain.shell.launching.launch import launch
    from fntrain.shell.steps.graphs import cuda_step
    from fntrain.shell.steps.programs import compile_step
    from fntrain.shell.weights.dcp import from_dcp, to_dcp

__all__ = [  # noqa: RUF022 (by theme)
    # steps
    "compile_step", "cuda_step", "in_place",
    # processes
    "alone", "distribute", "launch", "ranks", "setup",
    # weights
    "from_dcp", "to_dcp",
]  # fmt: skip

_ON_FIRST_USE = {
    "distributed.distribute": "distribute",
    "launching.launch": "launch",
    "steps.graphs": "cuda_step",
    "steps.programs": "compile_step",
    "weights.dcp": "from_dcp to_dcp",
}
__getattr__, __dir__ = imported_on_first_use(globals(), _ON_FIRST_USE)
