"""The loading of batches in the order that `order` says, by torch's DataLoader and its workers.

The randomness of a sample comes from (seed, epoch, index), so worker count, world size and prefetching never change
what a batch holds.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, default_collate

from fntrain.core.check import whole
from fntrain.core.rng import preserved_generators, seed_generators
from fntrain.data.order import Order, Sample

# Keep the draws of reading apart from each other and from those of the training step of the same number.
_USE_SAMPLE, _USE_COLLATE = 0x73616D70, 0x636F6C6C
_OF_ORDER = ("batch_size", "seed", "shuffle", "drop_last", "ragged_last")
_LOW = {"batch_size": 1, "num_workers": 0, "prefetch_factor": 1, "rank": 0, "world_size": 1}


@attrs.frozen
class Stream:
    """An endless stream of batches of which number s is a function of (seed, s); `ft.data.stream` is its name in use.

    By default batches straddle epochs and are always full, and every sample comes exactly once per epoch. While
    samples are read, torch's, Python's and NumPy's default generators are seeded from (seed, epoch, index), while they
    are collated from the first sample of the rank's share; in the main process they are put back.

    Args:
      dataset: map-style: has `__len__` and `__getitem__(index)`.
      batch_size: samples of the global batch, over all ranks.
      seed: of order and per-sample randomness.
      shuffle: a new permutation each epoch, or the data set's own order.
      drop_last: batches do not straddle epochs; the rest of an epoch is not used in it.
      ragged_last: batches do not straddle epochs; the last of an epoch is smaller.
      num_workers, prefetch_factor, pin_memory, collate_fn: as for torch's DataLoader.
      rank, world_size: which share of every batch is read here.
    Raises:
      TypeError: the data set is not map-style.
      ValueError: sizes that are not positive, an empty data set, or a batch smaller than the world.
    Example:
      >>> [len(batch) for batch, _ in zip(stream(list(range(10)), 4, seed=0).at(0), range(3))]
      [4, 4, 4]
    """

    dataset: Any = attrs.field(repr=lambda dataset: f"<{type(dataset).__name__} of {len(dataset)}>", eq=id)
    batch_size: int
    seed: int = attrs.field(kw_only=True)
    shuffle: bool = attrs.field(default=True, kw_only=True)
    drop_last: bool = attrs.field(default=False, kw_only=True)
    ragged_last: bool = attrs.field(default=False, kw_only=True)
    num_workers: int = attrs.field(default=0, kw_only=True)
    prefetch_factor: int = attrs.field(default=2, kw_only=True)
    pin_memory: bool = attrs.field(default=False, kw_only=True)
    collate_fn: Callable[[list[Any]], Any] | None = attrs.field(default=None, kw_only=True)
    rank: int = attrs.field(default=0, kw_only=True)
    world_size: int = attrs.field(default=1, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not (hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__")):
            raise TypeError(
                f"dataset: got {type(self.dataset).__name__}, expected a map-style one with __len__ and __getitem__; "
                "an iterable goes to fit(data=...) directly, as an iterator"
            )
        for name, low in _LOW.items():
            whole(name, getattr(self, name), low)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: got {self.seed!r}, expected a whole number")
        if self.rank >= self.world_size:
            raise ValueError(f"rank: got {self.rank!r}, expected 0 <= rank < world_size={self.world_size}")
        if len(self.dataset) == 0:
            raise ValueError("dataset: got an empty one, expected at least one sample")
        if self.drop_last and self.ragged_last:
            raise ValueError("drop_last and ragged_last: got both, expected at most one")
        if self.drop_last and len(self.dataset) < self.batch_size:
            raise ValueError(
                f"drop_last: the data set has {len(self.dataset)} samples, less than one batch of {self.batch_size}"
            )
        if self._order.smallest < self.world_size:
            raise ValueError(
                f"batch_size: a batch of {self._order.smallest} can't be shared by world_size={self.world_size}"
            )

    @property
    def _order(self) -> Order:
        settings: dict[str, Any] = {name: getattr(self, name) for name in _OF_ORDER}
        return Order(size=len(self.dataset), **settings)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that it takes to see every sample of an epoch once (all that are not dropped)."""
        return self._order.steps_per_epoch

    @property
    def order(self) -> dict[str, Any]:
        """What decides which samples a batch has; the same on all ranks of a run, or it would not be one batch."""
        return {"samples": len(self.dataset), **{name: getattr(self, name) for name in _OF_ORDER}}

    def samples(self, position: int) -> list[Sample]:
        """Return the (epoch, index) pairs of global batch number `position`, over all ranks.

        Cost: about 6 us; at the start of an epoch also its permutation (30 ms for a million items).

        Example:
          >>> s = stream(list("abcde"), 2, seed=0)
          >>> sorted(index for position in range(5) for epoch, index in s.samples(position) if epoch == 0)
          [0, 1, 2, 3, 4]
        """
        return self._order.samples(position)

    def share(self, position: int) -> list[Sample]:
        """Return this rank's part of a batch; sizes differ by at most one between ranks.

        Example:
          >>> parts = [stream(range(9), 5, seed=0, rank=rank, world_size=2).share(0) for rank in (0, 1)]
          >>> [len(part) for part in parts], sum(parts, []) == stream(range(9), 5, seed=0).samples(0)
          ([3, 2], True)
        """
        return self._order.share(position, self.rank, self.world_size)

    def at(self, position: int) -> Iterator[Any]:
        """Iterate over batches from number `position` on, without end.

        Every call has its own loader and workers; `close()` of the iterator ends them.

        Example:
          >>> s = stream(list(range(10)), 4, seed=0)
          >>> a, b = s.at(0), s.at(1)
          >>> _ = next(a); bool((next(a) == next(b)).all())
          True
        """
        seeded: Any = _Seeded(self.dataset, self.collate_fn or default_collate, self.seed)
        loader: DataLoader[Any] = DataLoader(
            seeded,
            batch_sampler=_Shares(self, position),
            collate_fn=_identity,  # samples are collated where they are read
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,  # torch refuses it without workers
            worker_init_fn=_ignore_sigterm_of_others,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # the loader draws a seed when iterated: not from the default generator
        )
        return _Batches(iter(loader))

    def shard(self, rank: int, world_size: int) -> "Stream":
        """Return the stream of one rank's shares; `fit` asks for it where several ranks train together.

        Raises:
          ValueError: it is another rank's share already, or a batch is smaller than the world.
        Example:
          >>> stream(range(9), 5, seed=0).shard(1, 2).share(0) == stream(range(9), 5, seed=0).samples(0)[3:]
          True
        """
        if self.world_size > 1 and (self.rank, self.world_size) != (rank, world_size):
            raise ValueError(
                f"stream: is of rank {self.rank} of {self.world_size}, expected {rank} of {world_size}; leave both out"
            )
        return attrs.evolve(self, rank=rank, world_size=world_size)


