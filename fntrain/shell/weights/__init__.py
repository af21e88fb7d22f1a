"""Weights without a training state: load, export and convert them, and look at checkpoints. Loaded on first use.

May import: `fntrain.core`, `steps`, `shell.checkpoints` and `shell.disk`.
Read first: `load`, then `files`, which reads and writes for all of them.
"""

from fntrain.shell.weights import inspect
from fntrain.shell.weights.convert import convert
from fntrain.shell.weights.files import read_weights, write_weights

__all__ = ["convert", "inspect", "read_weights", "write_weights"]
