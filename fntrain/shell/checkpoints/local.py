"""The store of checkpoints on a local file system.

A checkpoint is written to a directory of another name, and renamed once all of it is on the disk. A lock on a file,
which the system drops when the process that holds it ends, keeps a second process from writing to the directory.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import attrs

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.manifest import MANIFEST
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.reading import check
from fntrain.shell.checkpoints.store import Attempt, Store, as_checkpoint_error, entries, name_of, step_of, turn
from fntrain.shell.checkpoints.tensor_file import created
from fntrain.shell.checkpoints.upgrade import SchemaError
from fntrain.shell.disk import fsync

_LOCK = ".lock"
_log = logging.getLogger("fntrain")


@attrs.define(eq=False)
class _Lock:
    """The lock on a directory, which all users in this process share: flock would refuse a second descriptor."""

    descriptor: int
    users: int = 0
    alone: bool = False


_held: dict[str, _Lock] = {}  # by real path: the directories that this process holds
_guard = threading.Lock()


@attrs.frozen
class LocalStore(Store):
    """A directory of checkpoints on a local file system.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory, LocalStore(Path(directory)).hold():
      ...     sorted(path.name for path in Path(directory).iterdir())
      ['.lock']
    """

    errors: ClassVar[type[Exception]] = OSError
    root: Path

    @contextmanager
    def hold(self, *, alone: bool = False) -> Iterator[None]:
        """Hold the directory against writers in other processes; it is made if it is not there.

        Args:
          alone: against a second one with `alone` in this process, too.
        Raises:
          CheckpointError: it is held by another, was removed while it was held, or can't be written to.
        """
        root, path = self.root, os.path.realpath(self.root)
        with _guard:
            lock = _held.get(path)
            if lock is None:
                lock = _held[path] = _Lock(_locked(root))
            elif not _is_there(root, lock):
                why = "was removed or replaced while this run was writing its checkpoints there"
                raise CheckpointError(f"{root}: {why}")
            elif alone and lock.alone:
                raise CheckpointError(f"{root}: two hooks of this run save there; give each a directory of its own")
            lock.users += 1
            lock.alone |= alone
        try:
            yield
        finally:
            with _guard:
                lock.users -= 1
                lock.alone &= not alone
                if not lock.users and _held.get(path) is lock:
                    del _held[path]
                    os.close(lock.descriptor)

    @contextmanager
    def attempt(self, step: int, *, shared: bool) -> Iterator[Attempt]:
        """Hold the directory, and make a hidden one in it."""
        del shared
        partial = self.root / f".partial-{name_of(step)}-{uuid.uuid4().hex[:8]}"
        with self.hold():
            try:
                partial.mkdir()
                yield Attempt(partial.name, "")
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # it is gone already if it was published

    def publish(self, attempt: Attempt, step: int, manifest: bytes) -> None:
        """Write the manifest and rename the directory, each step on the disk before the next is begun."""
        partial, target = self.root / attempt.directory, self.root / name_of(step)
        with created(partial / MANIFEST) as out:
            out.write(manifest)
        fsync(partial)
        old = target.with_name(target.name + ".old")
        # After a rename a machine that loses power may come back with the old directory, until the parent is on the
        # disk: https://lwn.net/Articles/457667/
        with turn():
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)  # it is still found, as step_X.old, should the process end here
            partial.rename(target)
            fsync(self.root)
            shutil.rmtree(old, ignore_errors=True)

    def remove(self, path: AnyPath) -> None:
        """Delete a checkpoint, and step_X.old if a killed process has left it there.

        Each is renamed first: a process that is killed while it deletes leaves no half checkpoint under that name.
        """
        for one in (self.root / f"{name_of(step_of(path))}.old", self.root / path.name):
            with as_checkpoint_error(one, "could not be deleted"):
                if one.exists():
                    doomed = one.with_name(f".partial-deleted-{uuid.uuid4().hex[:8]}")
                    one.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)

    def set_aside(self, path: AnyPath, why: str) -> None:
        """Rename a checkpoint, so that it is no longer listed as one."""
        with as_checkpoint_error(path, "could not be put aside"):
            aside = (self.root / path.name).rename(self.root / f"{why}_{path.name}-{uuid.uuid4().hex[:8]}")
        _log.warning("put a %s checkpoint aside as %s", why, aside)

    def clean(self) -> None:
        """Delete hidden directories; of step_X and step_X.old keep the first, unless it is damaged."""
        with as_checkpoint_error(self.root, "can't be put in order"):
            for leftover in self.root.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for old in (path for path in entries(self) if path.name.endswith(".old")):
                self._settle(self.root / old.name)

    def _settle(self, old: Path) -> None:
        """A process was killed in `publish`: keep the newer of the two checkpoints, the older if that is damaged."""
        published = old.with_name(old.name.removesuffix(".old"))
        try:
            check(published)
        except SchemaError:
            raise
        except CheckpointError:
            if published.exists():
                self.set_aside(published, "damaged")
            old.rename(published)
        else:
            shutil.rmtree(old, ignore_errors=True)


def _locked(root: Path) -> int:
    """Lock the directory's lock file; returns its descriptor."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"{root}: can't be written to: {error}; give another directory") from error
    try:
        # Not lockf: a process loses that lock when it closes any descriptor of the file, even one of a library's.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            why = f"another process writes its checkpoints there ({holder}); end it, or give another directory"
            raise CheckpointError(f"{root}: {why}") from error
        raise CheckpointError(f"{root}: can't be locked: {error}; give another directory") from error
    return descriptor


def _is_there(root: Path, lock: _Lock) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat((root / _LOCK).stat(), os.fstat(lock.descriptor))
    return False


def _forget() -> None:
    """In a forked child: the lock must end with the process that took it, and not with its data workers."""
    global _guard
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_forget)
