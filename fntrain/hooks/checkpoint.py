"""hooks.checkpoint: save the state every n steps and at the end. hooks.best_checkpoint: save the best one."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import attrs

from fntrain.core import gates
from fntrain.core.check import whole
from fntrain.core.errors import CheckpointError
from fntrain.core.hook import AnyHook, Hook, Needs, hook, resource
from fntrain.core.ranks import ALONE
from fntrain.core.state import TrainState, remember
from fntrain.hooks.retention import KeepBest, Mode, Retention, tell_unseen
from fntrain.hooks.retention import keep_best as one_best  # `checkpoint` has an argument of that name
from fntrain.shell.checkpoints.commit import Keep
from fntrain.shell.checkpoints.paths import path_of
from fntrain.shell.checkpoints.reading import check
from fntrain.shell.checkpoints.saver import Saver
from fntrain.shell.checkpoints.store import Store, committed, gather_or_raise, step_of
from fntrain.shell.checkpoints.upgrade import SchemaError

_log = logging.getLogger("fntrain")
_DECLARED: Any = {"communicates": True, "stops": False}
_MEMORY = Needs("memory", "would save that memory one step old")
T = TypeVar("T")


class _Directory:
    """Where one hook saves during one run. Of ranks that hold the same state, only the first does anything there."""

    def __init__(self, path: str, asynchronous: bool) -> None:
        self.path, self.asynchronous = path, asynchronous
        self.stack = ExitStack()
        self.saver: Saver | None = None  # of a rank that saves something

    def open(self, state: TrainState, look: Callable[[Store], T]) -> T:
        """Hold the directory; returns what the first rank finds there, or raises its error on all ranks."""
        ranks = state.run.ranks

        def begin() -> Any:
            if ranks.rank == 0 or ranks.sharded:
                together = ranks if ranks.sharded else ALONE
                saver = Saver(path_of(self.path), asynchronous=self.asynchronous, ranks=together)
                self.saver = self.stack.enter_context(saver)
            return look(self.saver.store) if ranks.rank == 0 and self.saver is not None else None

        return gather_or_raise(ranks, begin)[0]  # type: ignore[no-any-return]

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass the batches on; at every step, whatever the gates of the hook, raise the error of a save that failed."""
        for batch in batches:
            if self.saver is not None:
                self.saver.check()
            yield batch
            del batch  # or two batches are in memory while the next one is read

    def save(self, state: TrainState, keep: Keep) -> None:
        """Save a state, on the ranks that have something to save."""
        if self.saver is not None:
            self.saver.save(state, keep)

    def wait(self, state: TrainState) -> None:
        """Wait until all that was saved is on the disk, on all ranks; an error of one rank is raised on all."""
        saver = self.saver
        gather_or_raise(state.run.ranks, saver.wait if saver is not None else lambda: None)


@contextmanager
def _running(live: Any) -> Iterator[Hook]:
    """The hook of one run, made of the callbacks of one of the two classes below."""
    with live.directory.stack:
        callbacks = hook(before_train=live.start, after_step=live.save, after_train=live.finish)
        yield attrs.evolve(callbacks, wrap_data=live.directory.watch)


@attrs.frozen
class Checkpoint:
    """The parameters of the hook; called, it gives the hook of one run."""

    directory: str
    name: str
    retention: Retention
    asynchronous: bool

    def __call__(self) -> AbstractContextManager[Hook]:
        return _running(_Periodic(self))


class _Periodic:
    """hooks.checkpoint in one run."""

    def __init__(self, record: Checkpoint) -> None:
        self.record = record
        self.directory = _Directory(record.directory, record.asynchronous)

    def start(self, state: TrainState) -> None:
        self.directory.open(state, lambda store: refuse_later(store, state))

    def save(self, state: TrainState) -> TrainState | None:
        name, rules = self.record.name, self.record.retention
        memory = {one.metric: one.after(state, state.hooks[name].get(one.metric, {})) for one in rules.keep_best}
        best = {int(step) for scores in memory.values() for step in scores}
        new = remember(state, name, memory) if rules.keep_best else None
        self.directory.save(new or state, lambda steps: rules.kept(steps, best))
        return new

    def finish(self, state: TrainState) -> None:
        for one in self.record.retention.keep_best:
            if not state.hooks[self.record.name].get(one.metric):
                tell_unseen(state, self.record.name, one.metric, "it counts only at the steps that are saved")
        self.directory.wait(state)


