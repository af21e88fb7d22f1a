"""convert: make a safetensors file of a file that torch.save wrote, without running the code in its pickle."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from toolz import keyfilter, valfilter
from torch import Tensor

from fntrain.core.errors import CheckpointError
from fntrain.shell.weights.files import write_weights


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
      ...     torch.save({"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 7}, directory + "/linear.pt")
      ...     path = convert(directory + "/linear.pt", directory + "/linear.safetensors", key="model")
      ...     ft.load_params(path, torch.nn.Linear(3, 2))
      LoadReport: 2 matched, 0 missing, 0 unexpected, 0 mismatched
    """
    content = _unpickled(Path(torch_file))
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise CheckpointError(f"{torch_file}: has no key {key!r}; it holds {_kinds(content)}")
        content = content[key]
    if not _holds_tensors(content):
        nested = valfilter(_holds_tensors, content) if isinstance(content, Mapping) else {}
        where = f"; give key={' or '.join(map(repr, nested))}" if nested else ""
        raise CheckpointError(f"{torch_file}: expected tensors by name, got {_kinds(content)}{where}")
    aliases = _aliases(content)
    return write_weights(keyfilter(lambda name: name not in aliases, content), out, aliases)


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of a tensor -> name of the first tensor that is the same memory, for all but the first ones."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel():
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (known := first.setdefault(memory, name)) != name:
                aliases[name] = known
    return aliases


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


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_named_tensor, value.items()))


def _kinds(content: Any) -> str:
    """For messages: how many tensors a dict holds and what else, or what there is in place of a dict."""
    if not isinstance(content, Mapping) or not content:
        return "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    others = [
        f"{name!r} ({type(value).__name__})" for name, value in content.items() if not _is_named_tensor((name, value))
    ]
    more = [f"{len(others) - 10} more"] if len(others) > 10 else []
    return ", ".join([f"{len(content) - len(others)} tensors", *others[:10], *more])
