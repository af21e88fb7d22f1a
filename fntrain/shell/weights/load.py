"""Weights from elsewhere and for elsewhere: load some or all of a safetensors file into a module, export, convert.

Names decide, never positions. Everything is checked before anything is written, so a module is never half loaded by
an error, and what strict=False leaves out is in the report.
"""

import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import TrainState
from fntrain.shell.weights.files import read_weights, write_weights
from fntrain.steps.module import Slots, copy_in

if TYPE_CHECKING:
    from fntrain.shell.weights.report import LoadReport

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_params(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    rename: Callable[[str], str | None] | None = None,
    strict: bool = True,
) -> "LoadReport":
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
      ...     path = export(backbone, directory + "/backbone.safetensors")
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
    tensors, report = _matched(path, read_weights(path), own, _first_names(model, own), rename)
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
        aliases = {name: first for name, first in _first_names(source, tensors).items() if name != first}
        return write_weights(tensors, path, aliases)
    if isinstance(source, TrainState):
        params, buffers = (dict(tree.named_leaves(field)) for field in (source.params, source.buffers))
        if both := sorted(params.keys() & buffers.keys()):
            raise CheckpointError(f"{path}: params and buffers both have {both}; rename one")
        return write_weights({**params, **buffers}, path)  # type: ignore[dict-item]  # other leaves are refused there
    if isinstance(source, Mapping):
        return write_weights(source, path)
    raise TypeError(f"source: got {type(source).__name__}, expected a TrainState, a module, or tensors by name")


def convert(torch_file: str | os.PathLike[str], out: str | os.PathLike[str], *, key: str | None = None) -> Path:
    """Make a safetensors file of a state dict saved by torch.save; returns its path.

    The file is opened with weights_only=True, which runs no code of the file. Names of one tensor are written once, as
    `export` does.

    Args:
      torch_file: holds a dict of tensors by name, or a dict with one in it.
      out: the file to write.
      key: where the dict of tensors is, often "model" or "state_dict".
    Raises:
      CheckpointError: the file is missing, damaged, holds more than tensors and plain values, or at `key` is no dict of
        tensors; the message says what is there.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     torch.save({"model": nn.Linear(3, 2).state_dict(), "epoch": 7}, directory + "/linear.pt")
      ...     path = convert(directory + "/linear.pt", directory + "/linear.safetensors", key="model")
      ...     load_params(path, nn.Linear(3, 2))
      LoadReport: 2 matched, 0 missing, 0 unexpected, 0 mismatched
    """
    content = _unpickled(Path(torch_file))
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise CheckpointError(f"{torch_file}: has no key {key!r}; it holds {_kinds(content)}")
        content = content[key]
    if not isinstance(content, Mapping) or not content or not all(map(_is_named_tensor, content.items())):
        nested = [repr(name) for name, value in content.items() if _holds_tensors(value)] if _is_dict(content) else []
        where = f"; give key={' or '.join(nested)}" if nested else ""
        raise CheckpointError(f"{torch_file}: expected tensors by name, got {_kinds(content)}{where}")
    kept: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in content.items():
        if tensor.layout is torch.strided and tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (first := kept.setdefault(place, name)) != name:
                aliases[name] = first
    return write_weights({name: tensor for name, tensor in content.items() if name not in aliases}, out, aliases)


def _check_writable(slots: Slots, own: Mapping[str, Tensor]) -> None:
    """Refuse what a copy would not reach or would stop at half-way."""
    for name, tensor in own.items():
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model: {name!r} has no shape yet; run one batch through the module first")
        if tensor.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device, without memory; call model.to_empty(device=...)")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"model: {name!r} is expanded, several elements share memory; register a .clone() of it")
    slots.check_memory()


def _first_names(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name by which the module reaches one of these tensors, and the first name of the same tensor."""
    first = {id(tensor): name for name, tensor in own.items()}
    every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name.replace("_orig_mod.", ""): first[id(tensor)] for name, tensor in every if id(tensor) in first}


def _matched(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    first_names: Mapping[str, str],
    rename: Callable[[str], str | None] | None,
) -> tuple[dict[str, Tensor], "LoadReport"]:
    """The file's tensors by the module's first names, and what became of every name."""
    from fntrain.shell.weights.report import LoadReport, Mismatch, rename_hint  # made on first use: import stays fast

    sources: dict[str, str] = {}  # name in the module's terms -> name in the file
    dropped = []
    for name in tensors:
        renamed = name if rename is None else rename(name)
        if renamed is None:
            dropped.append(name)
        elif not isinstance(renamed, str):
            raise TypeError(f"rename: gave {renamed!r} for {name!r}, expected a name or None")
        elif sources.setdefault(renamed, name) != name:
            raise CheckpointError(f"{path}: rename gives {sources[renamed]!r} and {name!r} one name, {renamed!r}")
    found: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for renamed, name in sources.items():
        first = first_names.get(renamed)
        if first is None:
            continue
        if first in found and not tree.bitwise_equal(found[first], tensors[name]):
            raise CheckpointError(
                f"{path}: {origins[first]!r} and {name!r} differ, but are one tied weight in the module; leave one out "
                "with a rename that returns None for it, or untie them"
            )
        found.setdefault(first, tensors[name])
        origins.setdefault(first, name)
    mismatched = [Mismatch(name=name, reason=why) for name in own if name in found and (why := _why(found, own, name))]
    misfits = {one.name for one in mismatched}
    fitting = {name: found[name] for name in own if name in found and name not in misfits}
    missing = [name for name in own if name not in found]
    unexpected = {renamed: name for renamed, name in sources.items() if renamed not in first_names}
    return fitting, LoadReport(
        matched=tuple(fitting),
        missing=tuple(missing),
        unexpected=tuple(unexpected.values()),
        mismatched=tuple(mismatched),
        converted=tuple(name for name, tensor in fitting.items() if tensor.dtype != own[name].dtype),
        dropped=tuple(dropped),
        hint=rename_hint(missing, unexpected),
    )


def _why(found: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> str | None:
    """Why a tensor of the file can't go into the module's, or None."""
    theirs, ours = found[name], own[name]
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


def _unpickled(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise any kind; torch's advice to run its code is left out
        what = (str(error).splitlines() or [""])[0].partition(". ")[0]
        raise CheckpointError(
            f"{file}: is no torch file of tensors and plain values, or damaged ({type(error).__name__}: {what}); where "
            "you trust it, load it yourself and give its tensors to ft.export"
        ) from error


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_named_tensor, value.items()))


def _kinds(content: Any) -> str:
    """What a dict holds besides tensors, or what there is in its place."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    others = {name: value for name, value in content.items() if not _is_named_tensor((name, value))}
    kinds = [f"{name!r} ({type(value).__name__})" for name, value in list(others.items())[:10]]
    more = [f"{len(others) - 10} more"] if len(others) > 10 else []
    tensors = len(content) - len(others)
    return ", ".join([f"{tensors} tensors", *kinds, *more]) if content else "an empty dict"
