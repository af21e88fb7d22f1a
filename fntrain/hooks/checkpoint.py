"""hooks.checkpoint: save the state every n steps and at the end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from fntrain import gates
from fntrain.check import whole
from fntrain.errors import CheckpointError
from fntrain.hook import AnyHook, Hook, hook, resource
from fntrain.shell import checkpoint as files
from fntrain.state import TrainState


@attrs.frozen
class Checkpoint:
    """The parameters of the hook; called, it gives the live one."""

    directory: str
    keep_last: int | None

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        yield hook(before_train=self.check, after_step=self.save)

    def check(self, state: TrainState) -> None:
        """Refuse a directory that can't be written, or whose newest checkpoint this run would not be resumed from."""
        files.clean(self.directory)
        newest = files.newest_intact_after(self.directory, state.step)
        if newest is not None:
            raise CheckpointError(
                f"{newest}: is of a later step than this run's start ({state.step}), and would be resumed instead of "
                "what this run saves; start from ft.resume_or(state, directory), or give another directory"
            )

    def save(self, state: TrainState) -> None:
        """Write the state, then delete what is too old."""
        files.save(state, self.directory)
        files.drop_after(self.directory, state.step)  # left by a roll-back: not this run's past
        if self.keep_last is not None:
            files.prune(self.directory, self.keep_last)


def checkpoint(
    directory: str | os.PathLike[str], *, every: int, keep_last: int | None = None, name: str = "checkpoint"
) -> AnyHook:
    """Save the state every n steps and at the end of training; list it after every hook that has memory.

    Args:
      directory: of the run's checkpoints; made if it is not there.
      every: number of steps between two.
      keep_last: how many of the newest to keep; None keeps all.
      name: unique in a run.
    Raises:
      ValueError: `every` or `keep_last` is not positive.
      CheckpointError: (when the run starts) the directory can't be written, or holds a later step than the start.
    Example:
      >>> checkpoint("runs/digits", every=500, keep_last=3)
      at_end(every(500, Checkpoint(directory='runs/digits', keep_last=3)))
    """
    keep_last = keep_last if keep_last is None else whole("keep_last", keep_last, 1)
    record = Checkpoint(os.fspath(directory), keep_last)
    return gates.at_end(gates.every(every, resource(record, name=name, saves=True)))
