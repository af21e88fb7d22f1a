"""The files of one checkpoint: what is written where, and every check on reading.

`model.safetensors` has parameters and buffers under the module's own names, `train.safetensors` every other tensor by
dotted path, `state.json` the rest: schema, structure, small values, and of every tensor its file, shape, dtype,
strides if unusual, and crc32. The manifest and the headers of the other files have checksums of their own, so a
flipped bit is found wherever it is. No pickle anywhere.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fntrain import tree
from fntrain.errors import CheckpointError
from fntrain.state import SAVED, TrainState, saved_fields
from fntrain.tree import PyTree

SCHEMA = 1
MODEL, TRAIN, MANIFEST = "model.safetensors", "train.safetensors", "state.json"
_SEALED = re.compile(rb'\{"crc32": (\d+), "manifest": (.*)\}', re.DOTALL)


def write_files(state: TrainState, directory: Path) -> None:
    """Write a state's files into a directory and fsync them, the manifest last."""
    fields = saved_fields(state)
    tensors: dict[str, Tensor] = {}
    try:
        for leaf, value in tree.named_leaves(fields):
            if isinstance(value, Tensor):
                if leaf in tensors:
                    raise CheckpointError(f"state.{leaf}: two tensors have this dotted path; rename one of the keys")
                tensors[leaf] = value
        _check_fields(fields)
    except TypeError as error:
        raise CheckpointError(f"state.{error}") from error
    files: dict[str, dict[str, Tensor]] = {MODEL: {}, TRAIN: {}}
    entries: dict[str, dict[str, Any]] = {}
    headers: dict[str, int] = {}
    storages: set[int] = set()
    for leaf, tensor in tensors.items():
        file, name = _place(leaf)
        _check_leaf(leaf, tensor)
        stored = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # A view of a larger storage, or storage seen before, would be refused or written whole.
        if stored.untyped_storage().nbytes() != stored.nbytes or stored.data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.data_ptr())
        if name in files[file] or name == "__metadata__":
            raise CheckpointError(f"state.{leaf}: the name {name!r} is taken by a parameter or the format; rename one")
        files[file][name] = stored
        entries[leaf] = {"file": file, "name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor.dtype)}
        if (stride := torch.empty_like(tensor, device="meta").stride()) != stored.stride():
            entries[leaf]["stride"] = list(stride)  # dense: gaps and overlaps of a view are not kept
        if tensor.device.type != "cpu":
            entries[leaf]["device"] = tensor.device.type
        entries[leaf]["crc32"] = zlib.crc32(tree.to_bytes(stored))
    for file, contents in files.items():
        save_file(contents, directory / file, metadata={"format": "pt"})
        headers[file] = _header_crc32(directory / file)
        fsync(directory / file)
    manifest = {
        "format": "fntrain",
        "schema": SCHEMA,
        "versions": {"torch": torch.__version__},
        "state": _encode(fields, ""),
        "headers": headers,
        "tensors": entries,
    }
    text = json.dumps(manifest, allow_nan=False)
    with (directory / MANIFEST).open("w", encoding="utf-8") as out:
        out.write(f'{{"crc32": {zlib.crc32(text.encode())}, "manifest": {text}}}')
    fsync(directory / MANIFEST)
    fsync(directory)


def read_files(path: Path, device: torch.device | None = None) -> TrainState:
    """Read one checkpoint and check every byte of it; raises CheckpointError, naming file and leaf.

    With a device, tensors that were on one when saved go there; what was on the CPU (step counters, say) stays.
    """
    manifest = _read_manifest(path)
    tensors: dict[str, Tensor] = {}
    for file in (MODEL, TRAIN):
        listed = {leaf: entry for leaf, entry in manifest["tensors"].items() if entry["file"] == file}
        tensors |= _read_tensors(path / file, listed, manifest["headers"].get(file), device)
    try:
        fields = _decode(manifest["state"], tensors)
        _check_fields(fields)
        return TrainState(**{name: fields[name] for name in SAVED})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path / MANIFEST}: structure is damaged: {error!r}") from error


def read_model(path: Path) -> dict[str, Tensor]:
    """Read parameters and buffers of one checkpoint by their names in the module, every byte of that file checked."""
    manifest = _read_manifest(path)
    listed = {leaf: entry for leaf, entry in manifest["tensors"].items() if entry["file"] == MODEL}
    tensors = _read_tensors(path / MODEL, listed, manifest["headers"].get(MODEL), None)
    return {listed[leaf]["name"]: tensor for leaf, tensor in tensors.items()}


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(leaf: str) -> tuple[str, str]:
    """File of a leaf and its name there."""
    field, _, name = leaf.partition(".")
    return (MODEL, name) if field in ("params", "buffers") else (TRAIN, leaf)


