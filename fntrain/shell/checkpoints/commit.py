"""The order of a commit, for one rank and several, and retention.

Every rank writes its files and waits until they are on the disk. When all have, the first writes the manifest and makes
the checkpoint visible. Only then are old checkpoints deleted. So a process may be killed at any instant.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.manifest import dumps
from fntrain.shell.checkpoints.objects import ObjectStore
from fntrain.shell.checkpoints.paths import AnyPath, RemotePath
from fntrain.shell.checkpoints.store import Attempt, Store, committed, gather_or_raise, name_of, step_of, turn
from fntrain.shell.checkpoints.tensor_file import opened
from fntrain.shell.checkpoints.writing import Written, write_tensors

Keep = Callable[[list[int]], Collection[int]]


def store_at(root: AnyPath) -> Store:
    """Return the store for a path: the one place that decides which kind it is.

    Example:
      >>> from pathlib import Path
      >>> store_at(Path("runs"))
      LocalStore(root=PosixPath('runs'))
    """
    return ObjectStore(root) if isinstance(root, RemotePath) else LocalStore(root)


def commit(store: Store, contents: Contents, data: Iterable[memoryview]) -> AnyPath:
    """Write a checkpoint and make it visible once all of it is on the disk; returns its path.

    Args:
      store: the directory.
      contents: what this rank is to write; `contents.ranks` must all call this.
      data: the values, in the order of `contents.tensors`.
    Raises:
      CheckpointError: it could not be written on one of the ranks; what was visible still is.
    """
    ranks, target = contents.ranks, store.root / name_of(contents.step)
    several = ranks.world_size > 1
    own = f"-rank{ranks.rank}" if several else ""
    try:
        with ExitStack() as stack:

            def begin() -> Attempt | None:
                return stack.enter_context(store.attempt(contents.step, shared=several)) if ranks.rank == 0 else None

            attempt = gather_or_raise(ranks, begin, store.errors)[0]
            assert attempt is not None
            directory, mark = store.root / attempt.directory, own + attempt.mark
            written = gather_or_raise(ranks, lambda: write_tensors(contents, data, directory, mark), store.errors)

            def finish() -> None:
                if ranks.rank == 0:
                    _check_others(directory, written[1:])
                    store.publish(attempt, contents.step, _manifest(contents, written))
                    stack.close()  # before the other ranks go on: what goes wrong there is an error on all of them

            gather_or_raise(ranks, finish, store.errors)
    except (CheckpointError, store.errors) as error:
        if isinstance(error, CheckpointError) and not several:
            raise  # it says itself what is wrong
        raise CheckpointError(
            f"{target}: could not be written: {error}; earlier checkpoints are as they were"
        ) from error
    return target


def _manifest(contents: Contents, written: Iterable[Written]) -> bytes:
    files = {name: file for one in written for name, file in one.files.items()}
    return dumps(contents.structure, files, [part for one in written for part in one.parts])


def _check_others(directory: AnyPath, written: Sequence[Written]) -> None:
    """Refuse a directory that each rank has for itself: the first must find there what the others have written."""
    for name, file in (item for one in written for item in one.files.items()):
        with opened(directory / name) as reader:
            if reader.bytes != file.bytes:
                raise CheckpointError(f"{directory / name}: is not what its rank has written")


def retain(store: Store, newest: int, keep: Keep, left: Collection[int] = ()) -> None:
    """Delete the checkpoints that are not to be kept; the newest, which is whole, is always kept.

    Args:
      store: the directory.
      newest: the step just saved.
      keep: gives the steps to keep of those up to it, newest first.
      left: later steps, of a branch that the run has left by a roll-back. Others that are later were saved by hand.
    """
    with store.hold(), turn():
        found = {step_of(path): path for path in committed(store)}
        steps = [step for step in found if step <= newest]
        doomed = {*steps, *left} - {newest, *keep(steps)}
        for step in sorted(doomed.intersection(found), reverse=True):
            store.remove(found[step])
