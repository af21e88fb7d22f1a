"""The ranks of this process: what `fntrain.core.ranks` asks, answered by torch.distributed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from fntrain.core import ranks as core_ranks
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.state import StepFn
from fntrain.core.wrapping import Wrapped

_made: dict[Any, Ranks] = {}


class Connected(Ranks):
    """One of several processes, which talk by a gloo group of their own: no GPU is ever waited for."""

    def __init__(self, group: Any, *, sharded: bool = False) -> None:
        super().__init__(rank=dist.get_rank(group), world_size=dist.get_world_size(group), sharded=sharded)
        object.__setattr__(self, "group", group)

    group: Any

    def __reduce__(self) -> Any:
        return Ranks, ()  # in a copy of a state, or in another process, it is none of them

    def gather(self, value: Any, *, only_first: bool = False) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        with _waiting(self):
            if not only_first:
                dist.all_gather_object(found, value, group=self.group)
            elif self.rank == 0:
                dist.gather_object(value, found, group=self.group)
            else:
                dist.gather_object(value, group=self.group)
                found = []
        return found

    def max(self, number: int) -> int:
        flag = torch.tensor(number, dtype=torch.int64)
        with _waiting(self):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return int(flag)

    def barrier(self) -> None:
        self.max(0)

    def channel(self) -> Ranks:
        return Connected(_group(), sharded=self.sharded)

    def close(self) -> None:
        with suppress(ValueError):  # all groups are gone already
            dist.destroy_process_group(self.group)


@contextmanager
def _waiting(here: Ranks) -> Iterator[None]:
    """Say what an error of the connection means."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"rank {here.rank} of {here.world_size} waited for the others here: one failed, ended or never comes; "
            "evaluations, ft.save and hooks that communicate must be called by all ranks, in the same order"
        )
        raise


def ranks() -> Ranks:
    """Return the ranks of the process group of this process; alone, if there is none.

    The first call makes a channel between them, so all ranks must come to it.

    Example:
      >>> ranks().rank, ranks().world_size
      (0, 1)
    """
    if _num_processes() == 1:
        return ALONE
    world = dist.group.WORLD
    if world not in _made:
        _made.clear()  # of a process group that is gone
        _made[world] = Connected(_group())
    return _made[world]


def alone(step_fn: StepFn) -> Wrapped:
    """Say that each process of the group is to train by itself, on whole batches; `ft.fit` refuses that otherwise.

    For processes that share a machine or a launcher and nothing else: a search over settings, say, or a comparison.

    Args:
      step_fn: any step of one process.
    Raises:
      ValueError: several processes do the step together.
    Example:
      >>> alone(lambda state, batch: state.advance()).ranks.by_choice
      True
    """
    together = getattr(step_fn, "ranks", ALONE).world_size
    if together > 1:
        raise ValueError(f"alone: {together} processes do this step together; give the step that it was made of")
    return Wrapped(step_fn, step_fn, Ranks(by_choice=True))


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


core_ranks.num_processes = _num_processes  # how `ft.fit` knows of the process group, see there


def _group() -> Any:
    """A gloo group of all ranks; it waits as long as the process group does, torch's default is half an hour."""
    world: Any = dist.group.WORLD
    options = getattr(world._get_backend(world._device_types[0]), "options", None)
    return dist.new_group(backend="gloo", timeout=getattr(options, "_timeout", None))
