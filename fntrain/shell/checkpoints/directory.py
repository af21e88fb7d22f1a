"""A directory of checkpoints: who may write there, what is in view, how one comes into view and goes out of it.

On a local file system a checkpoint is written aside and renamed into view. On an object store there is no renaming:
what is in view is what has a manifest, and that is written last. A lock, which dies with the process that holds it,
keeps a second process from writing to a local directory; object stores have none.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs

from fntrain.core.errors import CheckpointError
from fntrain.core.ranks import Ranks
from fntrain.shell.checkpoints.manifest import (
    MANIFEST,
    Contents,
    Written,
    check_files,
    write_files,
    write_manifest,
    write_tensors,
)
from fntrain.shell.checkpoints.remote import Place, RemotePath
from fntrain.shell.checkpoints.tensor_file import Reader, fsync
from fntrain.shell.checkpoints.upgrade import SchemaError

_NAME = re.compile(r"step_(\d{8,19})(\.old)?")
_LOCK = ".lock"
T = TypeVar("T")
_log = logging.getLogger("fntrain")


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint.

    Example:
      >>> name_of(500)
      'step_00000500'
    """
    return f"step_{step:08d}"


def step_of(path: Place) -> int:
    """Return the step in a checkpoint's name.

    Example:
      >>> step_of(Path("runs/step_00000500"))
      500
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: got {path.name!r}, expected step_ and at least 8 digits")
    return int(match[1])


@contextmanager
def told(path: Place, what: str) -> Iterator[None]:
    """Raise an error of the file system, or of the network, as a CheckpointError that says of which path.

    Example:
      >>> with told(Path("runs"), "can't be listed"):
      ...     raise OSError("Input/output error")
      Traceback (most recent call last):
      fntrain.CheckpointError: runs: can't be listed: Input/output error; mend that, or give another directory
    """
    kinds = Exception if isinstance(path, RemotePath) else OSError  # a network's errors are its library's own
    try:
        yield
    except CheckpointError:
        raise
    except kinds as error:
        raise CheckpointError(f"{path}: {what}: {error}; mend that, or give another directory") from error


def candidates(root: Place) -> list[Place]:
    """List what may be a checkpoint, newest step first; `step_X.old`, left by a kill between two renames, after step_X.

    Example:
      >>> candidates(Path("no/such/directory"))
      []
    """
    with told(root, "can't be listed"):
        listed: list[Place] = list(root.iterdir()) if root.is_dir() else []
        found = [path for path in listed if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def readable(root: Place) -> list[Place]:
    """List what should be a checkpoint, newest first: on an object store only what has a manifest.

    There an upload that never ended has none, nor has one put aside; on a disk it is damage to have none.

    Example:
      >>> readable(Path("no/such/directory"))
      []
    """
    return [path for path in candidates(root) if not isinstance(path, RemotePath) or (path / MANIFEST).is_file()]


def complete(root: Place) -> list[Place]:
    """List the checkpoints in view, newest first: those with a manifest, one for each step.

    Example:
      >>> complete(Path("no/such/directory"))
      []
    """
    steps: dict[int, Place] = {}
    for path in candidates(root):
        with told(path, "can't be looked into"):
            if (path / MANIFEST).is_file():
                steps.setdefault(step_of(path), path)
    return list(steps.values())


@attrs.define(eq=False)
class _Lock:
    descriptor: int
    users: int = 0
    alone: bool = False


_held: dict[str, _Lock] = {}  # by real path: what this process holds
_guard = threading.Lock()
_turn = threading.RLock()  # of the threads that change what is in view: a save by hand comes beside a hook's


@contextmanager
def writing(root: Place, *, alone: bool = False) -> Iterator[None]:
    """Hold a directory against writers in other processes; made if it is not there.

    Args:
      root: the directory; on an object store nothing is held.
      alone: against a second one with `alone` in this process, too.
    Raises:
      CheckpointError: it is held by another, was removed while it was held, or can't be written to.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory, writing(Path(directory)):
      ...     pass
    """
    if isinstance(root, RemotePath):
        yield
        return
    path = os.path.realpath(root)
    with _guard:
        lock = _held.get(path)
        if lock is None:
            lock = _held[path] = _Lock(_locked(root))
        elif not _is_there(root, lock):
            raise CheckpointError(f"{root}: was removed or replaced while this run was writing its checkpoints there")
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


def _locked(root: Path) -> int:
    """Open and lock the file of the lock; returns its descriptor."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"{root}: can't be written to: {error}; give another directory") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(
                f"{root}: another process writes its checkpoints there ({holder}); end it, or give another directory"
            ) from error
        raise CheckpointError(f"{root}: can't be locked: {error}; give another directory") from error
    return descriptor


