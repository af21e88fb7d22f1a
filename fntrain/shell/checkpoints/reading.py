"""Reads checkpoints and checks every byte: each checksum is computed while its bytes are in the processor's cache."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Literal

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import TrainState
from fntrain.shell.checkpoints.manifest import (
    MANIFEST,
    MODEL,
    TRAIN,
    File,
    Manifest,
    Stored,
    file_of,
    read_manifest,
)
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.structure import state_of
from fntrain.shell.checkpoints.tensor_file import DTYPES, PART, Reader, crc32, nbytes, opened

Verify = Literal["full", "structure"]


@attrs.frozen(kw_only=True)
class Wanted:
    """What to read, and where to put it.

    Args:
      verify: "full" checks every byte; "structure" all but the values of the tensors.
      values: whether to return values; without them tensors are checked, and come on the device "meta".
      into: memory to use, by dotted path: written over where name, shape and dtype are right.
      split: tensors that are split over ranks, by dotted path: of their leaves this rank reads its rows alone, and
        checks them with what shares a checksum with them.
      accept: asked, if it is there, before anything is written over, when all has been found intact: whether to go on.
        Then only the tensors that are read straight into memory given have no values yet.
    """

    verify: Verify = "full"
    values: bool = True
    into: Mapping[str, Tensor] = attrs.field(factory=dict)
    split: Mapping[str, Tensor] = attrs.field(factory=dict)
    accept: Callable[[dict[str, Tensor]], bool] | None = None

    def given(self, stored: Stored) -> Tensor | None:
        """The memory given for a tensor, if the file can be read straight into it."""
        given = self.into.get(stored.leaf)
        return given.detach() if given is not None and _is_plain(given) and _is_like(given, stored) else None

    def memory(self, stored: Stored) -> Tensor:
        """New memory for a tensor, on the CPU."""
        shape = stored.shape
        if stored.leaf in self.split:
            shape = (tree.rows(self.split[stored.leaf])[1], *shape[1:])
        return _empty(shape, stored.dtype, "cpu" if self.values else "meta")


def check_verify(verify: Verify) -> None:
    """Raise ValueError for another word, before anything is read or written over."""
    if verify not in ("full", "structure"):
        raise ValueError(f'verify: got {verify!r}, expected "full" or "structure"')


def read_state(
    path: AnyPath,
    *,
    verify: Verify = "full",
    into: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    split: Mapping[str, Tensor] | None = None,
    accept: Callable[[TrainState], bool] | None = None,
) -> TrainState:
    """Read one checkpoint and check it.

    Args:
      path: of the checkpoint.
      verify: as of `Wanted`.
      into: as of `Wanted`.
      device: of the parameters. Optimizer state and the like that was on a device when it was saved goes there; what
        was on the CPU stays there. Parameters and buffers stay there too, for the caller copies them to where they
        belong: they are never twice on the device.
      split: parameters that are split over ranks, by name: of them, and of what the optimizer keeps in their shape,
        this rank's rows alone are read.
      accept: asked before anything of `into` is written over, when all has been found intact: whether to go on. It gets
        the state; in the tensors of `into` there are no values of the checkpoint then, nor in what is returned if not.
    Raises:
      CheckpointError: it is damaged; file and leaf are named.
    """
    manifest = read_manifest(path)
    like = dict(_split_leaves(manifest, split or {}))
    state = partial(state_of, manifest.structure, path=path, file=path / MANIFEST)
    ask = (lambda tensors: accept(state(tensors))) if accept else None
    tensors = _read(path, manifest, Wanted(verify=verify, into=into or {}, split=like, accept=ask))
    if device is not None and device.type != "cpu":
        for leaf, stored in manifest.tensors.items():
            if stored.device is not None and file_of(leaf) == TRAIN:
                tensors[leaf] = tensors[leaf].to(device)
    return state(tensors | {leaf: tree.relocated(split_tensor, tensors[leaf]) for leaf, split_tensor in like.items()})


def check(path: AnyPath, *, verify: Verify = "full") -> TrainState:
    """Raise CheckpointError unless one checkpoint is whole; takes no memory for its tensors.

    Returns:
      the state, with tensors on the device "meta", that have no values.
    """
    manifest = read_manifest(path)
    tensors = _read(path, manifest, Wanted(verify=verify, values=False))
    return state_of(manifest.structure, tensors, path=path, file=path / MANIFEST)


def read_model(path: AnyPath) -> dict[str, Tensor]:
    """Read parameters and buffers of one checkpoint by their names in the module, every byte of their file checked."""
    manifest = read_manifest(path)
    model = {leaf: stored for leaf, stored in manifest.tensors.items() if file_of(leaf) == MODEL}
    names = {part.file for stored in model.values() for part in stored.parts}
    files = {name: file for name, file in manifest.files.items() if name in names}
    tensors = _read(path, attrs.evolve(manifest, tensors=model, files=files), Wanted())
    return {model[leaf].name: tensor for leaf, tensor in tensors.items()}


def _split_leaves(manifest: Manifest, split: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Leaves of a checkpoint that are split as a parameter is, and that parameter."""
    for leaf, stored in manifest.tensors.items():
        field, _, name = leaf.partition(".")
        while field == "opt_state" and name not in split and name:  # optimizer state lies below the parameter's name
            name = name.rpartition(".")[0]
        fits = field in ("params", "opt_state") and name in split and stored.stride is None
        if fits and stored.shape == tuple(split[name].shape):
            yield leaf, split[name]


