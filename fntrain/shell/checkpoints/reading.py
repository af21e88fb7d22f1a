"""Reads checkpoints and checks every byte, on several threads.

Bytes are read a little at a time, so that their checksum is computed while they are in the processor's cache.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Literal

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import TrainState
from fntrain.shell.checkpoints.contents import state_of
from fntrain.shell.checkpoints.manifest import MODEL, TRAIN, File, Manifest, Stored, file_of, read_manifest
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.tensor_file import DTYPES, PART, Reader, crc32, grouped, nbytes, opened

Verify = Literal["full", "structure"]


def _known(_: object, __: object, verify: str) -> None:
    if verify not in ("full", "structure"):
        raise ValueError(f'verify: got {verify!r}, expected "full" or "structure"')


@attrs.frozen(kw_only=True)
class Wanted:
    """What to read, and where to put it.

    Args:
      verify: "full" checks every byte; "structure" all but the values of the tensors.
      values: whether to return values; without them tensors are checked, and come on the device "meta".
      into: memory to use, by dotted path: written over where name, shape and dtype are right.
      device: of the parameters. Optimizer state and the like that was on a device when it was saved goes there; what
        was on the CPU stays there. Parameters and buffers stay there too, for the caller copies them to where they
        belong: they are never twice on the device.
      split: parameters that are split over ranks, by name: of them, and of what the optimizer keeps in their shape,
        this rank reads its rows alone, and checks them with what shares a checksum with them.
      accept: asked before anything of `into` is written over, when all has been found intact: whether to go on. It gets
        the state; in the tensors of `into` there are no values of the checkpoint then, nor in what is returned if not.
    """

    verify: Verify = attrs.field(default="full", validator=_known)
    values: bool = True
    into: Mapping[str, Tensor] = attrs.field(factory=dict)
    device: torch.device | None = None
    split: Mapping[str, Tensor] = attrs.field(factory=dict)
    accept: Callable[[TrainState], bool] | None = None

    def like(self, stored: Stored) -> Tensor | None:
        """The parameter that a tensor is split over ranks like, if it is."""
        field, _, name = stored.leaf.partition(".")
        # What the optimizer keeps lies below the parameter's name: opt_state.fc.weight.exp_avg.
        while field == "opt_state" and name and name not in self.split:
            name = name.rpartition(".")[0]
        found = self.split.get(name) if field in ("params", "opt_state") and stored.stride is None else None
        return found if found is not None and tuple(found.shape) == stored.shape else None

    def given(self, stored: Stored) -> Tensor | None:
        """The memory given for a tensor, if the file can be read straight into it: on the CPU, in the same order."""
        given = self.into.get(stored.leaf)
        if given is None or (tuple(given.shape), given.dtype) != (stored.shape, DTYPES[stored.dtype][0]):
            return None
        whole = tree.local(given) is given  # of a split one only a part is here
        plain = whole and given.device.type == "cpu" and given.is_contiguous()
        return given.detach() if plain and not (given.is_conj() or given.is_neg()) else None

    def memory(self, stored: Stored) -> Tensor:
        """New memory for a tensor, on the CPU."""
        like = self.like(stored)
        shape = stored.shape if like is None else (tree.rows(like)[1], *stored.shape[1:])
        return torch.empty(shape, dtype=DTYPES[stored.dtype][0], device="cpu" if self.values else "meta")


def copied(into: Tensor, tensor: Tensor) -> Tensor:
    """Copy a tensor that was read, or this rank's rows of it, into memory, unless it was read straight into that."""
    target, source = tree.local(into), tree.local(tree.split_like(into, tensor))
    if target.data_ptr() != source.data_ptr():
        with torch.no_grad():
            target.copy_(source)
    return into


def read_state(path: AnyPath, wanted: Wanted) -> TrainState:
    """Read one checkpoint and check it.

    Raises:
      CheckpointError: it is damaged; file and leaf are named.
    """
    manifest = read_manifest(path)
    return state_of(manifest.structure, _read(path, manifest, wanted), path)


def check(path: AnyPath) -> None:
    """Raise CheckpointError unless every byte of a checkpoint is as it was written; takes no memory for its tensors."""
    read_state(path, Wanted(values=False))


def read_model(path: AnyPath) -> dict[str, Tensor]:
    """Read parameters and buffers of one checkpoint by their names in the module, every byte of their file checked."""
    manifest = read_manifest(path)
    model = {leaf: stored for leaf, stored in manifest.tensors.items() if file_of(leaf) == MODEL}
    names = {part.file for stored in model.values() for part in stored.parts}
    files = {name: file for name, file in manifest.files.items() if name in names}
    tensors = _read(path, attrs.evolve(manifest, tensors=model, files=files), Wanted())
    return {model[leaf].name: tensor for leaf, tensor in tensors.items()}


def _read(path: AnyPath, manifest: Manifest, wanted: Wanted) -> dict[str, Tensor]:
    """Read the tensors of a manifest by leaf, on several threads."""
    try:
        with ExitStack() as stack:
            readers = {name: stack.enter_context(opened(path / name)) for name in manifest.files}
            for name, file in manifest.files.items():
                _check_head(readers[name], file)
            given = {leaf: wanted.given(stored) for leaf, stored in manifest.tensors.items()}
            tensors = {leaf: wanted.memory(manifest.tensors[leaf]) if at is None else at for leaf, at in given.items()}
            # Into memory that was given they are read twice: first only checked, then, if accepted, written over.
            late = [leaf for leaf, at in given.items() if at is not None and wanted.accept]
            first = {**tensors, **dict.fromkeys(late)} if wanted.values else dict.fromkeys(tensors)
            _read_all(_pieces(manifest, first, readers, wanted), wanted.verify)
            if wanted.accept:
                if not wanted.accept(state_of(manifest.structure, tensors, path)):
                    return tensors
                _read_all(_pieces(manifest, {leaf: tensors[leaf] for leaf in late}, readers, wanted), wanted.verify)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    return {leaf: _placed(path, manifest.tensors[leaf], tensor, wanted) for leaf, tensor in tensors.items()}


