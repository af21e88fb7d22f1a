"""Checkpoints: a directory of safetensors and one manifest, written so that what is visible is whole.

    step_00000500/model.safetensors   parameters and buffers under the module's own names: loads anywhere
                  train.safetensors   every other tensor of the state, by dotted path
                  state.json          the manifest: schema, structure, small values, and of every tensor its file,
                                      shape, dtype, strides if unusual, and crc32

No pickle anywhere. Order of a save: write both files and fsync them, then the manifest, fsync the directory, rename it
into view, fsync the parent. A kill at any moment leaves the newest visible checkpoint complete.
"""

import json
import logging
import math
import os
import re
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping
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
_MODEL, _TRAIN, _MANIFEST = "model.safetensors", "train.safetensors", "state.json"
_NAME = re.compile(r"step_(\d{8,})(\.old)?")
_SEALED = re.compile(rb'\{"crc32": (\d+), "manifest": (.*)\}', re.DOTALL)
_log = logging.getLogger("fntrain")


def save(state: TrainState, directory: str | os.PathLike[str]) -> Path:
    """Write a state to `directory/step_XXXXXXXX`, whole or not at all; returns that path.

    A checkpoint of the same step is replaced only once the new one is complete.

    Args:
      state: any state; its saved fields are written (not `metrics`, not `run`).
      directory: of all checkpoints of the run; made if it is not there.
    Raises:
      CheckpointError: the directory can't be written, the disk is full, or a leaf can't be saved (named).
    Example:
      >>> import tempfile
      >>> state = ft.TrainState(step=5, position=5, seed=0, params={"w": torch.zeros(2)})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(state, directory)
      ...     path.name, load(path) == state
      ('step_00000005', True)
    """
    root = Path(directory)
    target = root / f"step_{state.step:08d}"
    partial = root / f".partial-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        try:
            _write(state, partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already if it was published
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written: {error}; nothing visible was changed") from error
    return target


def load(path: str | os.PathLike[str]) -> TrainState:
    """Read one checkpoint and check every byte of it; tensors come on the CPU.

    Args:
      path: a `step_XXXXXXXX` directory.
    Raises:
      CheckpointError: missing, truncated, damaged or of an unknown schema; the message names file and leaf.
    Example:
      >>> load("no/such/step_00000001")
      Traceback (most recent call last):
      fntrain.errors.CheckpointError: no/such/step_00000001/state.json: no such file; not a complete checkpoint
    """
    path = Path(path)
    manifest = _read_manifest(path)
    tensors: dict[str, Tensor] = {}
    for file in (_MODEL, _TRAIN):
        listed = {leaf: entry for leaf, entry in manifest["tensors"].items() if entry["file"] == file}
        tensors |= _read_tensors(path / file, listed, manifest["headers"].get(file))
    try:
        fields = _decode(manifest["state"], tensors)
        _check_fields(fields)
        return TrainState(**{name: fields[name] for name in SAVED})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path / _MANIFEST}: structure is damaged: {error!r}") from error


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint of a directory by step, or None; its bytes are not read.

    Example:
      >>> latest("no/such/directory") is None
      True
    """
    return next((path for path in checkpoints(directory) if (path / _MANIFEST).is_file()), None)


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints of a directory, newest step first.

    Example:
      >>> checkpoints("no/such/directory")
      []
    """
    root = Path(directory)
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir(), key=lambda path: path.name, reverse=True):
        # step_X.old is the former checkpoint of a step that a kill left between two renames.
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and (match[2] is None or int(match[1]) not in found):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name.

    Example:
      >>> step_of(Path("runs/step_00000500"))
      500
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: got {path.name!r}, expected step_ and at least 8 digits")
    return int(match[1])


