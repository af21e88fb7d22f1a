"""The manifest of a checkpoint as records: which tensors it has, in which files they lie, and their checksums.

A checkpoint has three kinds of files. `model.safetensors` holds parameters and buffers under the module's own names,
`train.safetensors` every other tensor by dotted path, and `state.json`, the manifest, the rest: schema, structure,
small values, and of every tensor its file, shape, dtype, strides if unusual, and a crc32 for each 16 MiB. The manifest
and the headers of the other files have checksums of their own, so a flipped bit is found wherever it is. No pickle
anywhere.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.tensor_file import PART, crc32, nbytes
from fntrain.shell.checkpoints.upgrade import SCHEMA, upgraded

MODEL, TRAIN, MANIFEST = "model.safetensors", "train.safetensors", "state.json"
# Read by a pattern: JSON with a flipped bit may be other JSON, so nothing is parsed before its checksum is right.
_SEALED = re.compile(rb'\{"crc32": (\d{1,10}), "manifest": (.*)\}', re.DOTALL)
_FILE = re.compile(r"(model|train)[0-9a-z-]{0,40}\.safetensors")


@attrs.frozen
class File:
    """One file of tensors: the length and checksum of its header, and its own length."""

    header: int
    crc32: int
    bytes: int


@attrs.frozen
class Part:
    """Rows of a tensor that lie together in one file.

    Args:
      key: name in the manifest: the leaf's path, followed by @ and the rank's number if the tensor is split.
      file: that it is in.
      shape: of these rows.
      row: of the whole tensor that is the first here.
      start: where its bytes begin in the file.
      crc32: one for each piece of `Manifest.piece` bytes, the last piece may be shorter.
    """

    key: str
    file: str
    shape: tuple[int, ...]
    row: int = 0
    start: int = 0
    crc32: tuple[int, ...] = ()


@attrs.frozen
class Stored:
    """One tensor of a state, as it is stored.

    Args:
      leaf: dotted path in the state.
      name: in the safetensors file.
      dtype: torch's name for it.
      shape: of the whole tensor.
      parts: one; of a tensor that is split over ranks one for each rank, which together have all rows.
      stride: in memory, if the tensor was not contiguous.
      device: type of the device that it was on, if not the CPU.
    """

    leaf: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    stride: tuple[int, ...] | None = None
    device: str | None = None

    @property
    def split(self) -> bool:
        """Whether it was split over ranks when it was saved."""
        return self.parts[0].key != self.leaf

    def bytes_of(self, part: Part) -> int:
        """The number of bytes of a part."""
        return nbytes(self.dtype, part.shape)


@attrs.frozen
class Manifest:
    """What a checkpoint holds.

    Args:
      structure: the state as JSON, see contents.py.
      piece: number of bytes under one checksum.
      files: of tensors, by name.
      tensors: by dotted path.
    """

    structure: Any
    piece: int
    files: dict[str, File]
    tensors: dict[str, Stored]


def file_of(leaf: str) -> str:
    """Return the kind of file that a leaf is in.

    Example:
      >>> file_of("params.fc.weight"), file_of("extra.ema.fc.weight")
      ('model.safetensors', 'train.safetensors')
    """
    return MODEL if leaf.partition(".")[0] in ("params", "buffers") else TRAIN


def dumps(structure: Any, files: Mapping[str, File], tensors: Sequence[Stored]) -> bytes:
    """Return a manifest as bytes, with its checksum.

    Args:
      structure: the state as JSON.
      files: all files of tensors.
      tensors: with parts that are written; those of one file in their order there. A split one comes once a rank.
    """
    split = {stored.leaf: stored for stored in tensors if stored.split}
    manifest = {
        "format": "fntrain",
        "schema": SCHEMA if split else 2,
        "versions": {"torch": torch.__version__},
        "part": PART,
        "state": structure,
        "files": {name: attrs.asdict(file) for name, file in files.items()},
        "tensors": {part.key: _as_json(stored, part) for stored in tensors for part in stored.parts},
    }
    if split:
        manifest["whole"] = {leaf: _as_json(stored) for leaf, stored in split.items()}
    # nan is no JSON. `encode` has written it as its bits, so one that is here is a fault, and must not reach the disk.
    text = json.dumps(manifest, allow_nan=False).encode()
    return b'{"crc32": %d, "manifest": %s}' % (crc32(text), text)


def read_manifest(path: AnyPath) -> Manifest:
    """Read the manifest of a checkpoint and check it; what is read of the other files later can't go beyond it.

    Raises:
      CheckpointError: there is none, or it is damaged, or (SchemaError) it is of a later version.
    Example:
      >>> from pathlib import Path
      >>> read_manifest(Path("no/such"))
      Traceback (most recent call last):
      fntrain.CheckpointError: no/such/state.json: no such file; not a complete checkpoint
    """
    file = path / MANIFEST
    try:
        found = _SEALED.fullmatch(file.read_bytes())
        if found is None or crc32(found[2]) != int(found[1]):
            raise CheckpointError(f"{file}: is damaged (checksum differs), or not a manifest of fntrain")
        content = json.loads(found[2])
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; not a complete checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "fntrain":
        raise CheckpointError(f"{file}: not a manifest of fntrain")
    try:
        manifest = _parsed(upgraded(content, path))
        _check(manifest)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: its list of tensors is damaged: {error!r}") from error
    return manifest


def _as_json(stored: Stored, part: Part | None = None) -> dict[str, Any]:
    """What the manifest says of a part, or of the whole of a split tensor."""
    file, shape = (part.file, part.shape) if part else (file_of(stored.leaf), stored.shape)
    entry: dict[str, Any] = {"file": file, "name": stored.name, "shape": shape, "dtype": stored.dtype}
    if stored.stride is not None:
        entry["stride"] = stored.stride
    if stored.device is not None:
        entry["device"] = stored.device
    if part and stored.split:
        entry |= {"of": stored.leaf, "at": part.row}
    return entry | {"crc32": part.crc32} if part else entry


def _parsed(content: Mapping[str, Any]) -> Manifest:
    """Make records of JSON; raises an error unless all that has to be a number or a text is one."""
    files = {
        name: File(*_numbers([one["header"], one["crc32"], one["bytes"]])) for name, one in content["files"].items()
    }
    ends = {name: file.header for name, file in files.items()}
    whole = content["whole"]
    parts: dict[str, list[Part]] = {leaf: [] for leaf in whole}
    about = dict(whole)
    for key, entry in content["tensors"].items():
        part = _parsed_part(key, entry, ends[entry["file"]])
        ends[part.file] += nbytes(entry["dtype"], part.shape)
        if "of" not in entry:
            if key in whole:
                raise ValueError(f"{key!r}: whole and in parts")
            about[key], parts[key] = entry, []
        elif entry["dtype"] != whole[entry["of"]]["dtype"] or key.rpartition("@")[0] != entry["of"]:
            raise ValueError(f"{key!r}: {entry!r} is no part of {whole[entry['of']]!r}")
        parts[entry.get("of", key)].append(part)
    for leaf, entry in whole.items():
        if entry["file"] != file_of(leaf):
            raise ValueError(f"{leaf!r}: {entry!r}")
    tensors = {leaf: _parsed_tensor(leaf, entry, parts[leaf]) for leaf, entry in about.items()}
    return Manifest(content["state"], _whole_number(content["part"]), files, tensors)


def _parsed_part(key: str, entry: Mapping[str, Any], start: int) -> Part:
    row = _whole_number(entry["at"]) if "of" in entry else 0
    return Part(key, entry["file"], _numbers(entry["shape"]), row, start, _numbers(entry["crc32"]))


def _parsed_tensor(leaf: str, entry: Mapping[str, Any], parts: Iterable[Part]) -> Stored:
    if type(entry["name"]) is not str or type(entry.get("device", "")) is not str:
        raise ValueError(f"{leaf!r}: {entry!r}")
    shape, stride = _numbers(entry["shape"]), _numbers(entry["stride"]) if "stride" in entry else None
    return Stored(leaf, entry["name"], entry["dtype"], shape, tuple(parts), stride, entry.get("device"))


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"got {value!r}, expected a whole number")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not list:
        raise ValueError(f"got {values!r}, expected a list of whole numbers")
    return tuple(map(_whole_number, values))


def _check(manifest: Manifest) -> None:
    """Raise ValueError unless the files and tensors are possible and agree with each other."""
    if not manifest.piece:
        raise ValueError("part: got 0")
    ends = {name: file.header for name, file in manifest.files.items()}
    for stored in manifest.tensors.values():
        _check_tensor(stored)
        for part in stored.parts:
            size = stored.bytes_of(part)
            if len(part.crc32) != max(1, -(-size // manifest.piece)):
                raise ValueError(f"{part.key!r}: {part!r}")
            ends[part.file] = max(ends[part.file], part.start + size)
    for name, file in manifest.files.items():
        if not _FILE.fullmatch(name) or file.header > file.bytes:
            raise ValueError(f"file {name!r}: {file!r}")
        if ends[name] != file.bytes:
            raise ValueError(f"file {name!r}: its tensors end at {ends[name]}, not at {file.bytes}")


def _check_tensor(stored: Stored) -> None:
    """Raise ValueError unless torch can have such a tensor and its parts make it up, row after row."""
    for shape in (stored.shape, *(part.shape for part in stored.parts if stored.split)):
        # torch can't have so many bytes, even if one of the sizes is 0.
        if len(shape) > 64 or nbytes(stored.dtype, [max(1, size) for size in shape]) >= 1 << 63:
            raise ValueError(f"{stored.leaf!r}: {stored!r}")
    if not stored.parts:
        raise ValueError(f"{stored.leaf!r}: has no parts")
    if not stored.split:
        return
    row = 0
    for part in sorted(stored.parts, key=lambda part: (part.row, part.shape)):
        if not part.shape or part.shape[1:] != stored.shape[1:]:
            raise ValueError(f"{part.key!r}: {part!r} is no part of {stored!r}")
        if part.row != row:
            raise ValueError(f"{stored.leaf!r}: rows {row} to {part.row} are missing")
        row += part.shape[0]
    if row != stored.shape[0]:
        raise ValueError(f"{stored.leaf!r}: rows from {row} on are missing")
