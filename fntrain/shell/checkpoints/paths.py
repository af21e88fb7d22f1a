"""Paths of checkpoints: local ones, and those of other file systems (s3://, gs://, memory:// ...).

A remote path has the few methods of pathlib that checkpoints need. fsspec, which torch installs, does the work. A
protocol may need a package of its own (s3fs, gcsfs), which the user installs.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen
class RemotePath:
    """A path of fsspec; prints as its URL.

    Example:
      >>> path = RemotePath.of("memory://runs/a")
      >>> path / "b", (path / "b").name, path.exists()
      (RemotePath('memory:///runs/a/b'), 'b', False)
    """

    fs: Any = attrs.field(eq=False)
    url: str

    @classmethod
    def of(cls, url: str) -> "RemotePath":
        """Make one from a URL; raises ImportError, naming the package, if the protocol needs one that is missing."""
        import fsspec  # takes 65 ms, so only those who use it pay for it

        fs, path = fsspec.core.url_to_fs(url)
        return cls(fs, fs.unstrip_protocol(path).rstrip("/"))

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        head = self.url.rpartition("/")[0]
        return self if head.endswith(":/") else RemotePath(self.fs, head)  # a root is its own parent, as in pathlib

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.fs, f"{self.url}/{name}")

    def __fspath__(self) -> str:
        return self.url

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def absolute(self) -> "RemotePath":
        """Return the path itself: a URL does not depend on the current directory."""
        return self

    def exists(self) -> bool:
        self.fs.invalidate_cache()  # another process may have written since
        return bool(self.fs.exists(self.url))

    def is_file(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.isfile(self.url))

    def is_dir(self) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.isdir(self.url))

    def iterdir(self) -> Iterator["RemotePath"]:
        self.fs.invalidate_cache()
        for path in self.fs.ls(self.url, detail=False):
            yield self / path.rstrip("/").rpartition("/")[2]

    def read_bytes(self) -> bytes:
        return bytes(self.fs.cat_file(self.url))

    def write_bytes(self, data: bytes) -> None:
        """Write a whole file in one request: on an object store it exists complete, or not at all."""
        self.fs.pipe_file(self.url, data)

    def remove(self) -> None:
        """Remove a file, or a directory and all in it."""
        self.fs.rm(self.url, recursive=True)


AnyPath = Path | RemotePath


def path_of(path: str | os.PathLike[str]) -> AnyPath:
    """Return a path on the local file system (file:// too) or, for other URLs, on a remote one.

    Example:
      >>> path_of("runs/a"), path_of("memory://runs/a")
      (PosixPath('runs/a'), RemotePath('memory:///runs/a'))
    """
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path).removeprefix("file://")
    return RemotePath.of(text) if "://" in text else Path(text)
