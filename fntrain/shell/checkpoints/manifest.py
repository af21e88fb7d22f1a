"""The files of one checkpoint: what is written where, and every check on reading.

`model.safetensors` has parameters and buffers under the module's own names, `train.safetensors` every other tensor by
dotted path, `state.json` the rest: schema, structure, small values, and of every tensor its file, shape, dtype,
strides if unusual, and crc32, one for each 16 MiB. The manifest and the headers of the other files have checksums of
their own, so a flipped bit is found wherever it is. No pickle anywhere.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.state import SAVED, TrainState, saved_fields
from fntrain.core.tree import PyTree
from fntrain.shell.checkpoints.remote import Place, RemotePath
from fntrain.shell.checkpoints.tensor_file import (
    DTYPES,
    PART,
    Reader,
    Writer,
    crc32,
    crc32_parts,
    grouped,
    header,
    nbytes,
)
from fntrain.shell.checkpoints.upgrade import SCHEMA, upgraded

Verify = Literal["full", "structure"]
MODEL, TRAIN, MANIFEST = "model.safetensors", "train.safetensors", "state.json"
_SEALED = re.compile(rb'\{"crc32": (\d{1,10}), "manifest": (.*)\}', re.DOTALL)
_FILE = re.compile(r"(model|train)[0-9a-z-]{0,40}\.safetensors")
_STEP = re.compile(r"step_(\d{1,19})(\.old)?")


@attrs.frozen(eq=False)
class Contents:
    """What is to be written of a state.

    Args:
      step: of the state.
      structure: the saved fields as JSON, with the dotted path in place of a tensor.
      entries: by dotted path, in the order of the files: what the manifest says of a tensor. Of one that is split over
        ranks, of this rank's part, under its path with the rank's number after an @.
      tensors: in the same order, wherever they lie.
      whole: by dotted path: what the manifest says of those that are split.
      ranks: who writes them together, the first what is not split.
    """

    step: int
    structure: Any
    entries: dict[str, dict[str, Any]]
    tensors: list[Tensor]
    whole: dict[str, dict[str, Any]]
    ranks: Ranks

    @classmethod
    def of(cls, state: TrainState) -> "Contents":
        """Look at every leaf; raises CheckpointError for one that can't be saved. Copies and reads no tensor."""
        fields = saved_fields(state)
        tensors: dict[str, Tensor] = {}
        try:
            for leaf, value in tree.named_leaves(fields):
                if isinstance(value, Tensor):
                    if leaf in tensors:
                        raise CheckpointError(
                            f"state.{leaf}: two tensors have this dotted path; rename one of the keys"
                        )
                    tensors[leaf] = value
            _check_fields(fields)
        except TypeError as error:
            raise CheckpointError(f"state.{error}") from error
        whole = {leaf: _entry(leaf, value) for leaf, value in tensors.items() if tree.local(value) is not value}
        ranks = state.run.ranks if state.run.ranks.sharded else ALONE
        for leaf in tensors.keys() - whole.keys():
            if leaf.rpartition("@")[0] in whole:
                raise CheckpointError(f"state.{leaf}: is named like a part of one that is split over ranks; rename it")
        tensors = {leaf: value for leaf, value in tensors.items() if leaf in whole or ranks.rank == 0}
        found = {leaf: _entry(leaf, tree.local(tensor)) for leaf, tensor in tensors.items()}
        for leaf in whole:
            found[leaf] |= {"of": leaf, "at": _rows(leaf, tensors[leaf], ranks)}
        # Large elements first: every tensor of a file is aligned, so other libraries can map it.
        order = sorted(found, key=lambda leaf: (found[leaf]["file"] == TRAIN, -tensors[leaf].element_size()))
        taken: set[tuple[str, str]] = set()
        for leaf in order:
            key = (found[leaf]["file"], found[leaf]["name"])
            if key in taken or key[1] == "__metadata__":
                raise CheckpointError(
                    f"state.{leaf}: the name {key[1]!r} is taken by a parameter or the format; rename one"
                )
            taken.add(key)
        entries = {f"{leaf}@{ranks.rank}" if leaf in whole else leaf: found[leaf] for leaf in order}
        values = [tree.local(tensors[leaf]).detach() for leaf in order]
        return cls(state.step, _encode(fields, ""), entries, values, whole, ranks)


@attrs.frozen
class Written:
    """What the manifest is to say of files: of each file, and of the tensors in them."""

    files: dict[str, dict[str, Any]]
    entries: dict[str, dict[str, Any]]