def _is_there(root: Path, lock: _Lock) -> bool:
    try:
        return os.path.samestat((root / _LOCK).stat(), os.fstat(lock.descriptor))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """In a forked child: a lock must die with the process that took it, not with its data workers."""
    global _guard, _turn
    for lock in _held.values():
        os.close(lock.descriptor)
    _held.clear()
    _guard, _turn = threading.Lock(), threading.RLock()


os.register_at_fork(after_in_child=_forget)


def commit(root: Place, contents: Contents, data: Iterable[memoryview]) -> Place:
    """Write a checkpoint and bring it into view once all of it is on the disk; returns its path.

    Of ranks that each hold a part each writes its own, and the first brings it into view when all have.

    Raises:
      CheckpointError: it could not be written; what was in view still is.
    """
    if contents.ranks.world_size > 1:
        return _commit_together(root, contents, data)
    target = root / name_of(contents.step)
    # What a network raises is its library's own: fsspec does not make all of it OSErrors.
    kinds = Exception if isinstance(root, RemotePath) else OSError
    try:
        with writing(root):
            if isinstance(target, RemotePath):
                _upload(target, contents, data)
            else:
                _write_aside(target, contents, data)
    except CheckpointError:
        raise
    except kinds as error:
        raise CheckpointError(
            f"{target}: could not be written: {error}; earlier checkpoints are as they were"
        ) from error
    return target