def _check_leaf(leaf: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(f"state.{leaf}: got a {kind} tensor, expected a plain dense one")
    if tensor.dtype == torch.complex128:
        raise CheckpointError(f"state.{leaf}: got {tensor.dtype}, which safetensors does not know; save real and imag")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encode(value: PyTree, path: str) -> Any:
    """A tree as JSON: containers and tensors tagged, everything else as it is."""
    if isinstance(value, Tensor):
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": {key: _encode(item, f"{path}.{key}" if path else key) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_encode(item, f"{path}.{index}") for index, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}  # all bits: nan has a sign
    return value


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> PyTree:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content.items()}
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    return {"list": list, "tuple": tuple}[kind](_decode(item, tensors) for item in content)


def _check_fields(fields: Any) -> None:
    for name in ("step", "position", "seed"):
        if type(fields[name]) is not int or (name != "seed" and fields[name] < 0):
            raise TypeError(f"{name}: is {fields[name]!r}, expected a whole number")
    for name in ("params", "buffers"):
        for key, value in fields[name].items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}[{key!r}]: is {type(value).__name__}, expected a tensor")
    for key, entries in fields["opt_state"].items():
        if not isinstance(entries, Mapping):
            raise TypeError(f"opt_state[{key!r}]: is {type(entries).__name__}, expected a dict")


def _header_crc32(file: Path) -> int:
    """Checksum of a safetensors file's header; its tensors have their own."""
    with file.open("rb") as opened:
        return zlib.crc32(opened.read(int.from_bytes(opened.read(8), "little")))


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        found = _SEALED.fullmatch(file.read_bytes())
        if found is None or zlib.crc32(found[2]) != int(found[1]):
            raise CheckpointError(f"{file}: is damaged (checksum differs), or not a manifest of fntrain")
        manifest = json.loads(found[2])
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; not a complete checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "fntrain":
        raise CheckpointError(f"{file}: not a manifest of fntrain")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{file}: schema is {manifest.get('schema')!r}, this version reads {SCHEMA}; upgrade")
    fields = {"file": str, "name": str, "shape": list, "dtype": str, "crc32": int}
    entries = manifest.get("tensors")
    if (
        not isinstance(manifest.get("headers"), dict)
        or not isinstance(entries, dict)
        or not all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in fields.items())
            for entry in entries.values()
        )
    ):
        raise CheckpointError(f"{file}: its list of tensors is damaged")
    return manifest


def _read_tensors(
    file: Path, entries: Mapping[str, Mapping[str, Any]], header: Any, device: torch.device | None
) -> dict[str, Tensor]:
    """Read the listed tensors of one file, and check names, shapes, dtypes and checksums."""
    try:
        with safe_open(file, framework="pt") as opened:
            if _header_crc32(file) != header:
                raise CheckpointError(f"{file}: header is damaged (checksum differs)")
            names = set(opened.keys())
            expected = {entry["name"] for entry in entries.values()}
            if names != expected:
                raise CheckpointError(f"{file}: names differ from the manifest: {sorted(names ^ expected)}")
            found = {}
            for leaf, entry in entries.items():
                tensor = _verified(file, leaf, opened.get_tensor(entry["name"]), entry)
                found[leaf] = tensor.to(device) if device is not None and "device" in entry else tensor
            return found
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error


def _verified(file: Path, leaf: str, tensor: Tensor, entry: Mapping[str, Any]) -> Tensor:
    got = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if got != (entry["shape"], entry["dtype"]):
        raise CheckpointError(f"{file}: {leaf} is {got}, the manifest says {(entry['shape'], entry['dtype'])}")
    if zlib.crc32(tree.to_bytes(tensor)) != entry["crc32"]:
        raise CheckpointError(f"{file}: {leaf} is damaged (checksum differs)")
    if "stride" not in entry:
        return tensor.clone()  # not a view of the mapped file
    stride = entry["stride"]
    try:
        # Only dense strides are written: empty_like of the meta tensor is the same tensor again.
        dense = torch.empty_like(torch.empty_strided(tensor.shape, stride, device="meta")).stride()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {leaf}: damaged stride {stride!r} in the manifest") from error
    if list(dense) != stride:
        raise CheckpointError(f"{file}: {leaf}: damaged stride {stride!r} in the manifest")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
