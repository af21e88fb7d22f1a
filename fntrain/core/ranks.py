"""Ranks: the processes of a run, as one of them sees them. What communicates gets this value; alone, nobody answers.

The pure ring only asks it: the shell makes the one that is connected (`ft.shell.distribute`).
"""

from collections.abc import Callable
from typing import Any

import attrs


@attrs.frozen(eq=False)
class Ranks:
    """One process among several; this one is alone, what a connected one asks of the others it knows by itself.

    Every method must be called by all ranks, in the same order.

    Args:
      rank: this process's number, from 0.
      world_size: number of processes.
      sharded: whether each holds a part of the state, so that even a forward needs them all.
      by_choice: whether this process is meant to be alone although there are others (`ft.shell.alone`).
    Example:
      >>> ALONE.gather("x"), ALONE.max(3)
      (['x'], 3)
    """

    rank: int = 0
    world_size: int = 1
    sharded: bool = False
    by_choice: bool = False

    def gather(self, value: Any, *, only_first: bool = False) -> list[Any]:
        """Return the values of all ranks, in their order; with `only_first` to the first rank, to others none."""
        del only_first
        return [value]

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        return number

    def barrier(self) -> None:
        """Wait for all ranks."""

    def channel(self) -> "Ranks":
        """Return a channel of its own, for a thread that communicates beside the training; to be closed."""
        return self

    def close(self) -> None:
        """Give up a channel that `channel` made; the one method that each rank may call when it likes."""


ALONE = Ranks()


def _one() -> int:
    return 1


# How many processes the process group of this one has. The core may not import torch.distributed, nor call the shell by
# name; so fntrain.shell.distributed.connected, which `import fntrain` always loads, puts its answer here. Without it
# `fit` could not know that a step which says nothing of its ranks would train each process by itself.
num_processes: Callable[[], int] = _one
