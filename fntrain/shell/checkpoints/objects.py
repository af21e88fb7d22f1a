"""The store of checkpoints on an object store, or another file system that fsspec knows.

Objects can't be renamed, so a checkpoint is visible when it has a manifest, and that is written last. Nothing can be
locked there: a second process that writes to the directory is not noticed.
"""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import attrs

from fntrain.shell.checkpoints.manifest import MANIFEST
from fntrain.shell.checkpoints.paths import AnyPath, RemotePath
from fntrain.shell.checkpoints.store import Attempt, Store, entries, name_of, turn

_log = logging.getLogger("fntrain")


@attrs.frozen
class ObjectStore(Store):
    """A directory of checkpoints on an object store.

    Example:
      >>> ObjectStore(RemotePath.of("memory://runs/none")).claimed()
      []
    """

    errors: ClassVar[type[Exception]] = Exception  # each library raises kinds of its own, not only OSErrors
    root: RemotePath

    @contextmanager
    def attempt(self, step: int, *, shared: bool) -> Iterator[Attempt]:
        """Let files be written beside those of a former checkpoint of this step, which are removed at the end.

        Threads of one process save one after another. Threads of several ranks can't: one rank could let the save of
        one thread go first and another rank that of another, and both would wait for ever. So names are unique there.
        """
        target = self.root / name_of(step)
        with nullcontext() if shared else turn():
            former = list(target.iterdir()) if target.is_dir() else []
            yield Attempt(target.name, f"-{uuid.uuid4().hex[:8]}" if shared or former else "")
            for path in former:
                if path.name != MANIFEST:
                    path.remove()

    def publish(self, attempt: Attempt, step: int, manifest: bytes) -> None:
        """Write the manifest in one request: half of it must never replace the one of a former checkpoint."""
        del step
        (self.root / attempt.directory / MANIFEST).write_bytes(manifest)

    def claimed(self) -> list[AnyPath]:
        """What has a manifest: an upload that did not end has none, nor has a checkpoint that was put aside."""
        return [path for path in entries(self) if (path / MANIFEST).is_file()]

    def remove(self, path: AnyPath) -> None:
        """Delete the manifest first: a process that is killed here leaves files, but no damaged checkpoint."""
        checkpoint = self.root / path.name
        if (checkpoint / MANIFEST).exists():
            (checkpoint / MANIFEST).remove()
        checkpoint.remove()

    def set_aside(self, path: AnyPath, why: str) -> None:
        """Give the manifest another name."""
        manifest = self.root / path.name / MANIFEST
        aside = manifest.parent / f"{why}-{MANIFEST}"
        aside.write_bytes(manifest.read_bytes())
        manifest.remove()
        _log.warning("put a %s checkpoint aside as %s", why, aside)

    def clean(self) -> None:
        """Delete uploads that did not end."""
        for path in entries(self):
            checkpoint = self.root / path.name
            if not any(one.name.endswith(MANIFEST) for one in checkpoint.iterdir()):
                checkpoint.remove()
