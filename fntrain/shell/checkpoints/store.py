"""A store: one directory of checkpoints, and what can be done there. local.py and objects.py have the two kinds."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import attrs

from fntrain.core.errors import CheckpointError
from fntrain.core.ranks import Ranks
from fntrain.shell.checkpoints.manifest import MANIFEST
from fntrain.shell.checkpoints.paths import AnyPath

_NAME = re.compile(r"step_(\d{8,19})(\.old)?")
_turn = threading.RLock()
T = TypeVar("T")


@attrs.frozen
class Attempt:
    """Where the files of a checkpoint are written, and what their names have in them, until all are there."""

    directory: str
    mark: str


class Store(Protocol):
    """One directory of checkpoints; what its methods do here holds unless a store says otherwise."""

    @property
    def root(self) -> AnyPath:
        """The directory."""

    @property
    def errors(self) -> type[Exception]:
        """What its file system raises."""

    def hold(self, *, alone: bool = False) -> AbstractContextManager[None]:
        """Hold the directory against other writers, where there are locks; with `alone` against other hooks too."""
        del alone
        return nullcontext()

    def attempt(self, step: int, *, shared: bool) -> AbstractContextManager[Attempt]:
        """Make room for the files of a checkpoint; at the end remove what is no longer needed.

        Args:
          step: of the checkpoint.
          shared: whether other ranks write files too.
        """

    def publish(self, attempt: Attempt, step: int, manifest: bytes) -> None:
        """Write the manifest and make the checkpoint visible, whole: all its other files are on the disk."""

    def claimed(self) -> list[AnyPath]:
        """What should be a whole checkpoint, newest first; if it is not, it is damaged."""
        return entries(self)

    def remove(self, path: AnyPath) -> None:
        """Make a checkpoint invisible at once, then delete it."""

    def set_aside(self, path: AnyPath, why: str) -> None:
        """Make a checkpoint invisible without deleting it, and log that; `why` becomes part of its name."""

    def clean(self) -> None:
        """Remove what killed writers left, and undo what they had begun; only while the directory is held."""


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint.

    Example:
      >>> name_of(500)
      'step_00000500'
    """
    return f"step_{step:08d}"


def step_of(path: AnyPath) -> int:
    """Return the step in a checkpoint's name.

    Example:
      >>> from pathlib import Path
      >>> step_of(Path("runs/step_00000500"))
      500
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: got {path.name!r}, expected step_ and at least 8 digits")
    return int(match[1])


def entries(store: Store) -> list[AnyPath]:
    """List the directories that are named like checkpoints, newest step first.

    `step_X.old`, left by a kill between two renames, comes after step_X.
    """
    with as_checkpoint_error(store.root, "can't be listed", store.errors):
        listed: list[AnyPath] = list(store.root.iterdir()) if store.root.is_dir() else []
        found = [path for path in listed if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def committed(store: Store) -> list[AnyPath]:
    """List the checkpoints that have a manifest, newest first, one for each step; their bytes are not read."""
    steps: dict[int, AnyPath] = {}
    for path in entries(store):
        with as_checkpoint_error(path, "can't be looked into", store.errors):
            if (path / MANIFEST).is_file():
                steps.setdefault(step_of(path), path)
    return list(steps.values())


@contextmanager
def as_checkpoint_error(path: AnyPath, what: str, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Raise an error of a file system as a CheckpointError that names the path.

    Example:
      >>> from pathlib import Path
      >>> with as_checkpoint_error(Path("runs"), "can't be listed"):
      ...     raise OSError("Input/output error")
      Traceback (most recent call last):
      fntrain.CheckpointError: runs: can't be listed: Input/output error; mend that, or give another directory
    """
    try:
        yield
    except CheckpointError:
        raise
    except kinds as error:
        raise CheckpointError(f"{path}: {what}: {error}; mend that, or give another directory") from error


def turn() -> AbstractContextManager[Any]:
    """Wait for other threads that change what is visible: `ft.save` may be called while a hook's save is under way."""
    return _turn


def _new_turn() -> None:
    """In a forked child the lock may be held by a thread that does not exist there."""
    global _turn
    _turn = threading.RLock()


os.register_at_fork(after_in_child=_new_turn)


def gather_or_raise(ranks: Ranks, work: Callable[[], T], kinds: type[Exception] = CheckpointError) -> list[T]:
    """Do some work on each rank; return all results, or raise on all ranks if it failed on one, so that nobody waits.

    Args:
      ranks: all of them must call this.
      work: with one rank it is just called.
      kinds: of errors, beside CheckpointError, that are raised on all ranks; others are raised on their rank alone.
    Raises:
      CheckpointError: that names the ranks and what each says, or their very error if all ranks have the same.
    Example:
      >>> gather_or_raise(Ranks(), lambda: 3)
      [3]
    """
    if ranks.world_size == 1:
        return [work()]
    done, problem = None, None
    try:
        done = work()
    except (CheckpointError, kinds) as error:
        problem = error
    everyone = ranks.gather((done, problem and str(problem)))
    if problems := [f"rank {rank}: {why}" for rank, (_, why) in enumerate(everyone) if why is not None]:
        if problem is not None and all(why == str(problem) for _, why in everyone):
            raise problem
        raise CheckpointError("; ".join(problems)) from problem
    return [done for done, _ in everyone]
