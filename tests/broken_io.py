"""Deliberately broken twins of data, checkpoint and writer parts: the laws of the tests must refuse each of them."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, default_collate

import fntrain as ft
from fntrain import data
from fntrain.core import tree
from fntrain.core.state import TrainState
from fntrain.data import order as permutation
from fntrain.data.order import Order
from fntrain.shell.checkpoints import save_load as checkpoint
from fntrain.shell.checkpoints.commit import commit, store_at
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.store import name_of
from fntrain.shell.disk import fsync


class EpochTailLost(data.Stream):
    """Straddles nothing and says nothing: the last samples of an epoch never come."""

    def samples(self, position: int) -> list[tuple[int, int]]:
        epoch, batch = divmod(position, len(self.dataset) // self.batch_size or 1)
        start = batch * self.batch_size
        return [(epoch, i) for i in self._order._of(epoch, start, start + self.batch_size)]


class WithReplacement(data.Stream):
    """Draws every index on its own, so some come twice in an epoch."""

    def samples(self, position: int) -> list[tuple[int, int]]:
        generator = torch.Generator().manual_seed(position)
        drawn = torch.randint(len(self.dataset), (self.batch_size,), generator=generator).tolist()
        first = position * self.batch_size
        return [((first + k) // len(self.dataset), index) for k, index in enumerate(drawn)]


class GlobalOrder(data.Stream):
    """Order from the default generator: another run, or another start, gives other batches."""

    @property
    def _order(self) -> Order:
        return _GlobalOrder(**attrs.asdict(super()._order))


class _GlobalOrder(Order):
    def _of(self, epoch: int, start: int, end: int) -> list[int]:
        return torch.randperm(self.size)[start:end].tolist()


class PaddedShares(data.Stream):
    """Shares as DistributedSampler makes them: interleaved, and padded to one size by repeating samples."""

    def share(self, position: int) -> list[tuple[int, int]]:
        samples = self.samples(position)
        samples += samples[: -len(samples) % self.world_size]
        return samples[self.rank :: self.world_size]


class _Indices:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, sample: tuple[int, int]) -> Any:
        return self.dataset[sample[1]]


class Unseeded(data.Stream):
    """Leaves per-sample randomness to the generators as they are: it depends on workers and on history."""

    def at(self, position: int) -> Iterator[Any]:
        shares: Any = data.loader._Shares(self, position)
        return iter(DataLoader(_Indices(self.dataset), batch_sampler=shares, num_workers=self.num_workers))


class SharedIterator(data.Stream):
    """One loader for all iterators, as with persistent workers: a second `at` moves the first."""

    def at(self, position: int) -> Iterator[Any]:
        _shared[id(self.dataset)] = position
        return self._read()

    def _read(self) -> Iterator[Any]:
        while True:
            position = _shared[id(self.dataset)]
            _shared[id(self.dataset)] += 1
            yield default_collate([self.dataset[index] for _, index in self.share(position)])


_shared: dict[int, int] = {}


def twin(cls: type[data.Stream], stream: data.Stream) -> data.Stream:
    """The broken form of a stream."""
    return cls(**{field.name: getattr(stream, field.name) for field in attrs.fields(data.Stream)})


def feistel_for_all(size: int, key: int, start: int, end: int) -> list[int]:
    """A Feistel network also for small sizes, where it reaches only even permutations."""
    return permutation._feistel_block(size, key, 0)[start:end].tolist()


def commit_in_place(store: Any, contents: Any, tensors: Any) -> Path:
    """Writes straight into the visible directory, manifest first, replacing by deleting: a crash leaves half of it."""
    target = store.root / name_of(contents.step)
    whole = commit(store_at(store.root / "elsewhere"), contents, tensors)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        for name in ("state.json", "model.safetensors", "train.safetensors"):
            (target / name).write_bytes((whole / name).read_bytes())
            fsync(target / name)
            time.sleep(0.02)  # a slow disk
    except OSError as error:
        raise ft.CheckpointError(str(error)) from error
    return target


def save_in_place(state: TrainState, directory: Path) -> Path:
    """`commit_in_place` by hand."""
    contents = Contents.of(state)
    return commit_in_place(store_at(Path(directory)), contents, map(tree.to_bytes, contents.tensors))


def save_without_strides(state: TrainState, directory: Path) -> Path:
    """Forgets memory layouts, as a round trip through numpy does."""
    contiguous = {name: value.contiguous() for name, value in state.params.items()}
    return checkpoint.save(state.replace(params=contiguous), directory)


def save_without_signs(state: TrainState, directory: Path) -> Path:
    """Forgets the sign of zero, as a comparison by == does not notice."""
    plain = {key: value + 0.0 if isinstance(value, float) else value for key, value in state.extra.items()}
    return checkpoint.save(state.replace(extra=plain), directory)


def load_unchecked(path: Path) -> TrainState:
    """Believes every byte of the tensors."""
    return checkpoint.load(path, verify="structure")


def eager_metrics(record: Any, every: int) -> ft.Hook:
    """Transfers every metric in every step."""
    rows: dict[str, float] = {}

    def after_step(state: TrainState) -> None:
        rows.update({name: value.item() for name, value in state.metrics.items()})
        if state.step % every == 0:
            record(rows)

    return ft.hook(after_step=after_step, name="write_metrics")


@attrs.frozen
class AppendingJsonl:
    """Appends without looking at what an earlier run left."""

    path: str

    @contextmanager
    def open(self, start_step: int) -> Iterator[Any]:
        with Path(self.path).open("a") as file:
            yield lambda row: print(json.dumps({"step": row.step, **row.scalars}), file=file, flush=True)


@attrs.frozen
class UnpurgedTensorBoard:
    """A new event file that does not hide the overlap."""

    directory: str

    @contextmanager
    def open(self, start_step: int) -> Iterator[Any]:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(self.directory) as writer:

            def write(row: Any) -> None:
                for name, value in row.scalars.items():
                    writer.add_scalar(name, value, row.step)
                writer.flush()

            yield write


def evaluate_as_latest(fn: Any, *, every: int) -> Any:
    """Reports as an ordinary metric: lost unless its period meets the writer's."""

    def after_step(state: TrainState) -> TrainState:
        return state.replace(metrics={**state.metrics, **{f"eval/{k}": v for k, v in fn(state).items()}})

    return ft.at_end(ft.every(every, ft.hook(after_step=after_step, name="evaluate")))


def save_tensors_only(state: TrainState, directory: Path) -> Path:
    """A checkpoint of tensors alone: numbers, names and structure are lost."""
    return checkpoint.save(state.replace(extra={}, hooks={}), directory)
