"""safetensors files, written straight from memory and read straight into it, and checksums of their bytes.

The library safetensors is not used here: its writer copies every tensor and does not fsync, and its reader maps the
file, so a disk error would kill the process by a signal instead of raising an exception. The format: eight bytes with
the length of a JSON header, the header, the tensors.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.paths import AnyPath, RemotePath

Buffer = bytes | bytearray | memoryview
# torch's name -> dtype, and the format's name for it. Other dtypes can't be saved.
DTYPES = {
    str(dtype).removeprefix("torch."): (dtype, code)
    for dtype, code in {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
        torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
        torch.float8_e8m0fnu: "F8_E8M0",
        torch.float4_e2m1fn_x2: "F4",
        torch.complex64: "C64",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint64: "U64",
        torch.uint32: "U32",
        torch.uint16: "U16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }.items()
}
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
    return [crc32(data[at : at + PART]) for at in range(0, data.nbytes, PART)] or [0]


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
    count = DTYPES[dtype][0].itemsize
    for size in shape:
        count *= size
    return count


class Writer:
    """Writes one local file, which is on the disk (fsync) when the context is left."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.written = 0
        self.file = self._created()

    def __enter__(self) -> "Writer":
        return self

    def write(self, *data: Buffer) -> None:
        """Write all of it, in order; nothing is copied."""
        for group in grouped(_pieces(data), _WRITE):
            begin = self.written
            while group:
                count = self._write_some(group)
                self.written += count
                while group and count >= group[0].nbytes:
                    count -= group.pop(0).nbytes
                if group:
                    group[0] = group[0][count:]
            self._flush_soon(begin)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def _created(self) -> Any:
        return Path(self.path).open("wb", buffering=0)

    def _write_some(self, group: list[memoryview]) -> int:
        return os.writev(self.file.fileno(), group)

    def _flush_soon(self, begin: int) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            # The kernel begins to write to the disk now, while we go on; otherwise it would begin with the fsync.
            os.posix_fadvise(self.file.fileno(), begin, self.written - begin, os.POSIX_FADV_DONTNEED)


class RemoteWriter(Writer):
    """Writes one file of another file system; on an object store it exists only once the context is left."""

    path: RemotePath

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.path.finish(self.file, whole=kind is None)

    def _created(self) -> Any:
        return self.path.create()

    def _write_some(self, group: list[memoryview]) -> int:
        return int(self.file.write(group[0]))

    def _flush_soon(self, begin: int) -> None:
        """The file system sends blocks by itself."""


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


def grouped(views: Iterable[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Gather bytes into groups of at least this size but the last, and of few enough for one system call.

    Example:
      >>> [len(group) for group in grouped([memoryview(b"abc")] * 5, 6)]
      [2, 2, 1]
    """
    group: list[memoryview] = []
    filled = 0
    for view in views:
        group.append(view)
        filled += view.nbytes
        if filled >= size or len(group) == 512:
            yield group
            group, filled = [], 0
    if group:
        yield group


def _pieces(data: Iterable[Buffer]) -> Iterator[memoryview]:
    for one in data:
        view = memoryview(one)
        for at in range(0, view.nbytes, _WRITE):
            yield view[at : at + _WRITE]


class Reader:
    """Reads one local file, from several threads.

    Raises:
      OSError: it can't be opened.
    """

    piece = 1 << 20  # bytes to read at once: they stay in the processor's cache while their checksum is computed

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.bytes = self._opened()

    def __enter__(self) -> "Reader":
        return self

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
        return os.preadv(self.descriptor, [view], start)


class RemoteReader(Reader):
    """Reads one file of another file system, from several threads."""

    path: RemotePath
    piece = PART  # each is a request

    def __exit__(self, *_: object) -> None:
        """Nothing is open between requests."""

    def _opened(self) -> int:
        return self.path.size()

    def _read_some(self, start: int, view: memoryview) -> int:
        return self.path.read_into(start, view)


def opened(path: AnyPath) -> Reader:
    """Open a file and return what reads it.

    Example:
      >>> opened(Path("no/such/file"))
      Traceback (most recent call last):
      FileNotFoundError: [Errno 2] No such file or directory: 'no/such/file'
    """
    return RemoteReader(path) if isinstance(path, RemotePath) else Reader(path)
