"""Weights without a training state: loading and exporting them, and looking at checkpoints. Loaded on first use.

Read first: `load`.
"""

from fntrain.shell.weights import inspect
from fntrain.shell.weights.files import read_weights, write_weights
from fntrain.shell.weights.load import convert

__all__ = ["convert", "inspect", "read_weights", "write_weights"]
