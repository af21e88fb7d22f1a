"""export: parameters and buffers as one safetensors file, for other libraries."""

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import TrainState
from fntrain.shell.weights.files import write_weights
from fntrain.steps.module import Slots


def export(source: TrainState | nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Write parameters and buffers to one safetensors file that other libraries load; returns its path.

    A tied weight is written once, under its first name, the others noted in the header: what safetensors' own
    `save_model` does, `load_model` and `ft.load_params` read back with the tie kept, and transformers expects.
    `load_state_dict` asks for every name, so for a tied module it needs strict=False. Whole or not at all.

    Args:
      source: a state, a module (with the pure step it has its first weights: give the state), or tensors by name.
      path: the file, `.safetensors` by custom; its directory is made, a former file replaced in one rename.
    Raises:
      CheckpointError: a tensor is of a kind that the format does not know, or the file can't be written.
      TypeError: `source` is something else.
    Example:
      >>> import tempfile
      >>> from safetensors.torch import load_file
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     sorted(load_file(ft.export(nn.Linear(3, 2), directory + "/linear.safetensors")))
      ['bias', 'weight']
    """
    if isinstance(source, nn.Module):
        slots = Slots.of(source)
        tensors: dict[str, Any] = {**slots.params, **slots.buffers}
        aliases = {name: first for name, first in first_names(source, tensors).items() if name != first}
        return write_weights(tensors, path, aliases)
    if isinstance(source, TrainState):
        params, buffers = (dict(tree.named_leaves(field)) for field in (source.params, source.buffers))
        if both := sorted(params.keys() & buffers.keys()):
            raise CheckpointError(f"{path}: params and buffers both have {both}; rename one")
        return write_weights({**params, **buffers}, path)  # type: ignore[dict-item]  # other leaves are refused there
    if isinstance(source, Mapping):
        return write_weights(source, path)
    raise TypeError(f"source: got {type(source).__name__}, expected a TrainState, a module, or tensors by name")


def first_names(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return every name by which a module reaches these tensors (a tied one has several), and the first of these."""
    first = {id(tensor): name for name, tensor in own.items()}
    every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name.replace("_orig_mod.", ""): first[id(tensor)] for name, tensor in every if id(tensor) in first}
