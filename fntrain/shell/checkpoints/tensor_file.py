"""safetensors files, written straight from memory and read straight into it, and checksums of their bytes.

The library safetensors is not used here: its writer copies every tensor and does not fsync, and its reader maps the
file, so a disk error would kill the process by a signal instead of raising an exception. The format: eight bytes with
the length of a JSON header, the header, the tensors.
"""

import errno
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from toolz import mapcat

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.paths import AnyPath, RemotePath

T = TypeVar("T", bound=Any)
Buffer = bytes | bytearray | memoryview
# torch's name -> dtype, and the format's name for it. Other dtypes can't be saved.
DTYPES: dict[str, tuple[torch.dtype, str]] = {name: (getattr(torch, name), code) for name, code in {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}.items()}  # fmt: skip
PART = 1 << 24  # bytes under one checksum: several threads can check one tensor
_WRITE = 1 << 24  # bytes in one system call


def crc32(data: Buffer, value: int = 0) -> int:
    """Return zlib's crc32; computed by ISA-L, seven times faster, where the extra `fast` is installed.

    Example:
      >>> crc32(b"123456789") == 0xCBF43926
      True
    """
    return _crc32()(data, value)


def crc32_parts(data: memoryview) -> list[int]:
    """Return the crc32 of every 16 MiB of some bytes, at least one.

    Example:
      >>> crc32_parts(memoryview(b""))
      [0]
    """
    return [crc32(piece) for piece in _cut(data, PART)] or [0]


def _cut(data: Buffer, size: int) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[at : at + size] for at in range(0, view.nbytes, size))


@cache
def _crc32() -> Callable[[Buffer, int], int]:
    try:
        from isal.isal_zlib import crc32 as fast
    except ImportError:
        return zlib.crc32  # the same number
    known: Callable[[Buffer, int], int] = fast  # has types only where it is installed
    return known


def header(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a file whose tensors (name -> dtype, shape) follow without gaps, in this order.

    Example:
      >>> header({"w": ("float32", [2])}, {"format": "pt"})[8:]
      b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    """
    listed: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + nbytes(dtype, shape)
        if dtype == "float4_e2m1fn_x2":  # two numbers a byte: torch counts the bytes, the format the numbers
            shape = [*shape[:-1], shape[-1] * 2] if shape else [2]
        listed[name] = {"dtype": DTYPES[dtype][1], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return how many bytes a tensor takes; Python's integers do not overflow.

    Example:
      >>> nbytes("bfloat16", [3, 2])
      12
    """
    return math.prod(shape, start=DTYPES[dtype][0].itemsize)


class Writer(AbstractContextManager["Writer"]):
    """Writes one local file, which is on the disk (fsync) when the context is left."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.written = 0
        self.file = self._created()

    def write(self, *data: Buffer) -> None:
        """Write all of it, in order; nothing is copied."""
        for group in grouped(mapcat(partial(_cut, size=_WRITE), data), _WRITE):
            while group:
                count = self._write_some(group)
                self.written += count
                while group and count >= group[0].nbytes:
                    count -= group.pop(0).nbytes
                if group:
                    group[0] = group[0][count:]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def _created(self) -> Any:
        return Path(self.path).open("wb", buffering=0)

    def _write_some(self, group: list[memoryview]) -> int:
        count = os.writev(self.file.fileno(), group)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            # The kernel begins to write to the disk now, while we go on; otherwise it would begin with the fsync.
            os.posix_fadvise(self.file.fileno(), self.written, count, os.POSIX_FADV_DONTNEED)
        return count


class RemoteWriter(Writer):
    """Writes one file of another file system; on an object store it exists only once the context is left."""

    path: RemotePath

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from fsspec.spec import AbstractBufferedFile

        if kind is not None and isinstance(self.file, AbstractBufferedFile):
            # Closing the file, or collecting it while it is open, would complete the upload of a part.
            self.file.closed = True
            self.file.discard()
        else:
            self.file.close()

    def _created(self) -> Any:
        return self.path.fs.open(self.path.url, "wb")

    def _write_some(self, group: list[memoryview]) -> int:
        return int(self.file.write(group[0]))


def created(path: AnyPath) -> Writer:
    """Create a file and return what writes it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory, created(Path(directory, "file")) as out:
      ...     out.write(b"abc", b"d")
      ...     out.written
      4
    """
    return RemoteWriter(path) if isinstance(path, RemotePath) else Writer(path)


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Gather bytes, or what else has `nbytes`, into groups of at least this size but the last.

    A group is of few enough for one system call.

    Example:
      >>> [len(group) for group in grouped([memoryview(b"abc")] * 5, 6)]
      [2, 2, 1]
    """
    group: list[T] = []
    filled = 0
    for item in items:
        group.append(item)
        filled += item.nbytes
        if filled >= size or len(group) == 512:
            yield group
            group, filled = [], 0
    if group:
        yield group


class Reader(AbstractContextManager["Reader"]):
    """Reads one local file, from several threads.

    Raises:
      OSError: it can't be opened.
    """

    piece = 1 << 20  # bytes to read at once: they stay in the processor's cache while their checksum is computed

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.bytes = self._opened()

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill the view with the bytes from `start` on; raises CheckpointError if the file ends before."""
        while view.nbytes:
            count = self._read_some(start, view)
            if not count:
                raise CheckpointError(f"{self.path}: ends at byte {start}: truncated")
            start, view = start + count, view[count:]

    def _opened(self) -> int:
        self.descriptor = os.open(self.path, os.O_RDONLY)
        return os.fstat(self.descriptor).st_size

    def _read_some(self, start: int, view: memoryview) -> int:
        # With the position as an argument: threads that share the descriptor would move each other's.
        return os.preadv(self.descriptor, [view], start)


class RemoteReader(Reader):
    """Reads one file of another file system, from several threads."""

    path: RemotePath
    piece = PART  # each is a request

    def __exit__(self, *_: object) -> None:
        """Nothing is open between requests."""

    def _opened(self) -> int:
        try:
            return int(self.path.fs.size(self.path.url))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path.url) from error

    def _read_some(self, start: int, view: memoryview) -> int:
        data = self.path.fs.cat_file(self.path.url, start=start, end=start + len(view))
        view[: len(data)] = data
        return len(data)


def opened(path: AnyPath) -> Reader:
    """Open a file and return what reads it.

    Example:
      >>> opened(Path("no/such/file"))
      Traceback (most recent call last):
      FileNotFoundError: [Errno 2] No such file or directory: 'no/such/file'
    """
    return RemoteReader(path) if isinstance(path, RemotePath) else Reader(path)
