"""The shell: the only place with effects. Steps on a device, checkpoints in files."""

from fntrain.shell.compile import compile_step
from fntrain.shell.cuda import cuda_step
from fntrain.shell.dcp import from_dcp, to_dcp
from fntrain.shell.distribute import distribute
from fntrain.shell.in_place import in_place
from fntrain.shell.launch import launch
from fntrain.shell.ranks import ranks
from fntrain.shell.setup import setup

__all__ = [
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