def _write_aside(target: Path, contents: Contents, data: Iterable[memoryview]) -> None:
    partial = target.with_name(f".partial-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir()
        write_files(contents, data, partial)
        fsync(partial)
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was published


def _publish(partial: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    with _turn:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)  # still found, as step_X.old, should the process end here
        partial.rename(target)
        fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _commit_together(root: Place, contents: Contents, data: Iterable[memoryview]) -> Place:
    """Every step is agreed, so that one rank's trouble is all ranks' error and nobody waits for ever."""
    target, ranks = root / name_of(contents.step), contents.ranks
    first = ranks.rank == 0
    remote = isinstance(root, RemotePath)
    kinds = Exception if remote else OSError
    token = ranks.gather(uuid.uuid4().hex[:8])[0]  # of this attempt: nothing of another one can get in
    partial = target if remote else root / f".partial-{target.name}-{token}"
    mark = f"-rank{ranks.rank}-{token}" if remote else f"-rank{ranks.rank}"

    def publish(written: list[Written]) -> None:
        for name, about in (file for one in written for file in one.files.items()):
            with Reader(partial / name) as reader:
                if reader.bytes != about["bytes"]:
                    raise CheckpointError(f"{partial / name}: is not what its rank has written")
        if isinstance(target, RemotePath):
            former = [path for path in target.iterdir() if token not in path.name and path.name != MANIFEST]
            write_manifest(contents, written, target)
            for path in former:
                path.remove()
        else:
            assert isinstance(partial, Path)
            write_manifest(contents, written, partial)
            fsync(partial)
            _publish(partial, target)

    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(writing(root))
            if isinstance(partial, Path):
                partial.mkdir()
                stack.callback(shutil.rmtree, partial, ignore_errors=True)  # gone already if it was published

        try:
            agreed(ranks, begin if first else nothing, kinds)
            written = agreed(ranks, lambda: write_tensors(contents, data, partial, mark), kinds)
            agreed(ranks, (lambda: publish(written)) if first else nothing, kinds)
        except CheckpointError as error:
            raise CheckpointError(
                f"{target}: could not be written: {error}; earlier checkpoints are as they were"
            ) from error
    return target


def agreed(ranks: Ranks, work: Callable[[], T], kinds: Any = CheckpointError) -> list[T]:
    """Return what some work gave on each rank; what went wrong on one is raised on all, so that nobody waits for it.

    Args:
      ranks: all of them must call this.
      work: with one rank it just runs.
      kinds: of errors that are told; others are raised on their rank alone.
    Example:
      >>> agreed(Ranks(), lambda: 3)
      [3]
    """
    if ranks.world_size == 1:
        return [work()]
    done, problem, cause = None, None, None
    try:
        done = work()
    except (CheckpointError, kinds) as error:
        problem, cause = str(error), error
    everyone = ranks.gather((done, problem))
    if problems := [f"rank {rank}: {why}" for rank, (_, why) in enumerate(everyone) if why is not None]:
        alike = problem is not None and all(why == problem for _, why in everyone)
        raise CheckpointError(problem if alike else "; ".join(problems)) from cause
    return [done for done, _ in everyone]


def nothing() -> None:
    """What a rank does while another works."""


def _upload(target: RemotePath, contents: Contents, data: Iterable[memoryview]) -> None:
    """Write the files, the manifest last; files of a former checkpoint of this step keep their names until then."""
    with _turn:
        former = list(target.iterdir()) if target.is_dir() else []
        write_files(contents, data, target, mark=f"-{uuid.uuid4().hex[:8]}" if former else "")
        for path in former:
            if path.name != MANIFEST:
                path.remove()


def remove(path: Place) -> None:
    """Take a checkpoint out of view at once, then delete it, with what a kill may have left of a former one."""
    if isinstance(path, RemotePath):
        if (path / MANIFEST).exists():
            (path / MANIFEST).remove()
        path.remove()
        return
    for one in (path.with_name(name_of(step_of(path)) + ".old"), path):
        with told(one, "could not be deleted"):
            if one.exists():
                doomed = path.with_name(f".partial-deleted-{uuid.uuid4().hex[:8]}")
                one.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def retain(root: Place, newest: int, keep: Callable[[list[int]], Collection[int]], left: Collection[int] = ()) -> None:
    """Delete the checkpoints that are not to be kept; the newest, which is whole, always is.

    Args:
      root: the directory.
      newest: the step just saved.
      keep: the steps to keep of those up to it, newest first.
      left: later steps, of a branch that the run has left by a roll-back. Others that are later were saved by hand.
    """
    with writing(root), _turn:
        found = {step_of(path): path for path in complete(root)}
        steps = [step for step in found if step <= newest]
        doomed = {*steps, *left} - {newest, *keep(steps)}
        for step in sorted(doomed.intersection(found), reverse=True):
            remove(found[step])


def clean(root: Place) -> None:
    """Remove what dead writers left, and put back what they had moved; only while the directory is held."""
    if isinstance(root, RemotePath):
        for path in candidates(root):
            if isinstance(path, RemotePath) and not any(one.name.endswith(MANIFEST) for one in path.iterdir()):
                path.remove()
        return
    with told(root, "can't be put in order"):
        for leftover in root.glob(".partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for old in (path for path in candidates(root) if path.name.endswith(".old")):
            assert isinstance(old, Path)
            published = old.with_name(old.name.removesuffix(".old"))
            try:
                check_files(published)
            except SchemaError:
                raise
            except CheckpointError:
                if published.exists():
                    set_aside(published, "damaged")
                old.rename(published)
            else:
                shutil.rmtree(old, ignore_errors=True)


def set_aside(path: Place, why: str) -> None:
    """Put a checkpoint out of view without deleting it, and say so; `why` becomes part of its name."""
    if isinstance(path, RemotePath):
        aside: Place = path / f"{why}-{MANIFEST}"
        aside.write_bytes((path / MANIFEST).read_bytes())
        (path / MANIFEST).remove()
    else:
        with told(path, "could not be put aside"):
            aside = path.rename(path.with_name(f"{why}_{path.name}-{uuid.uuid4().hex[:8]}"))
    _log.warning("put a %s checkpoint aside as %s", why, aside)
