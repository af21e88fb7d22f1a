"""Files of named tensors that other libraries share: one safetensors file, or a set of them with an index.

`read_weights` also reads the common sharded layout (`model.safetensors.index.json`, whose `weight_map` gives the file
of every name) and a checkpoint's model file. Files of other libraries have no checksums; what can be checked is that no
file of a set is missing or belongs to another set. Nothing here reads a pickle.
"""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from toolz import groupby, valmap
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.manifest import MANIFEST
from fntrain.shell.checkpoints.paths import RemotePath, path_of
from fntrain.shell.checkpoints.reading import read_model
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.disk import fsync

_INDEX = ".safetensors.index.json"
_MADE_BY_TORCH = (b"PK\x03\x04", b"\x80\x02")  # torch.save: a zip file, a bare pickle before torch 1.6


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read tensors by the names in the files, on the CPU.

    Safetensors files are mapped into memory, so a tensor takes memory only while it is read; don't write to it.

    Args:
      path: a safetensors file, an index of several, a directory with one of these, or a `step_XXXXXXXX` checkpoint.
    Raises:
      CheckpointError: nothing there or more than one choice, damaged, or the index and its files disagree.
    Example:
      >>> read_weights("no/such.safetensors")
      Traceback (most recent call last):
      fntrain.CheckpointError: no/such.safetensors: no such file
    """
    given = path_of(path)
    if (given / MANIFEST).exists():
        return read_model(given)
    if isinstance(given, RemotePath):
        raise CheckpointError(f"{given}: is no checkpoint; copy a safetensors file to a local path, and read it there")
    path = _only(given) if given.is_dir() else given
    if not path.name.endswith(_INDEX):
        return _read_file(path)
    tensors: dict[str, Tensor] = {}
    for file, listed in _shards(path).items():
        found = _read_file(path.parent / file)
        if problems := sorted(found.keys() ^ listed):
            raise CheckpointError(f"{path.parent / file}: {path.name} and the file disagree on {problems}; a mixed set")
        tensors |= found
    return tensors


def write_weights(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], aliases: Mapping[str, str] | None = None
) -> Path:
    """Write plain contiguous tensors to one safetensors file, whole or not at all; returns its path.

    Args:
      tensors: by name, on any device, of any layout in memory; each is written with its values alone.
      path: the file; its directory is made, a former file replaced once the new one is on the disk.
      aliases: other name -> name in `tensors` of the same tensor: noted in the header, not written again.
    Raises:
      CheckpointError: a tensor is of a kind that the format does not know (named), or the file can't be written.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     read_weights(write_weights({"w": torch.ones(2)}, directory + "/w.safetensors"))
      {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if (path.parent / MANIFEST).exists():
        raise CheckpointError(f"{path}: {path.parent} is a checkpoint, whose files belong together; give another path")
    for name, tensor in tensors.items():
        _check_kind(path, name, tensor)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # transformers refuses a file without a format, so an alias that is called "format" must not replace it.
        _replace(path, _plain(tensors), {**(aliases or {}), "format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be written: {error}") from error
    return path


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in a storage of its own."""
    plain: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # Of a view safetensors writes the whole storage, and it refuses a storage that it has seen before.
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in addresses:
            own = own.clone()
        addresses.add(own.data_ptr())
        plain[name] = own
    return plain


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file beside the one of this name, and rename it once it is on the disk."""
    partial = path.with_name(f".partial-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        save_file(tensors, partial, metadata=metadata)
        fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync(path.parent)


def _only(directory: Path) -> Path:
    """What to read in a directory: an index that lists all safetensors files there, or the only such file."""
    indexes = sorted(directory.glob("*" + _INDEX))
    listed = {file for index in indexes for file in _shards(index)}
    choices = indexes + [file for file in sorted(directory.glob("*.safetensors")) if file.name not in listed]
    if len(choices) == 1:
        return choices[0]
    if choices:
        raise CheckpointError(f"{directory}: holds {[path.name for path in choices]}; give the path of one of them")
    if found := checkpoints(directory):
        raise CheckpointError(f"{directory}: holds checkpoints; give one of them, the newest is {found[0]}")
    raise CheckpointError(f"{directory}: holds no safetensors file, no index of some, and no checkpoint")


def _shards(index: Path) -> dict[str, set[str]]:
    """The names that an index expects in each of its files."""
    try:
        content = json.loads(index.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{index}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: can't be read: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from names to files")
    for name, file in weight_map.items():
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise CheckpointError(f"{index}: {name!r} is said to be in {file!r}, which is outside of its directory")
    shards: dict[str, set[str]] = valmap(set, groupby(weight_map.__getitem__, weight_map))
    return shards


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, SafetensorError) as error:
        if file.is_file() and _first_bytes(file).startswith(_MADE_BY_TORCH):
            raise CheckpointError(
                f"{file}: is a file of torch.save, a pickle; make it a safetensors file once, with "
                "ft.shell.weights.convert(torch_file, out)"
            ) from error
        raise CheckpointError(f"{file}: is damaged or no safetensors file: {error}") from error


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(8)


def _check_kind(path: Path, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path}: {name!r} is {type(tensor).__name__}, expected a tensor")
    if tree.local(tensor) is not tensor:
        raise CheckpointError(
            f"{path}: {name!r} is split over ranks; save a checkpoint (ft.save, on all ranks) and export that, as "
            "`python -m fntrain export` does"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(f"{path}: {name!r} is a {kind} tensor, expected a plain dense one")
    if tensor.dtype == torch.complex128 or name == "__metadata__":
        what = "the name" if name == "__metadata__" else f"{name!r}: the dtype {tensor.dtype}"
        raise CheckpointError(f"{path}: {what} can't be kept in a safetensors file; change it first")