def _read(path: AnyPath, manifest: Manifest, wanted: Wanted) -> dict[str, Tensor]:
    """Read the tensors of a manifest by leaf, on several threads."""
    try:
        with ExitStack() as stack:
            readers = {name: stack.enter_context(opened(path / name)) for name in manifest.files}
            for name, file in manifest.files.items():
                _check_head(readers[name], file)
            given = {leaf: wanted.given(stored) for leaf, stored in manifest.tensors.items()}
            tensors = {leaf: wanted.memory(manifest.tensors[leaf]) if at is None else at for leaf, at in given.items()}
            late = [leaf for leaf, at in given.items() if at is not None and wanted.accept]
            first = {**tensors, **dict.fromkeys(late)} if wanted.values else dict.fromkeys(tensors)
            _read_all(_pieces(manifest, first, readers, wanted), wanted.verify)
            if wanted.accept:
                if not wanted.accept(tensors):
                    return tensors
                _read_all(_pieces(manifest, {leaf: tensors[leaf] for leaf in late}, readers, wanted), wanted.verify)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    return {
        leaf: tensor if leaf in wanted.split else _laid_out(path, manifest.tensors[leaf], tensor, wanted.into.get(leaf))
        for leaf, tensor in tensors.items()
    }


def _check_head(reader: Reader, file: File) -> None:
    """Check length and header of a file."""
    if reader.bytes != file.bytes:
        raise CheckpointError(f"{reader.path}: has {reader.bytes} bytes, expected {file.bytes}: truncated or mixed up")
    head = bytearray(file.header)
    reader.read_into(0, memoryview(head))
    if crc32(head) != file.crc32:
        raise CheckpointError(f"{reader.path}: header is damaged (checksum differs)")


def _empty(shape: tuple[int, ...], dtype: str, device: str) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype][0], device=device)


def _is_plain(tensor: Tensor) -> bool:
    """Whether all bytes of a tensor lie on the CPU in order, so that they can be read straight into it."""
    whole = tree.local(tensor) is tensor  # of a split one only a part is here
    return (
        whole and tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
    )


def _is_like(tensor: Tensor, stored: Stored) -> bool:
    return (tuple(tensor.shape), tensor.dtype) == (stored.shape, DTYPES[stored.dtype][0])


@attrs.frozen(eq=False)
class _Piece:
    """Bytes under one checksum, and where to put them.

    Args:
      key: of the tensor's part, for messages.
      reader: of the file.
      start: where they begin in the file.
      length: number of bytes.
      crc32: what it should be.
      view: where to put them, or those of them that are wanted; None if they are only checked.
      skip: number of bytes before those that are wanted.
    """

    key: str
    reader: Reader
    start: int
    length: int
    crc32: int
    view: memoryview | None
    skip: int

    def problem(self, verify: Verify) -> CheckpointError | None:
        """Read the bytes and check them; returns what is wrong."""
        cut = self.view is not None and len(self.view) < self.length
        view = memoryview(bytearray(self.length)) if cut else self.view
        if self._read(view, verify) != self.crc32 and verify == "full":
            return CheckpointError(f"{self.reader.path}: {self.key} is damaged (checksum differs)")
        if cut and view is not None and self.view is not None:
            self.view[:] = view[self.skip : self.skip + len(self.view)]
        return None

    def _read(self, view: memoryview | None, verify: Verify) -> int:
        """Read a little at a time, so that the checksum finds it in the cache; returns the checksum."""
        found, step = 0, self.reader.piece
        scratch = memoryview(bytearray(min(step, self.length) if view is None else 0))
        for at in range(0, self.length, step):
            count = min(step, self.length - at)
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
        first = tree.rows(wanted.split[leaf])[0] if leaf in wanted.split else 0
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
    groups: list[list[_Piece]] = []
    filled = PART
    for piece in pieces:
        if filled >= PART:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.length
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    with ThreadPoolExecutor(min(8, cores), thread_name_prefix="fntrain-read") as pool:
        read = [pool.submit(lambda group: [piece.problem(verify) for piece in group], group) for group in groups]
        try:
            for problem in (problem for group in read for problem in group.result()):
                if problem is not None:
                    raise problem
        finally:
            pool.shutdown(cancel_futures=True)


def _laid_out(path: AnyPath, stored: Stored, tensor: Tensor, given: Tensor | None) -> Tensor:
    """The tensor in the memory given for it, if it has its shape and dtype; otherwise with the strides it had."""
    if given is not None and (given.shape, given.dtype) == (tensor.shape, tensor.dtype):
        with torch.no_grad():
            part, mine = tree.local(given), tree.local(tree.split_like(given, tensor))
            if part.data_ptr() != mine.data_ptr():
                part.copy_(mine)
            return given
    if stored.stride is None:
        return tensor
    try:
        # Only dense strides are written: empty_like of the meta tensor has the same strides again.
        dense = torch.empty_like(torch.empty_strided(tensor.shape, stored.stride, device="meta")).stride()
        if tuple(dense) != stored.stride:
            raise ValueError("not dense")
    except (TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path / stored.parts[0].file}: {stored.leaf}: damaged stride {stored.stride!r} in the manifest"
        ) from error
    return torch.empty_strided(tensor.shape, stored.stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
