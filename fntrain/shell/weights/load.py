"""load_params: some or all tensors of a file into a module.

Tensors are matched by name, never by position. Everything is checked before anything is written, so an error leaves no
module half loaded. The report lists what strict=False leaves out.
"""

import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import TrainState
from fntrain.shell.weights.export import first_names
from fntrain.shell.weights.files import read_weights
from fntrain.shell.weights.report import LoadReport, Mismatch, rename_hint
from fntrain.steps.module import Slots, copy_in

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AnyPath = str | os.PathLike[str]
Names = Mapping[str, str]
Rename = Callable[[str], str | None]
Tensors = Mapping[str, Tensor]


def load_params(path: AnyPath, model: nn.Module, *, rename: Rename | None = None, strict: bool = True) -> LoadReport:
    """Write the parameters and buffers of a file into a module by name, all of them or, with strict=False, some.

    Nothing is written before everything is checked. float16, bfloat16, float32 and float64 are converted to the
    module's dtype, unless a number would overflow; all other dtypes must be the module's. A tied weight may be in the
    file under one of its names or several. States that share the module's memory are consumed, as by `ft.load_into`.

    Args:
      path: a safetensors file, an index of several (`model.safetensors.index.json`), a directory with one of these, or
        a checkpoint `step_XXXXXXXX`.
      model: keeps its parameters, devices, layouts and ties; only values change.
      rename: name in the file -> name in the module, or None to leave it out.
      strict: refuse a file that does not fit exactly; otherwise write what matches.
    Raises:
      CheckpointError: the file is missing or damaged, does not fit (all names are listed), nothing in it matches, two
        of its names become one, or tied names differ in it.
      ValueError: the module can't be written to: no parameters, or some are lazy, on meta, expanded or share memory.
      TypeError: `rename` is no function of names, or the module has sparse tensors.
    Example:
      >>> import tempfile
      >>> backbone, model = nn.Linear(3, 2), nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 5)})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ft.export(backbone, directory + "/backbone.safetensors")
      ...     ft.load_params(path, model, rename=lambda name: "body." + name, strict=False)
      LoadReport: 2 matched, 2 missing, 0 unexpected, 0 mismatched
        missing     head.weight
        missing     head.bias
    """
    if rename is not None and not callable(rename):
        raise TypeError(f"rename: got {type(rename).__name__}, expected a function from name to name or None")
    slots = Slots.of(model)
    own = {**slots.params, **slots.buffers}
    _check_writable(slots, own)
    tensors, report = _matched(path, own, first_names(model, own), rename)
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise CheckpointError(
            f"{path}: does not fit {type(model).__name__}, so nothing was written; strict=False would write what "
            f"matches\n{report.text()}"
        )
    if not report.matched:
        raise CheckpointError(f"{path}: nothing in it fits {type(model).__name__}\n{report.text()}")
    params = {name: tensors.get(name, param) for name, param in slots.params.items()}
    buffers = {name: tensors.get(name, buffer) for name, buffer in slots.buffers.items()}
    copy_in(slots, TrainState(step=0, position=0, seed=0, params=params, buffers=buffers), "ft.load_params")
    return report


def _check_writable(slots: Slots, own: Tensors) -> None:
    """Refuse a tensor without memory of its own for every element: a copy into it would fail or be lost."""
    for name, tensor in own.items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model: {name!r} has no shape yet; run one batch through the module first")
        if tensor.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device, without memory; call model.to_empty(device=...)")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"model: {name!r} is expanded, several elements share memory; register a .clone() of it")
    slots.check_memory()


def _matched(path: AnyPath, own: Tensors, first: Names, rename: Rename | None) -> tuple[Tensors, LoadReport]:
    """The file's tensors by the module's first names, and what became of every name."""
    tensors = read_weights(path)
    sources, dropped = _renamed(path, tensors, rename)
    found = _found(path, tensors, sources, first)
    misfits = {name: why for name in own if name in found and (why := _misfit(found[name], own[name])) is not None}
    fitting = {name: found[name] for name in own if name in found and name not in misfits}
    missing = [name for name in own if name not in found]
    unexpected = {renamed: name for renamed, name in sources.items() if renamed not in first}
    return fitting, LoadReport(
        matched=tuple(fitting),
        missing=tuple(missing),
        unexpected=tuple(unexpected.values()),
        mismatched=tuple(Mismatch(name=name, reason=why) for name, why in misfits.items()),
        converted=tuple(name for name, tensor in fitting.items() if tensor.dtype != own[name].dtype),
        dropped=tuple(dropped),
        hint=rename_hint(missing, unexpected),
    )


def _renamed(path: AnyPath, names: Iterable[str], rename: Rename | None) -> tuple[dict[str, str], list[str]]:
    """Return name in the module -> name in the file, and the names of the file that `rename` leaves out."""
    sources: dict[str, str] = {}
    dropped = []
    for name in names:
        renamed = name if rename is None else rename(name)
        if renamed is None:
            dropped.append(name)
        elif not isinstance(renamed, str):
            raise TypeError(f"rename: gave {renamed!r} for {name!r}, expected a name or None")
        elif sources.setdefault(renamed, name) != name:
            raise CheckpointError(f"{path}: rename gives {sources[renamed]!r} and {name!r} one name, {renamed!r}")
    return sources, dropped


def _found(path: AnyPath, tensors: Tensors, sources: Names, first: Names) -> Tensors:
    """The tensors that the module has too, by its first names; all names of a tied weight must have the same value."""
    origins: dict[str, str] = {}  # first name in the module -> name in the file
    for renamed, name in sources.items():
        if renamed not in first:
            continue
        origin = origins.setdefault(first[renamed], name)
        if origin != name and not tree.bitwise_equal(tensors[origin], tensors[name]):
            raise CheckpointError(
                f"{path}: {origin!r} and {name!r} differ, but are one tied weight in the module; leave one out "
                "with a rename that returns None for it, or untie them"
            )
    return {name: tensors[origin] for name, origin in origins.items()}


def _misfit(theirs: Tensor, ours: Tensor) -> str | None:
    """Why a tensor of the file can't go into the module's, or None."""
    both = f"file has {_described(theirs)}, module has {_described(ours)}"
    if theirs.shape != ours.shape:
        return both
    if theirs.dtype == ours.dtype:
        return None
    if theirs.dtype not in _FLOATS or ours.dtype not in _FLOATS:
        return f"{both}; only float16, bfloat16, float32 and float64 are converted"
    if (theirs.to(ours.dtype).isinf() & ~theirs.isinf()).any():
        return f"{both}, in which some of its numbers are too large"
    return None


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