stream = Stream


@attrs.frozen
class OwnShare:
    """Data of which each rank reads another part already; made by `own_share`."""

    data: Any

    def shard(self, rank: int, world_size: int) -> Any:
        """Return the data as it is."""
        del rank, world_size
        return self.data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


@attrs.frozen
class PositionedShare(OwnShare):
    """The same of data that can start at any batch, which must not look like data that can't."""

    def at(self, position: int) -> Iterator[Any]:
        """Iterate over this rank's batches from number `position` on."""
        batches: Iterator[Any] = self.data.at(position)
        return batches


def own_share(data: Any) -> OwnShare:
    """Say that what each rank reads is its own part already, such as a DataLoader with a DistributedSampler.

    Example:
      >>> own_share([1, 2]).shard(1, 2)
      [1, 2]
    """
    return PositionedShare(data) if hasattr(data, "at") else OwnShare(data)


@attrs.frozen
class _Shares:
    """The batch sampler: the shares of a stream from one position on."""

    stream: Stream
    position: int

    def __iter__(self) -> Iterator[list[Sample]]:
        return map(self.stream.share, count(self.position))


@attrs.frozen
class _Seeded:
    """The data set, read and collated with generators seeded for each sample."""

    dataset: Any
    collate: Callable[[list[Any]], Any]
    seed: int

    def __getitems__(self, samples: list[Sample]) -> Any:
        with preserved_generators():
            read = [self._read(*sample) for sample in samples]
            seed_generators(self.seed, _USE_COLLATE, *samples[0])
            try:
                return self.collate(read)
            except StopIteration as error:  # would end the stream, silently
                raise RuntimeError(f"collate_fn: raised StopIteration, on a batch from {samples[0]}") from error

    def _read(self, epoch: int, index: int) -> Any:
        seed_generators(self.seed, _USE_SAMPLE, epoch, index)
        try:
            return self.dataset[index]
        except StopIteration as error:  # would end the stream, silently
            raise RuntimeError(f"dataset[{index}]: raised StopIteration, in epoch {epoch}") from error


def _identity(batch: Any) -> Any:
    return batch


class _Batches:
    """The loader's iterator. Closing it ends the workers at once, even if nothing was read; so does an error."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator = iterator

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Any:
        try:
            return next(self.iterator)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        iterator, self.iterator = self.iterator, iter(())
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _ignore_sigterm_of_others(_worker: int) -> None:
    """In a worker: let SIGTERM end it only if its parent sent it.

    Schedulers send SIGTERM to all processes of a job, and a run that then finishes its step and saves needs batches.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of, args=(parent.pid,), daemon=True).start()


def _exit_on_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler in a worker does
