"""The order of a commit, for one rank and several, and retention.

Every rank writes its files and waits until they are on the disk. When all have, the first writes the manifest and makes
the checkpoint visible. Only then are old checkpoints deleted. So a process may be killed at any instant.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice

import attrs
from toolz import merge

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.manifest import MODEL, TRAIN, File, Stored, dumps
from fntrain.shell.checkpoints.objects import ObjectStore
from fntrain.shell.checkpoints.paths import AnyPath, RemotePath
from fntrain.shell.checkpoints.store import Attempt, Store, committed, gather_or_raise, name_of, step_of, turn
from fntrain.shell.checkpoints.tensor_file import PART, crc32, crc32_parts, created, grouped, header, opened

Keep = Callable[[list[int]], Collection[int]]


@attrs.frozen
class Written:
    """What one rank has written, for the manifest: its files, and the tensors in the order of the files."""

    files: dict[str, File]
    tensors: list[Stored]


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

            # Each gather is a barrier: the manifest is written only when the files of all ranks are on the disk.
            attempt = gather_or_raise(ranks, begin, store.errors)[0]
            assert attempt is not None
            directory, mark = store.root / attempt.directory, own + attempt.mark
            written = gather_or_raise(ranks, lambda: write_tensors(contents, data, directory, mark), store.errors)

            def finish() -> None:
                if ranks.rank == 0:
                    _check_others(directory, written[1:])
                    tensors = [stored for one in written for stored in one.tensors]
                    manifest = dumps(contents.structure, merge([one.files for one in written]), tensors)
                    store.publish(attempt, contents.step, manifest)
                    stack.close()  # before the other ranks go on: what goes wrong there is an error on all of them

            gather_or_raise(ranks, finish, store.errors)
    except (CheckpointError, store.errors) as error:
        if isinstance(error, CheckpointError) and not several:
            raise  # its message says what is wrong and where
        why = f"{target}: could not be written: {error}; earlier checkpoints are as they were"
        raise CheckpointError(why) from error
    return target


def _check_others(directory: AnyPath, written: Sequence[Written]) -> None:
    """Refuse a directory that the ranks do not share: the first rank must find there what the others have written."""
    for name, file in merge([one.files for one in written]).items():
        with opened(directory / name) as reader:
            if reader.bytes != file.bytes:
                raise CheckpointError(f"{directory / name}: is not what its rank has written")


def write_tensors(contents: Contents, data: Iterable[memoryview], directory: AnyPath, mark: str = "") -> Written:
    """Write the files of tensors, each on the disk before the next is begun.

    Args:
      contents: of the state.
      data: the values, in the order of `contents.tensors`; taken as they are written.
      directory: that exists.
      mark: put into the names of the files, where other ranks write too or files of an earlier attempt must stay.

    Checksums are computed in another thread while this one writes: zlib and the system calls release the GIL.
    """
    left = iter(data)
    files: dict[str, File] = {}
    sums: list[Future[list[list[int]]]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="fntrain-crc32") as hasher:
        for kind in (MODEL, TRAIN):
            mine = [stored for stored in contents.stored if stored.parts[0].file == kind]
            head = header({one.name: (one.dtype, one.parts[0].shape) for one in mine}, {"format": "pt"})
            name = _marked(kind, mark)
            with created(directory / name) as out:
                out.write(head)
                # In large groups: after each call this thread waits until the training thread lets it go on.
                for group in grouped(islice(left, len(mine)), PART):
                    sums.append(hasher.submit(lambda views: [crc32_parts(view) for view in views], group))
                    out.write(*group)
            files[name] = File(len(head), crc32(head), out.written)
    found = chain.from_iterable(group.result() for group in sums)
    return Written(files, [_written(one, mark, crcs) for one, crcs in zip(contents.stored, found, strict=True)])


def _written(stored: Stored, mark: str, crcs: list[int]) -> Stored:
    [part] = stored.parts
    return attrs.evolve(stored, parts=(attrs.evolve(part, file=_marked(part.file, mark), crc32=tuple(crcs)),))


def _marked(file: str, mark: str) -> str:
    return file.replace(".", mark + ".", 1)


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