def _check_head(reader: Reader, file: File) -> None:
    """Check length and header of a file."""
    if reader.bytes != file.bytes:
        raise CheckpointError(f"{reader.path}: has {reader.bytes} bytes, expected {file.bytes}: truncated or mixed up")
    head = bytearray(file.header)
    reader.read_into(0, memoryview(head))
    if crc32(head) != file.crc32:
        raise CheckpointError(f"{reader.path}: header is damaged (checksum differs)")


@attrs.frozen(eq=False)
class _Piece:
    """Bytes under one checksum, and where to put them.

    Args:
      key: of the tensor's part, for messages.
      reader: of the file.
      start: where they begin in the file.
      nbytes: how many they are.
      crc32: what it should be.
      view: where to put them, or those of them that are wanted; None if they are only checked.
      skip: number of bytes before those that are wanted.
    """

    key: str
    reader: Reader
    start: int
    nbytes: int
    crc32: int
    view: memoryview | None
    skip: int

    def read(self, verify: Verify) -> None:
        """Read the bytes; raises CheckpointError if they are damaged."""
        cut = self.view is not None and len(self.view) < self.nbytes
        view = memoryview(bytearray(self.nbytes)) if cut else self.view
        if self._checksum(view, verify) != self.crc32 and verify == "full":
            raise CheckpointError(f"{self.reader.path}: {self.key} is damaged (checksum differs)")
        if cut and view is not None and self.view is not None:
            self.view[:] = view[self.skip : self.skip + len(self.view)]

    def _checksum(self, view: memoryview | None, verify: Verify) -> int:
        """Read the bytes into the view, or nowhere if it is None; returns their checksum."""
        found, step = 0, self.reader.piece
        scratch = memoryview(bytearray(min(step, self.nbytes) if view is None else 0))
        for at in range(0, self.nbytes, step):
            count = min(step, self.nbytes - at)
            some = scratch[:count] if view is None else view[at : at + count]
            self.reader.read_into(self.start + at, some)
            if verify == "full":
                found = crc32(some, found)
        return found


def _pieces(
    manifest: Manifest, tensors: Mapping[str, Tensor | None], readers: Mapping[str, Reader], wanted: Wanted
) -> Iterator[_Piece]:
    """What to read: all, or of a split tensor the pieces in which there are rows of this rank.

    Args:
      manifest: of the checkpoint.
      tensors: where to put them, by leaf; those with None are only checked.
      readers: of the files.
      wanted: which rows there are, and whether values are checked.
    """
    for leaf, tensor in tensors.items():
        if tensor is None and wanted.verify != "full":
            continue
        view = None if tensor is None else tree.to_bytes(tensor)
        stored = manifest.tensors[leaf]
        like = wanted.like(stored)
        first = 0 if like is None else tree.rows(like)[0]
        for part in stored.parts:
            rows, length = part.row - first, stored.bytes_of(part)
            offset = rows * nbytes(stored.dtype, part.shape[1:]) if rows else 0  # of the part, in what is wanted
            for index, crc in enumerate(part.crc32):
                at = index * manifest.piece
                count, begin = min(manifest.piece, length - at), offset + at
                mine = None if view is None else view[max(begin, 0) : max(begin + count, 0)]
                if mine is None or len(mine) or not count:
                    yield _Piece(part.key, readers[part.file], part.start + at, count, crc, mine, max(-begin, 0))


def _read_all(pieces: Iterable[_Piece], verify: Verify) -> None:
    """Read all pieces, small ones together; raises the first problem."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    with ThreadPoolExecutor(min(8, cores), thread_name_prefix="fntrain-read") as pool:
        groups = grouped(pieces, PART)
        read = [pool.submit(_read_group, group, verify) for group in groups]
        try:
            for group in read:
                group.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_group(pieces: Iterable[_Piece], verify: Verify) -> None:
    for piece in pieces:
        piece.read(verify)


def _placed(path: AnyPath, stored: Stored, tensor: Tensor, wanted: Wanted) -> Tensor:
    """The tensor split like its parameter or laid out as it was; optimizer state and the like on its device."""
    like = wanted.like(stored)
    placed = _laid_out(path, stored, tensor, wanted.into.get(stored.leaf)) if like is None else tensor
    if wanted.device is not None and stored.device is not None and file_of(stored.leaf) == TRAIN:
        placed = placed.to(wanted.device)
    return placed if like is None else tree.relocated(like, placed)


def _laid_out(path: AnyPath, stored: Stored, tensor: Tensor, given: Tensor | None) -> Tensor:
    """The tensor in the memory given for it, if it has its shape and dtype; otherwise with the strides it had."""
    if given is not None and (given.shape, given.dtype) == (tensor.shape, tensor.dtype):
        return copied(given, tensor)
    if stored.stride is None:
        return tensor
    try:
        # Only dense strides are written: empty_like of the meta tensor has the same strides again.
        dense = torch.empty_like(torch.empty_strided(tensor.shape, stored.stride, device="meta")).stride()
        if tuple(dense) != stored.stride:
            raise ValueError("not dense")
    except (TypeError, RuntimeError, ValueError) as error:
        where = f"{path / stored.parts[0].file}: {stored.leaf}"
        raise CheckpointError(f"{where}: damaged stride {stored.stride!r} in the manifest") from error
    return torch.empty_strided(tensor.shape, stored.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
