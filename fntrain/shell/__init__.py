"""The shell: the only place with effects: devices, graphs, processes, files, signals, clocks.

May import: `fntrain.core`, `steps`, `data`, `events`, `evaluation`. Launching and weights are loaded on first use.
Read first: `steps` (a step on the module's own memory), then `checkpoints`.
"""

from typing import TYPE_CHECKING

from fntrain.lazy import exported_later
from fntrain.shell.distributed.connected import alone, ranks
from fntrain.shell.distributed.distribute import distribute
from fntrain.shell.setup import setup
from fntrain.shell.steps.graphs import cuda_step
from fntrain.shell.steps.in_place import in_place
from fntrain.shell.steps.programs import compile_step

if TYPE_CHECKING:
    from fntrain.shell.launching.launch import launch
    from fntrain.shell.weights.dcp import from_dcp, to_dcp

__all__ = [
    "alone",
    "compile_step",
    "cuda_step",
    "distribute",
    "from_dcp",
    "in_place",
    "launch",
    "ranks",
    "setup",
    "to_dcp",
]

__getattr__ = exported_later(
    globals(),
    {
        "from_dcp": "fntrain.shell.weights.dcp",
        "launch": "fntrain.shell.launching.launch",
        "launching": "fntrain.shell.launching",
        "to_dcp": "fntrain.shell.weights.dcp",
        "weights": "fntrain.shell.weights",
    },
)


def __dir__() -> list[str]:
    return __all__