def resume_or(state: TrainState, directory: str | os.PathLike[str]) -> TrainState:
    """Return the newest intact checkpoint of a directory as a state like `state`, or `state` if there is none.

    Damaged checkpoints are passed over with a warning in the log. Tensors get the device and layout of `state`'s.

    Args:
      state: a fresh state of the same job; params and buffers must match by name, shape and dtype, opt_state by
        parameter name, and the seed must be the same. Memory of hooks is sorted out when `fit` starts.
      directory: of the run's checkpoints; may not exist yet.
    Raises:
      CheckpointError: all checkpoints are damaged, or the newest intact one is of another model or seed.
    Example:
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> resume_or(state, "no/such/directory") is state
      True
    """
    found = checkpoints(directory)
    problems = []
    for path in found:
        try:
            loaded = load(path)
        except CheckpointError as error:
            problems.append(str(error))
            _log.warning("passed over a damaged checkpoint: %s", error)
            continue
        _log.info("resuming from %s", path)
        return _fitted(loaded, state, path)
    if problems:
        raise CheckpointError(
            f"{directory}: all {len(problems)} checkpoints are damaged; move them away to start afresh\n  "
            + "\n  ".join(problems)
        )
    return state


def newest_intact_after(directory: str | os.PathLike[str], step: int) -> Path | None:
    """Return the newest intact checkpoint later than a step, or None; damaged ones later than it are put out of view.

    Example:
      >>> newest_intact_after("no/such/directory", 0) is None
      True
    """
    for path in checkpoints(directory):
        if step_of(path) <= step:
            break
        try:
            load(path)
        except CheckpointError as error:
            aside = path.rename(path.with_name(f"damaged_{path.name}-{uuid.uuid4().hex[:8]}"))
            _log.warning("put a damaged checkpoint aside as %s: %s", aside, error)
        else:
            return path
    return None


