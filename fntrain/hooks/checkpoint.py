"""hooks.checkpoint: save the state every n steps and at the end. hooks.best_checkpoint: save the best one."""

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import attrs

from fntrain.core import gates
from fntrain.core.check import one_of, whole
from fntrain.core.errors import CheckpointError
from fntrain.core.hook import AnyHook, Hook, Needs, hook, resource
from fntrain.core.metrics import metric_over_ranks
from fntrain.core.ranks import ALONE
from fntrain.core.state import TrainState, remember
from fntrain.shell.checkpoints.directory import agreed as agreed_on
from fntrain.shell.checkpoints.directory import complete, nothing, readable, remove, retain, set_aside, step_of
from fntrain.shell.checkpoints.manifest import check_files
from fntrain.shell.checkpoints.remote import Place, place
from fntrain.shell.checkpoints.saver import Saver
from fntrain.shell.checkpoints.upgrade import SchemaError

_log = logging.getLogger("fntrain")
_DECLARED: Any = {"communicates": True, "stops": False}
_MEMORY = Needs("memory", "would save that memory one step old")
T = TypeVar("T")
Mode = Literal["max", "min"]


@attrs.frozen
class KeepBest:
    """Which checkpoints to keep for their score; made by `keep_best`."""

    metric: str
    mode: Mode
    n: int

    def best(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The n best of scores by step; of equal ones the earlier."""
        sign = -1 if self.mode == "max" else 1
        ranked = sorted(scores.items(), key=lambda item: (sign * item[1], int(item[0])))
        return dict(ranked[: self.n])


def keep_best(metric: str, *, mode: Mode, n: int = 1) -> KeepBest:
    """Say which checkpoints `hooks.checkpoint` keeps for their score: those of the n best.

    Args:
      metric: name in `state.metrics` at the steps that are saved; a score that is nan or inf does not count.
      mode: "max" if more is better, "min" if less is.
      n: how many.
    Raises:
      ValueError: the mode is none of the two, or n is not positive.
    Example:
      >>> keep_best("eval/accuracy", mode="max")
      KeepBest(metric='eval/accuracy', mode='max', n=1)
    """
    one_of("mode", mode, ("max", "min"))
    return KeepBest(metric, mode, whole("n", n, 1))


_of_the_best = keep_best  # `checkpoint` has an argument of that name


@attrs.frozen
class Checkpoint:
    """The parameters of the hook; called, it gives the live one."""

    directory: str
    name: str
    keep_last: int | None
    keep_every: int | None
    keep_best: tuple[KeepBest, ...]
    asynchronous: bool

    def __call__(self) -> AbstractContextManager[Hook]:
        return _living(_Periodic(self))

    def kept(self, steps: list[int], best: Collection[int]) -> set[int]:
        """The steps to keep, of those saved, newest first."""
        if self.keep_last is None and self.keep_every is None and not self.keep_best:
            return set(steps)
        every = {step for step in steps if self.keep_every is not None and step % self.keep_every == 0}
        return {*steps[: self.keep_last or 1], *every, *best}


class _Live:
    """The live hook of either kind; of several ranks that hold the same state, the first saves."""

    def __init__(self, record: "Checkpoint | BestCheckpoint") -> None:
        self.stack = ExitStack()
        self.directory, self.asynchronous = record.directory, record.asynchronous
        self.saver: Saver | None = None
        self.first = True  # of the ranks

    def open(self, state: TrainState, look: Callable[[Place], T]) -> T:
        """Take hold of the directory; returns what the first rank finds there, or raises on all ranks what it does."""
        ranks = state.run.ranks
        self.first = ranks.rank == 0

        def begin() -> Any:
            if self.first or ranks.sharded:
                saver = Saver(
                    place(self.directory), asynchronous=self.asynchronous, ranks=ranks if ranks.sharded else ALONE
                )
                self.saver = self.stack.enter_context(saver)
            return look(self.saver.root) if self.first and self.saver is not None else None

        return agreed_on(ranks, begin)[0]  # type: ignore[no-any-return]

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self.saver is not None:
                self.saver.check()  # at every step, whatever the gates: a failed save is told at once
            yield batch
            del batch  # or it would live until the next one is there

    def wait(self, state: TrainState) -> None:
        """Wait until what was saved is on the disk, on all ranks; what went wrong on one is raised on all."""
        agreed_on(state.run.ranks, nothing if self.saver is None else self.saver.wait)

    def write(self, state: TrainState, keep: Callable[[list[int]], Collection[int]]) -> None:
        if self.saver is None:
            return
        step, root = state.step, self.saver.root  # not the state: it would live until it is on the disk
        left = {later for later in self.saver.steps if later > step}  # by a roll-back
        self.saver.save(state, (lambda: retain(root, step, keep, left)) if self.first else lambda: None)


class _Periodic(_Live):
    def __init__(self, record: Checkpoint) -> None:
        super().__init__(record)
        self.record = record

    def start(self, state: TrainState) -> None:
        self.open(state, lambda root: refuse_later(root, state))

    def save(self, state: TrainState) -> TrainState | None:
        record, memory = self.record, {}
        for kept in record.keep_best:
            value = score(state, kept.metric)
            scores = dict(state.hooks[record.name].get(kept.metric, {}))
            memory[kept.metric] = kept.best(scores if value is None else scores | {str(state.step): value})
        new = remember(state, record.name, memory) if record.keep_best else None
        best = {int(step) for scores in memory.values() for step in scores}
        self.write(new or state, lambda steps: record.kept(steps, best))
        return new

    def finish(self, state: TrainState) -> None:
        for kept in self.record.keep_best:
            if not state.hooks[self.record.name].get(kept.metric):
                tell_unseen(state, self.record.name, kept.metric, "it counts only at the steps that are saved")
        self.wait(state)


@contextmanager
def _living(live: Any) -> Iterator[Hook]:
    """The hook of one run."""
    with live.stack:
        yield attrs.evolve(
            hook(before_train=live.start, after_step=live.save, after_train=live.finish), wrap_data=live.watch
        )


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
        raise TypeError(
            f"keep_best: got {keep_best!r}, expected ft.hooks.keep_best(metric, mode=...), or several of these"
        )
    if len({one.metric for one in best}) < len(best):
        raise ValueError(f"keep_best: got {best}, expected one for each metric")
    record = Checkpoint(
        os.fspath(directory),
        name,
        keep_last if keep_last is None else whole("keep_last", keep_last, 1),
        keep_every if keep_every is None else whole("keep_every", keep_every, 1),
        best,
        asynchronous,
    )
    remembers = {"init": _Nothing()} if best else {}
    return gates.at_end(
        gates.every(every, resource(record, name=name, makes="branch", needs=[_MEMORY], **_DECLARED, **remembers))
    )


@attrs.frozen
class _Nothing:
    """The memory at the start."""

    def __call__(self, state: TrainState) -> dict[str, Any]:
        del state
        return {}


@attrs.frozen
class BestCheckpoint:
    """The parameters of the hook; called, it gives the live one."""

    directory: str
    name: str
    best: KeepBest
    asynchronous: bool

    def __call__(self) -> AbstractContextManager[Hook]:
        return _living(_Best(self))


class _Best(_Live):
    def __init__(self, record: BestCheckpoint) -> None:
        super().__init__(record)
        self.record = record

    def start(self, state: TrainState) -> TrainState | None:
        """Bring memory and directory together: a kill may have come between the one and the other."""
        memory: Mapping[str, float] = state.hooks[self.record.name]
        best = max(map(int, memory), default=-1)
        missing = not self.open(state, partial(self.tidied, best)) and bool(memory)
        if missing and best == state.step:
            self.write(state, lambda _: [])
            return None
        if missing and self.first:
            _log.warning("%s: the best checkpoint (step %s) is not there; beginning anew", self.directory, best)
        return remember(state, self.record.name, {}) if missing else None

    def tidied(self, best: int, root: Place) -> bool:
        """Leave the checkpoint of the best step alone in the directory; whether it is there."""
        found = {step_of(path): path for path in complete(root)}
        for step, path in found.items():
            if step > best:
                set_aside(path, "former")  # of a run that is not this one's past
            elif step < best and best in found:
                remove(path)
        return best in found

    def save(self, state: TrainState) -> TrainState | None:
        value = score(state, self.record.best.metric)
        memory = state.hooks[self.record.name]
        if value is None or self.record.best.best({**memory, str(state.step): value}) == memory:
            return None
        new = remember(state, self.record.name, {str(state.step): value})
        self.write(new, lambda _: [])
        return new

    def finish(self, state: TrainState) -> TrainState | None:
        """After the last evaluation, which may have run at the end only."""
        failed = state.run.stop is not None and state.run.stop.kind == "error"
        new = None if failed else self.save(state)
        if not (new or state).hooks[self.record.name]:
            tell_unseen(state, self.record.name, self.record.best.metric, "list it after the hook that reports it")
        self.wait(state)
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
    record = BestCheckpoint(os.fspath(directory), name, _of_the_best(metric, mode=mode), asynchronous)
    needs = [attrs.evolve(_MEMORY, but=("best", "branch"))]  # several of them may follow each other
    return resource(record, name=name, makes="best", needs=needs, outlives=True, **_DECLARED, init=_Nothing())


def score(state: TrainState, metric: str) -> float | None:
    """A metric of the state as a number, None if it is not there or not finite."""
    value = metric_over_ranks(state, metric)
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def tell_unseen(state: TrainState, name: str, metric: str, advice: str) -> None:
    """Log at the end of a run that a metric never had a score: a misspelt one would otherwise never be noticed."""
    failed = state.run.stop is not None and state.run.stop.kind == "error"
    if state.step > state.run.start_step and not failed:
        _log.warning("%s: saw no %r that is finite; %s", name, metric, advice)


def refuse_later(root: Place, state: TrainState) -> None:
    """Refuse a directory from which another state than this run's would be resumed; damaged ones are put aside."""
    for path in readable(root):
        if step_of(path) <= state.step:
            return
        try:
            check_files(path)
        except SchemaError:
            raise
        except CheckpointError as error:
            _log.warning("%s", error)
            set_aside(path, "damaged")
        else:
            raise CheckpointError(
                f"{path}: is of a later step than this run's start ({state.step}), and would be resumed instead of "
                "what this run saves; start from ft.resume_or(state, directory), or give another directory"
            )
