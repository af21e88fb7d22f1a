"""Writes the tensors of a checkpoint to their files. The manifest is written last, by commit.py."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

import attrs

from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.manifest import MODEL, TRAIN, File, Part, Stored
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.tensor_file import PART, crc32, crc32_parts, created, grouped, header


@attrs.frozen
class Written:
    """What one rank has written, for the manifest: its files, and the parts of tensors in the order of the files."""

    files: dict[str, File]
    parts: list[tuple[Stored, Part]]


def write_tensors(contents: Contents, data: Iterable[memoryview], directory: AnyPath, mark: str = "") -> Written:
    """Write the files of tensors, each on the disk before the next is begun.

    Args:
      contents: of the state.
      data: the values, in the order of `contents.tensors`; taken as they are written.
      directory: that exists.
      mark: put into the names of the files, where other ranks write too or files of an earlier attempt must stay.
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
    return Written(files, [_filled(one, mark, crcs) for one, crcs in zip(contents.stored, found, strict=True)])


def _marked(file: str, mark: str) -> str:
    return file.replace(".", mark + ".", 1)


def _filled(stored: Stored, mark: str, crcs: list[int]) -> tuple[Stored, Part]:
    [part] = stored.parts
    return stored, Part(part.key, _marked(part.file, mark), part.shape, part.row, crc32=tuple(crcs))