def write_files(contents: Contents, data: Iterable[memoryview], place: Place, mark: str = "") -> None:
    """Write the files of a checkpoint, each on the disk before the next is begun; the manifest last.

    Args:
      contents: of the state.
      data: the values, in the order of `contents.tensors`; taken as they are written.
      place: a directory that is there.
      mark: put into the names of the files, where files of an earlier attempt must stay.
    """
    write_manifest(contents, [write_tensors(contents, data, place, mark)], place)


def write_tensors(contents: Contents, data: Iterable[memoryview], place: Place, mark: str = "") -> Written:
    """Write the files of a checkpoint but for the manifest; see `write_files`."""
    left = iter(data)
    files: dict[str, dict[str, Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    sums: list[Future[list[list[int]]]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="fntrain-crc32") as hasher:
        for kind in (MODEL, TRAIN):
            file = kind.replace(".", mark + ".", 1)
            mine = {leaf: entry | {"file": file} for leaf, entry in contents.entries.items() if entry["file"] == kind}
            head = header(
                {entry["name"]: (entry["dtype"], entry["shape"]) for entry in mine.values()}, {"format": "pt"}
            )
            with Writer(place / file) as out:
                out.write(head)
                # In large groups: a call for each tensor would wait each time for a thread that trains to let it in.
                for group in grouped(islice(left, len(mine)), PART):
                    sums.append(hasher.submit(lambda views: [crc32_parts(view) for view in views], group))
                    out.write(*group)
            files[file] = {"header": len(head), "crc32": crc32(head), "bytes": out.written}
            entries |= mine
    for entry, found in zip(entries.values(), (one for group in sums for one in group.result()), strict=True):
        entry["crc32"] = found
    return Written(files, entries)


def write_manifest(contents: Contents, written: Iterable[Written], place: Place) -> None:
    """Write the manifest, of what one process has written or several have."""
    files: dict[str, dict[str, Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for one in written:
        files |= one.files
        entries |= one.entries
    manifest = {
        "format": "fntrain",
        "schema": SCHEMA if contents.whole else 2,
        "versions": {"torch": torch.__version__},
        "part": PART,
        "state": contents.structure,
        "files": files,
        "tensors": entries,
    }
    if contents.whole:
        manifest["whole"] = contents.whole
    text = json.dumps(manifest, allow_nan=False).encode()
    sealed = b'{"crc32": %d, "manifest": %s}' % (crc32(text), text)
    manifest_file = place / MANIFEST
    if isinstance(manifest_file, RemotePath):
        manifest_file.write_bytes(sealed)  # at once: a part of it would be in the former one's place
    else:
        with Writer(manifest_file) as out:
            out.write(sealed)


def read_files(
    path: Place,
    *,
    verify: Verify = "full",
    into: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    split: Mapping[str, Tensor] | None = None,
) -> TrainState:
    """Read one checkpoint and check it; raises CheckpointError, naming file and leaf.

    Args:
      path: of the checkpoint.
      verify: "full" checks every byte; "structure" all but the values of the tensors.
      into: tensors by dotted path, written over where name, shape and dtype are right.
      device: of the parameters: tensors that were on a device when saved go there; what was on the CPU stays, and so
        do parameters and buffers, which the caller copies to where they belong: there is no second copy on the device.
      split: parameters that are split over ranks, by name: of them, and of what the optimizer keeps in their shape,
        this rank's rows alone are read, and checked with what shares a checksum with them.
    """
    manifest = _read_manifest(path)
    likes = _splits(manifest, split) if split else {}
    tensors = _read_tensors(path, manifest, manifest["tensors"], verify, into=into or {}, likes=likes)
    if device is not None and device.type != "cpu":
        for leaf, entry in {**manifest["tensors"], **manifest["whole"]}.items():
            if leaf in tensors and "device" in entry and _place(leaf)[0] == TRAIN:
                tensors[leaf] = tensors[leaf].to(device)
    tensors |= {leaf: tree.relocated(like, tensors[leaf]) for leaf, like in likes.items()}
    return decoded(path, manifest, tensors)


def _splits(manifest: Mapping[str, Any], split: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters as which tensors of a checkpoint are to be split, by dotted path."""
    likes = {}
    for leaf, entry in {**manifest["tensors"], **manifest["whole"]}.items():
        field, _, name = leaf.partition(".")
        while field == "opt_state" and name not in split and name:  # what it keeps is below the parameter's name
            name = name.rpartition(".")[0]
        fits = field in ("params", "opt_state") and name in split and "of" not in entry and "stride" not in entry
        if fits and entry["shape"] == list(split[name].shape):
            likes[leaf] = split[name]
    return likes


def check_verify(verify: Verify) -> None:
    """Raise ValueError for another word, before anything is read or written over."""
    if verify not in ("full", "structure"):
        raise ValueError(f'verify: got {verify!r}, expected "full" or "structure"')


def check_files(path: Place, *, verify: Verify = "full") -> None:
    """Raise CheckpointError unless one checkpoint is whole; takes no memory for its tensors."""
    manifest = _read_manifest(path)
    decoded(path, manifest, _read_tensors(path, manifest, manifest["tensors"], verify, keep=False))


def read_model(path: Place) -> dict[str, Tensor]:
    """Read parameters and buffers of one checkpoint by their names in the module, every byte of that file checked."""
    manifest = _read_manifest(path)
    listed = {leaf: entry for leaf, entry in manifest["tensors"].items() if _place(leaf)[0] == MODEL}
    tensors = _read_tensors(path, manifest, listed, "full")
    return {_place(leaf)[1]: tensor for leaf, tensor in tensors.items()}


def _entry(leaf: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(f"state.{leaf}: got a {kind} tensor, expected a plain dense one")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"state.{leaf}: got {tensor.dtype}, which safetensors does not know; save real and imag")
    file, name = _place(leaf)
    entry = {"file": file, "name": name, "shape": list(tensor.shape), "dtype": dtype}
    if not tensor.is_contiguous():
        # Dense: gaps and overlaps of a view are not kept.
        entry["stride"] = list(torch.empty_like(tensor, device="meta").stride())
    if tensor.device.type != "cpu":
        entry["device"] = tensor.device.type
    return entry


def _rows(leaf: str, tensor: Tensor, ranks: Ranks) -> int:
    """The first row of this rank's part."""
    try:
        start, _ = tree.rows(tensor)
    except ValueError as error:
        raise CheckpointError(f"state.{leaf}: {error}") from error
    if ranks.world_size == 1:
        raise CheckpointError(
            f"state.{leaf}: is split over ranks, and the state does not know which: save what ft.fit returned, or its "
            "hooks got, on all ranks"
        )
    return start


def _place(leaf: str) -> tuple[str, str]:
    """File of a leaf and its name there."""
    field, _, name = leaf.partition(".")
    return (MODEL, name) if field in ("params", "buffers") else (TRAIN, leaf)


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


def decoded(path: Place, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TrainState:
    """Build the state that a manifest describes of tensors by dotted path; raises CheckpointError."""
    try:
        fields = _decode(manifest["state"], tensors)
        _check_fields(fields)
        named = _STEP.fullmatch(path.name)
        if named and int(named[1]) != fields["step"]:
            raise CheckpointError(f"{path}: holds step {fields['step']}; a directory that was renamed")
        return TrainState(**{name: fields[name] for name in SAVED})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path / MANIFEST}: structure is damaged: {error!r}") from error


def _check_fields(fields: Any) -> None:
    if not isinstance(fields, Mapping):  # a tensor would let itself be indexed
        raise TypeError(f"is {type(fields).__name__}, expected a dict")
    for name in ("params", "buffers", "opt_state", "hooks", "extra"):
        if not isinstance(fields[name], Mapping):
            raise TypeError(f"{name}: is {type(fields[name]).__name__}, expected a dict")
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


def _read_manifest(path: Place) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        found = _SEALED.fullmatch(file.read_bytes())
        if found is None or crc32(found[2]) != int(found[1]):
            raise CheckpointError(f"{file}: is damaged (checksum differs), or not a manifest of fntrain")
        manifest = json.loads(found[2])
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; not a complete checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "fntrain":
        raise CheckpointError(f"{file}: not a manifest of fntrain")
    try:
        manifest = upgraded(manifest, path)
        _check_manifest(manifest)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: its list of tensors is damaged: {error!r}") from error
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless the lists of files and tensors are possible: nothing read later can go beyond them."""
    part, files, entries = manifest["part"], manifest["files"], manifest["tensors"]
    ends = {}
    for name, about in files.items():
        fine = _FILE.fullmatch(name) and _whole(about["header"], about["crc32"], about["bytes"])
        if not fine or about["header"] > about["bytes"]:
            raise ValueError(f"file {name!r}: {about!r}")
        ends[name] = about["header"]
    if not _whole(part) or not part:
        raise ValueError(f"part: {part!r}")
    for leaf, entry in (*entries.items(), *manifest["whole"].items()):
        shape = entry["shape"]
        if type(shape) is not list or len(shape) > 64 or not _whole(*shape) or type(entry["name"]) is not str:
            raise ValueError(f"{leaf!r}: {entry!r}")
        if nbytes(entry["dtype"], [max(1, size) for size in shape]) >= 1 << 63:  # torch can't, even if another is 0
            raise ValueError(f"{leaf!r}: {entry!r}")
    for leaf, entry in entries.items():
        sums, size = entry["crc32"], nbytes(entry["dtype"], entry["shape"])
        if type(sums) is not list or not _whole(*sums) or len(sums) != max(1, -(-size // part)):
            raise ValueError(f"{leaf!r}: {entry!r}")
        ends[entry["file"]] += size
    _check_whole(manifest)
    for name, about in files.items():
        if ends[name] != about["bytes"]:
            raise ValueError(f"file {name!r}: its tensors end at {ends[name]}, not at {about['bytes']}")


def _check_whole(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless the parts of tensors that were split make them up, row after row."""
    parts: dict[str, list[tuple[int, int]]] = {leaf: [] for leaf in manifest["whole"]}
    if both := sorted(parts.keys() & manifest["tensors"].keys()):
        raise ValueError(f"{both}: whole and in parts")
    for name, entry in manifest["tensors"].items():
        if "of" in entry:
            whole, shape = manifest["whole"][entry["of"]], entry["shape"]
            alike = shape and shape[1:] == whole["shape"][1:] and entry["dtype"] == whole["dtype"]
            if not alike or not _whole(entry["at"]) or name.rpartition("@")[0] != entry["of"]:
                raise ValueError(f"{name!r}: {entry!r} is no part of {whole!r}")
            parts[entry["of"]].append((entry["at"], shape[0]))
    for leaf, spans in parts.items():
        if manifest["whole"][leaf]["file"] != _place(leaf)[0]:
            raise ValueError(f"{leaf!r}: {manifest['whole'][leaf]!r}")
        at = 0
        for start, number in sorted(spans):
            if start != at:
                raise ValueError(f"{leaf!r}: rows {at} to {start} are missing")
            at += number
        if at != manifest["whole"][leaf]["shape"][0]:
            raise ValueError(f"{leaf!r}: rows from {at} on are missing")


def _whole(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


@attrs.frozen(eq=False)
class _Part:
    """Bytes of a tensor under one checksum."""

    leaf: str
    reader: Reader
    start: int
    length: int
    crc32: int
    view: memoryview | None  # where to put them; None: nowhere, they are only checked
    skip: int = 0  # bytes before those that are to be put there: there may be others, before and after

    def problem(self, verify: Verify) -> CheckpointError | None:
        """Read them in pieces, each checked while it is in the processor's cache; returns what is wrong."""
        cut = self.view is not None and len(self.view) < self.length
        view = memoryview(bytearray(self.length)) if cut else self.view
        found, scratch = 0, bytearray(min(self.reader.piece, self.length) if view is None else 0)
        for at in range(0, self.length, self.reader.piece):
            count = min(self.reader.piece, self.length - at)
            piece = memoryview(scratch)[:count] if view is None else view[at : at + count]
            self.reader.read_into(self.start + at, piece)
            if verify == "full":
                found = crc32(piece, found)
        if verify == "full" and found != self.crc32:
            return CheckpointError(f"{self.reader.path}: {self.leaf} is damaged (checksum differs)")
        if cut and view is not None and self.view is not None:
            self.view[:] = view[self.skip : self.skip + len(self.view)]
        return None


def _read_tensors(
    path: Place,
    manifest: Mapping[str, Any],
    listed: Mapping[str, Mapping[str, Any]],
    verify: Verify,
    *,
    into: Mapping[str, Tensor] | None = None,
    keep: bool = True,
    likes: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Read the listed tensors, on several threads; without `keep` check them only, and return them without values.

    Of those that are to be split like others, this rank's rows alone.
    """
    rows = {leaf: tree.rows(like) for leaf, like in likes.items()}
    tensors: dict[str, Tensor] = {}
    parts: list[_Part] = []
    into = into or {}
    try:
        with ExitStack() as stack:
            everything = listed is manifest["tensors"]
            files = manifest["files"] if everything else {entry["file"] for entry in listed.values()}
            readers = {file: stack.enter_context(Reader(path / file)) for file in files}
            ends = {file: _check_head(readers[file], manifest["files"][file]) for file in files}
            for leaf, entry in manifest["tensors"].items():
                if entry["file"] not in ends:
                    continue
                start, length = ends[entry["file"]], nbytes(entry["dtype"], entry["shape"])
                ends[entry["file"]] += length
                if leaf in listed:
                    name = entry.get("of", leaf)
                    about = manifest["whole"].get(name, entry)
                    row = nbytes(entry["dtype"], entry["shape"][1:])
                    first, number = rows.get(name, (0, None))
                    if name not in tensors:
                        kept = about if number is None else {**about, "shape": [number, *about["shape"][1:]]}
                        tensors[name] = _empty(kept, into.get(name), keep)
                    view = tree.to_bytes(tensors[name]) if keep else None
                    offset = (entry.get("at", 0) - first) * row  # of what is in the file, in what is wanted of it
                    for index, crc in enumerate(entry["crc32"]):
                        at = index * manifest["part"]
                        count = min(manifest["part"], length - at)
                        part, skip = view, 0
                        if view is not None:
                            begin = offset + at
                            part, skip = view[max(begin, 0) : max(begin + count, 0)], max(-begin, 0)
                        if part is None or len(part) or not count:
                            parts.append(_Part(leaf, readers[entry["file"]], start + at, count, crc, part, skip))
            if keep or verify == "full":
                _read_all(parts, verify)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    entries = {**listed, **manifest["whole"]}
    return {
        leaf: tensor if leaf in rows else _laid_out(path, leaf, entries[leaf], tensor, into.get(leaf))
        for leaf, tensor in tensors.items()
    }


def _check_head(reader: Reader, about: Mapping[str, int]) -> int:
    """Check length and header of a file; returns where its tensors begin."""
    if reader.bytes != about["bytes"]:
        raise CheckpointError(
            f"{reader.path}: has {reader.bytes} bytes, expected {about['bytes']}: truncated or mixed up"
        )
    head = bytearray(about["header"])
    reader.read_into(0, memoryview(head))
    if crc32(head) != about["crc32"]:
        raise CheckpointError(f"{reader.path}: header is damaged (checksum differs)")
    return about["header"]


def _empty(entry: Mapping[str, Any], given: Tensor | None, keep: bool) -> Tensor:
    """The tensor to read to, contiguous on the CPU: the one given, if it is of that kind."""
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]][0]
    here = given is not None and tree.local(given) is given  # of a split one only a part is
    if given is not None and here and (list(given.shape), given.dtype, given.device.type) == (shape, dtype, "cpu"):
        given = given.detach()
        if given.is_contiguous() and not given.is_conj() and not given.is_neg():
            return given
    return torch.empty(shape, dtype=dtype, device="cpu" if keep else "meta")


def _read_all(parts: list[_Part], verify: Verify) -> None:
    """Read all parts, small ones together; raises the first problem."""
    groups: list[list[_Part]] = []
    filled = PART
    for part in parts:
        if filled >= PART:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.length
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    with ThreadPoolExecutor(min(8, cores), thread_name_prefix="fntrain-read") as pool:
        read = [pool.submit(lambda group: [part.problem(verify) for part in group], group) for group in groups]
        try:
            for problem in (problem for group in read for problem in group.result()):
                if problem is not None:
                    raise problem
        finally:
            pool.shutdown(cancel_futures=True)


def _laid_out(path: Place, leaf: str, entry: Mapping[str, Any], tensor: Tensor, given: Tensor | None) -> Tensor:
    """The tensor in the memory given for it, if it has its shape and dtype; otherwise with the strides it had."""
    if given is not None and (given.shape, given.dtype) == (tensor.shape, tensor.dtype):
        with torch.no_grad():
            part, mine = tree.local(given), tree.local(tree.split_like(given, tensor))
            if part.data_ptr() != mine.data_ptr():
                part.copy_(mine)
            return given
    if "stride" not in entry:
        return tensor
    stride = entry["stride"]
    try:
        # Only dense strides are written: empty_like of the meta tensor is the same tensor again.
        dense = torch.empty_like(torch.empty_strided(tensor.shape, stride, device="meta")).stride()
        if list(dense) != stride:
            raise ValueError("not dense")
    except (TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path / entry['file']}: {leaf}: damaged stride {stride!r} in the manifest") from error
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
