"""The data of a run: an iterable, or something that can start anywhere, opened where the state is."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from toolz import pipe

from fntrain.core.errors import DataExhaustedError
from fntrain.core.hook import Wrap
from fntrain.core.ranks import Ranks
from fntrain.core.state import TrainState


@runtime_checkable
class Positioned(Protocol):
    """Data that can start at any batch, such as `ft.data.stream(...)`."""

    def at(self, position: int) -> Iterator[Any]:
        """Iterate from batch number `position` (from 0)."""


def shared(data: Positioned | Iterable[Any], ranks: Ranks) -> Positioned | Iterable[Any]:
    """Return this rank's share of the data: batches cut by `data.shard(rank, world_size)`, or its own already.

    Raises:
      ValueError: every rank would read the same batches.
    """
    shard = getattr(data, "shard", None)
    if shard is None:
        raise ValueError(
            f"data: each of {ranks.world_size} ranks would read the same batches of {type(data).__name__}; use "
            "ft.data.stream(...), or ft.data.own_share(data) if what each rank reads is its own part already"
        )
    return shard(rank=ranks.rank, world_size=ranks.world_size)  # type: ignore[no-any-return]  # others order them otherwise


END = object()  # what `Batches.next` gives when the data has ended


class Batches:
    """The data of a run, opened where the state is, and again after a roll-back that moved the position."""

    def __init__(self, data: Positioned | Iterable[Any], wraps: list[Wrap]) -> None:
        self.data = data
        self.wraps = wraps
        self.given = 0
        self.position = -1  # of the next batch; -1: not opened
        self.source: Iterator[Any] | None = None
        self.batches: Iterator[Any] = iter(())

    def next(self, state: TrainState) -> Any:
        if state.position != self.position:
            self._open(state)
        try:
            batch = next(self.batches, END)
        except BaseException as error:
            error.add_note(f"while reading batch number {state.position}, for step {state.step + 1}")
            raise
        if batch is END and state.run.max_steps is not None:
            raise DataExhaustedError(
                f"data: ended after {self.given} batches, at step {state.step} of max_steps={state.run.max_steps}; "
                "give more (ft.data.stream never ends), lower max_steps, or declare the data finite with max_steps=None"
            )
        self.given += batch is not END
        self.position = state.position + 1
        return batch

    def _open(self, state: TrainState) -> None:
        self.close()
        if isinstance(self.data, Positioned):
            source = self.source = self.data.at(state.position)
        else:
            source = iter(self.data)
            callers = source is self.data  # an iterator, which goes on where it is: neither opened nor closed here
            self.source = None if callers else source
            if callers and self.position != -1:
                raise ValueError(
                    f"data: a hook moved the position from {self.position} to {state.position}, and an iterator can't "
                    "go back; use ft.data.stream(...), or keep the position when rolling back"
                )
            if not callers and state.position > 0:
                raise ValueError(
                    f"data: {type(self.data).__name__} starts at its first batch again, but the state is at "
                    f"position {state.position}; use ft.data.stream(...), or pass an iterator whose first batch "
                    "is that one: iter(data) for a new epoch, itertools.islice(data, done, None) within one"
                )
        self.batches = pipe(source, *self.wraps)
        self.position = state.position

    def close(self) -> None:
        """Close the iterator if it was opened here; one that the caller made is theirs to go on with."""
        if self.source is not None and hasattr(self.source, "close"):
            self.source.close()
        self.source = None
