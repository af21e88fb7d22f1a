"""Deliberately broken ways to load and export weights: the laws of test_params.py must refuse each of them."""

from pathlib import Path

import safetensors.torch
import torch

import fntrain as ft
from fntrain.shell.weights import files as weights


def load_as_it_goes(path, model, *, rename=None, strict=True):
    """Writes name by name and complains at the first that does not fit."""
    own = model.state_dict()
    for name, tensor in weights.read_weights(path).items():
        if name not in own or own[name].shape != tensor.shape:
            raise ft.CheckpointError(name)
        own[name].copy_(tensor)
    return ft.load_params(path, model, rename=rename, strict=strict)


def load_without_leases(path, model, *, rename=None, strict=True):
    """Writes where a state still reads, as plain torch does."""
    model.load_state_dict(weights.read_weights(path), strict=False)


def load_by_assignment(path, model, *, rename=None, strict=True):
    """Gives every name a parameter of its own: ties are lost."""
    tensors = weights.read_weights(path)
    names = {id(param): name for name, param in model.named_parameters()}
    for module in model.modules():
        for key, param in module._parameters.items():
            if param is not None:
                module._parameters[key] = torch.nn.Parameter(tensors[names[id(param)]].clone())
    model.load_state_dict(tensors, strict=False)


def export_in_place(source, path):
    """Writes straight over the former file."""
    tensors = {name: tensor.clone() for name, tensor in source.items()}
    try:
        weights.save_file(tensors, path, metadata={"format": "pt"})
        weights.fsync(Path(path))
    except OSError as error:
        Path(path).write_bytes(safetensors.torch.save(tensors)[:20])  # as far as it came
        raise ft.CheckpointError(str(error)) from error
    return Path(path)


def export_without_buffers(source, path):
    """Forgets what is no parameter."""
    return ft.export(dict(source.named_parameters()) if isinstance(source, torch.nn.Module) else source.params, path)


def ulp_by_rounding(a, b):
    """Distance over the spacing at the larger number: halves and doubles across powers of two."""
    spacing = torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()).double()
    return int(((a.double() - b.double()).abs() / spacing).max())