def checkpoint(
    directory: str | os.PathLike[str],
    *,
    every: int,
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep_best: KeepBest | Sequence[KeepBest] = (),
    asynchronous: bool = True,
    name: str = "checkpoint",
) -> AnyHook:
    """Save the state every n steps and at the end of training; list it after every hook that has memory.

    The state is copied to host memory (one copy, made at the first save), and a thread writes it; training goes on
    after the copy. `fit` returns when the last one is on the disk. A save that failed raises at the next step; of ranks
    that each hold a part, at the next save, on all. After each save, what none of the three rules keeps is deleted;
    without any of them all are kept, and the newest always.

    Args:
      directory: of the run's checkpoints; made if it is not there. A path, or a URL that fsspec knows (s3://...). No
        other process, and no other hook, may save there.
      every: number of steps between two.
      keep_last: how many of the newest to keep.
      keep_every: keep those whose step is divisible by it.
      keep_best: keep those with the best scores, `ft.hooks.keep_best("eval/accuracy", mode="max", n=3)`, or several
        of these. Scores are remembered in the state.
      asynchronous: False waits for the disk, and takes no memory for a copy.
      name: unique in a run.
    Raises:
      TypeError: `keep_best` is something else.
      ValueError: a period is not positive, or two of `keep_best` are for one metric.
      CheckpointError: (when the run starts) the directory can't be written, is in use, or holds a later step than the
        start; (while it runs) a save failed.
    Example:
      >>> checkpoint("runs/digits", every=500, keep_last=3).every
      500

    Source: detectron2's PeriodicCheckpointer; asynchronous saving: CheckFreq, https://arxiv.org/abs/2103.14360
    """
    best = (keep_best,) if isinstance(keep_best, KeepBest) else tuple(keep_best)
    if not all(isinstance(one, KeepBest) for one in best):
        expected = "ft.hooks.keep_best(metric, mode=...), or several of these"
        raise TypeError(f"keep_best: got {keep_best!r}, expected {expected}")
    if len({one.metric for one in best}) < len(best):
        raise ValueError(f"keep_best: got {best}, expected one for each metric")
    retention = Retention(
        keep_last if keep_last is None else whole("keep_last", keep_last, 1),
        keep_every if keep_every is None else whole("keep_every", keep_every, 1),
        best,
    )
    record = Checkpoint(os.fspath(directory), name, retention, asynchronous)
    remembers = {"init": _Nothing()} if best else {}
    saving = resource(record, name=name, makes="branch", needs=[_MEMORY], **_DECLARED, **remembers)
    return gates.at_end(gates.every(every, saving))


@attrs.frozen
class _Nothing:
    """The memory at the start."""

    def __call__(self, state: TrainState) -> dict[str, Any]:
        del state
        return {}


@attrs.frozen
class BestCheckpoint:
    """The parameters of the hook; called, it gives the hook of one run."""

    directory: str
    name: str
    best: KeepBest
    asynchronous: bool

    def __call__(self) -> AbstractContextManager[Hook]:
        return _running(_Best(self))


class _Best:
    """hooks.best_checkpoint in one run."""

    def __init__(self, record: BestCheckpoint) -> None:
        self.record = record
        self.directory = _Directory(record.directory, record.asynchronous)

    def start(self, state: TrainState) -> TrainState | None:
        """Make memory and directory agree: a kill may have come after one was written and before the other was."""
        memory: Mapping[str, float] = state.hooks[self.record.name]
        best = max(map(int, memory), default=-1)
        there = self.directory.open(state, lambda store: keep_only(store, best))
        if there or not memory:
            return None
        if best == state.step:
            self.directory.save(state, lambda _: [])
            return None
        if state.run.ranks.rank == 0:
            _log.warning("%s: the best checkpoint (step %s) is not there; beginning anew", self.record.directory, best)
        return remember(state, self.record.name, {})

    def save(self, state: TrainState) -> TrainState | None:
        memory = state.hooks[self.record.name]
        after = self.record.best.after(state, memory)
        if after == memory:
            return None
        new = remember(state, self.record.name, after)
        self.directory.save(new, lambda _: [])
        return new

    def finish(self, state: TrainState) -> TrainState | None:
        """Save once more: the last evaluation may have run at the end only."""
        failed = state.run.stop is not None and state.run.stop.kind == "error"
        new = None if failed else self.save(state)
        if not (new or state).hooks[self.record.name]:
            tell_unseen(state, self.record.name, self.record.best.metric, "list it after the hook that reports it")
        self.directory.wait(state)
        return new


def best_checkpoint(
    directory: str | os.PathLike[str],
    metric: str,
    *,
    mode: Mode,
    asynchronous: bool = True,
    name: str = "best_checkpoint",
) -> AnyHook:
    """Save the state whenever a metric is better than ever before; `ft.latest(directory)` is the best one.

    List it after the hook that reports the metric and before `hooks.checkpoint`, which saves its memory.

    Args:
      directory: for this hook alone; one checkpoint stays there, the former is deleted when the better one is whole.
      metric: name in `state.metrics`; at steps without it nothing happens. A score that is nan or inf is never best.
      mode: "max" if more is better, "min" if less is.
      asynchronous: as for `hooks.checkpoint`.
      name: unique in a run; the best score and its step are in `state.hooks[name]`.
    Raises:
      ValueError: the mode is none of the two.
      CheckpointError: (when the run starts) the directory can't be written or is in use; (while it runs) a save failed.
    Example:
      >>> best_checkpoint("runs/digits/best", "eval/accuracy", mode="max").name
      'best_checkpoint'

    Source: detectron2's BestCheckpointer
    """
    record = BestCheckpoint(os.fspath(directory), name, one_best(metric, mode=mode), asynchronous)
    needs = [attrs.evolve(_MEMORY, but=("best", "branch"))]  # several of them may follow each other
    return resource(record, name=name, makes="best", needs=needs, outlives=True, **_DECLARED, init=_Nothing())


def keep_only(store: Store, best: int) -> bool:
    """Leave only the checkpoint of the best step, once it is there; returns whether it is."""
    found = {step_of(path): path for path in committed(store)}
    for step, path in found.items():
        if step > best:
            store.set_aside(path, "former")  # of a run that is not this one's past
        elif step < best and best in found:
            store.remove(path)
    return best in found


def refuse_later(store: Store, state: TrainState) -> None:
    """Refuse a directory from which another state than this run's would be resumed; damaged ones are put aside."""
    for path in store.claimed():
        if step_of(path) <= state.step:
            return
        try:
            check(path)
        except SchemaError:
            raise
        except CheckpointError as error:
            _log.warning("%s", error)
            store.set_aside(path, "damaged")
        else:
            raise CheckpointError(
                f"{path}: is of a later step than this run's start ({state.step}), and would be resumed instead of "
                "what this run saves; start from ft.resume_or(state, directory), or give another directory"
            )