def prune(directory: str | os.PathLike[str], keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; each vanishes from view in one rename before it is deleted.

    Example:
      >>> prune("no/such/directory", keep_last=3)
    """
    complete = [path for path in checkpoints(directory) if (path / _MANIFEST).is_file()]
    for path in [one for former in complete[keep_last:] for one in (former.with_name(former.name + ".old"), former)]:
        if not path.exists():
            continue
        doomed = path.with_name(f".partial-deleted-{uuid.uuid4().hex[:8]}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean(directory: str | os.PathLike[str]) -> None:
    """Make the directory writable for checkpoints and remove what dead writers left in it.

    Raises:
      CheckpointError: it can't be made or written to.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     clean(directory + "/run")
    """
    root = Path(directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".partial-{uuid.uuid4().hex[:8]}"
        probe.mkdir()
    except OSError as error:
        raise CheckpointError(f"{root}: can't be written to: {error}; give another directory") from error
    for leftover in root.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write(state: TrainState, directory: Path) -> None:
    fields = saved_fields(state)
    tensors: dict[str, Tensor] = {}
    try:
        for leaf, value in tree.named_leaves(fields):
            if isinstance(value, Tensor):
                if leaf in tensors:
                    raise CheckpointError(f"state.{leaf}: two tensors have this dotted path; rename one of the keys")
                tensors[leaf] = value
    except TypeError as error:
        raise CheckpointError(f"state.{error}") from error
    files: dict[str, dict[str, Tensor]] = {_MODEL: {}, _TRAIN: {}}
    entries: dict[str, dict[str, Any]] = {}
    headers: dict[str, int] = {}
    for leaf, tensor in tensors.items():
        file, name = _place(leaf)
        _check_leaf(leaf, tensor)
        stored = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # A view of a larger storage, or storage seen before, would be refused or written whole.
        if stored.untyped_storage().nbytes() != stored.nbytes or stored.data_ptr() == tensor.data_ptr():
            stored = stored.clone()
        if name in files[file]:
            raise CheckpointError(f"state.{leaf}: a parameter and a buffer have this name; rename one")
        files[file][name] = stored
        entries[leaf] = {"file": file, "name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor.dtype)}
        if (stride := torch.empty_like(tensor, device="meta").stride()) != stored.stride():
            entries[leaf]["stride"] = list(stride)  # dense: gaps and overlaps of a view are not kept
        entries[leaf]["crc32"] = zlib.crc32(tree.to_bytes(stored))
    for file, contents in files.items():
        save_file(contents, directory / file, metadata={"format": "pt"})
        headers[file] = _header_crc32(directory / file)
        _fsync(directory / file)
    manifest = {
        "format": "fntrain",
        "schema": SCHEMA,
        "versions": {"torch": torch.__version__},
        "state": _encode(fields, ""),
        "headers": headers,
        "tensors": entries,
    }
    text = json.dumps(manifest, allow_nan=False)
    with (directory / _MANIFEST).open("w", encoding="utf-8") as out:
        out.write(f'{{"crc32": {zlib.crc32(text.encode())}, "manifest": {text}}}')
    _fsync(directory / _MANIFEST)
    _fsync(directory)


def _publish(partial: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)  # still found, as step_X.old, should the process end here
    partial.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(leaf: str) -> tuple[str, str]:
    """File of a leaf and its name there."""
    field, _, name = leaf.partition(".")
    return (_MODEL, name) if field in ("params", "buffers") else (_TRAIN, leaf)


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
        if type(fields[name]) is not int:
            raise TypeError(f"{name} is {fields[name]!r}, expected a whole number")
    for name in ("params", "buffers"):
        if not all(isinstance(value, Tensor) for value in fields[name].values()):
            raise TypeError(f"{name} holds something else than tensors")
    if not all(isinstance(entries, dict) for entries in fields["opt_state"].values()):
        raise TypeError("opt_state holds something else than dicts")


def _header_crc32(file: Path) -> int:
    """Checksum of a safetensors file's header; its tensors have their own."""
    with file.open("rb") as opened:
        return zlib.crc32(opened.read(int.from_bytes(opened.read(8), "little")))


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
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


def _read_tensors(file: Path, entries: Mapping[str, Mapping[str, Any]], header: Any) -> dict[str, Tensor]:
    """Read the listed tensors of one file, and check names, shapes, dtypes and checksums."""
    try:
        with safe_open(file, framework="pt") as opened:
            if _header_crc32(file) != header:
                raise CheckpointError(f"{file}: header is damaged (checksum differs)")
            names = set(opened.keys())
            expected = {entry["name"] for entry in entries.values()}
            if names != expected:
                raise CheckpointError(f"{file}: names differ from the manifest: {sorted(names ^ expected)}")
            return {
                leaf: _verified(file, leaf, opened.get_tensor(entry["name"]), entry) for leaf, entry in entries.items()
            }
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


def _fitted(loaded: TrainState, like: TrainState, path: Path) -> TrainState:
    """The loaded state with the devices and layouts of a fresh one, after checking that it is of the same job."""
    if loaded.seed != like.seed:
        raise CheckpointError(f"{path}: seed is {loaded.seed}, this run has {like.seed}; a resumed run keeps its seed")
    fitted: dict[str, Any] = {}
    for field in ("params", "buffers"):
        have, want = getattr(loaded, field), getattr(like, field)
        if problems := list(_differences(field, have, want)):
            raise CheckpointError(f"{path / _MODEL}: of another model:\n  " + "\n  ".join(problems))
        fitted[field] = {name: torch.empty_like(want[name]).copy_(have[name]) for name in want}
    if unknown := sorted(loaded.opt_state.keys() - like.params.keys()):
        raise CheckpointError(f"{path / _TRAIN}: opt_state is of parameters the model does not have: {unknown}")
    device = next((param.device for param in like.params.values()), torch.device("cpu"))
    fitted["opt_state"] = {
        name: tree.map_tensors(lambda tensor: tensor if tensor.dim() == 0 else tensor.to(device), entries)
        for name, entries in loaded.opt_state.items()  # step counters stay on the CPU, where torch keeps them
    }
    fitted["extra"] = tree.map_tensors(lambda tensor: tensor.to(device), loaded.extra)
    return loaded.replace(**fitted)


def _differences(field: str, have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(have.keys() | want.keys()):
        path = f"state.{field}[{name!r}]"
        if name not in want:
            yield f"{path}: only in the checkpoint"
        elif name not in have:
            yield f"{path}: only in the model"
        elif (have[name].shape, have[name].dtype) != (want[name].shape, want[name].dtype):
            yield (
                f"{path}: checkpoint has {tuple(have[name].shape)} {have[name].dtype}, "
                f"model has {tuple(want[name].shape)} {want[name].dtype}"
            )
