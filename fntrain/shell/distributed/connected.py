"""The ranks of this process: `fntrain.core.ranks` says what may be asked of them, torch.distributed answers."""

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
    """One of several processes. They talk through a gloo group of their own, so that no GPU is ever waited for."""

    def __init__(self, group: Any, *, sharded: bool = False) -> None:
        super().__init__(rank=dist.get_rank(group), world_size=dist.get_world_size(group), sharded=sharded)
        object.__setattr__(self, "group", group)

    group: Any

    def __reduce__(self) -> Any:
        return Ranks, ()  # a copy of a state, or one in another process, must not talk to these ranks

    def gather(self, value: Any, *, only_first: bool = False) -> list[Any]:
        found: list[Any] = [] if only_first and self.rank > 0 else [None] * self.world_size
        with _waiting(self):
            if only_first:
                dist.gather_object(value, found or None, group=self.group)
            else:
                dist.all_gather_object(found, value, group=self.group)
        return found

    def max(self, number: int) -> int:
        largest = torch.tensor(number, dtype=torch.int64)
        with _waiting(self):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def barrier(self) -> None:
        self.max(0)

    def channel(self) -> Ranks:
        return Connected(_group(), sharded=self.sharded)

    def close(self) -> None:
        with suppress(ValueError):  # raised where all groups are destroyed already
            dist.destroy_process_group(self.group)


@contextmanager
def _waiting(here: Ranks) -> Iterator[None]:
    """Add to an error of the connection what it means."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            f"rank {here.rank} of {here.world_size} waited for the others here: one failed, ended or never comes; "
            "evaluations, ft.save and hooks that communicate must be called by all ranks, in the same order"
        )
        raise


def ranks() -> Ranks:
    """Return the ranks of this process's process group; without one, a single rank.

    The first call makes a channel between the ranks, so all of them must make that call.

    Example:
      >>> ranks().rank, ranks().world_size
      (0, 1)
    """
    if _num_processes() == 1:
        return ALONE
    world = dist.group.WORLD
    if world not in _made:
        _made.clear()  # what is there belongs to a process group that was destroyed
        _made[world] = Connected(_group())
    return _made[world]


def alone(step_fn: StepFn) -> Wrapped:
    """Let each process of the group train by itself, on whole batches; `ft.fit` refuses that otherwise.

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


core_ranks.num_processes = _num_processes  # so that `ft.fit` knows of the process group; the reason is given there


def _group() -> Any:
    """A gloo group of all ranks, with the timeout of the process group: torch's default would be half an hour."""
    world: Any = dist.group.WORLD
    options = getattr(world._get_backend(world._device_types[0]), "options", None)
    return dist.new_group(backend="gloo", timeout=getattr(options, "_timeout", None))
