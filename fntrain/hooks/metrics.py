"""hooks.write_metrics: hand what the steps report to writers, smoothed, every n steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any, get_args

import attrs
from toolz import groupby, keyfilter, valfilter
from torch import Tensor

from fntrain.core.check import one_of, whole
from fntrain.core.hook import AnyHook, Hook, Needs, hook, resource
from fntrain.core.ranks import Ranks
from fntrain.core.state import TrainState
from fntrain.events import Smooth
from fntrain.hooks.series import Series, Smoothing, to_histories, to_host
from fntrain.metrics import WEIGHT, combined
from fntrain.writers import Row, Writer, WriteRow
from fntrain.writers.history import History


@attrs.frozen
class WriteMetrics:
    """The parameters of the hook; called, it gives the live one, which holds the values and opens the writers."""

    writers: tuple[Writer, ...]
    every: int
    window: int
    smoothing: Smoothing | Mapping[str, Smoothing]

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        with ExitStack() as stack:
            log = MetricsLog(self, stack)
            yield hook(after_step=log.record, after_train=log.finish)


def write_metrics(
    writers: Writer | Sequence[Writer],
    *,
    every: int = 20,
    window: int = 20,
    smoothing: Smoothing | Mapping[str, Smoothing] = "median",
    name: str = "write_metrics",
) -> AnyHook:
    """Write the metrics of the steps every n steps and after the last one; list it after hooks that report.

    Of several ranks the first writes; what each reported of its part of the batch is combined as the metric's name
    says (mean, weighted like the loss, sum, max or min), by one exchange per write.

    A metric is shown as the median of its values in the last `window` steps, or as `smoothing` says; learning rates
    and other unsmoothed ones as the latest; results of `evaluate` each at its own step. Tensors wait on their device
    and are transferred together, once per write: between writes nothing synchronises.

    Args:
      writers: one or several of `ft.writers`.
      every: number of steps between two writes.
      window: number of steps that a median or mean covers.
      smoothing: "median", "mean", "latest" or "global_mean" (of all steps since this start of the run) of the metrics
        that do not say so themselves; or a dict from names or patterns (`*` matches "/" too; the first that fits
        counts) to one of them, also for those that do. Evaluations stay as they are.
      name: unique in a run.
    Raises:
      ValueError: `every` or `window` is not positive, or an unknown smoothing.
      TypeError: a writer has no `open`.
    Example:
      >>> write_metrics(ft.writers.console(), every=20)
      WriteMetrics(writers=(Console(),), every=20, window=20, smoothing='median')

    Source: detectron2's PeriodicWriter and EventStorage
    """
    every, window = whole("every", every, 1), whole("window", window, 1)
    several = tuple(writers) if isinstance(writers, Sequence) else (writers,)
    if wrong := [type(one).__name__ for one in several if not callable(getattr(one, "open", None))]:
        raise TypeError(f"writers: got {wrong[0]}, expected ft.writers.default(...) or records with `open`")
    for asked in smoothing.values() if isinstance(smoothing, Mapping) else (smoothing,):
        one_of("smoothing", asked, get_args(Smoothing), f"one of {', '.join(get_args(Smoothing))}")
    record = WriteMetrics(several, every, window, smoothing)
    return resource(record, name=name, needs=[Needs("metrics", "would not see them")], communicates=True, stops=False)


class MetricsLog:
    """What the hook holds during one run: what the steps reported and is not written yet."""

    def __init__(self, settings: WriteMetrics, stack: ExitStack) -> None:
        self.settings = settings
        self.stack = stack  # closes the writers
        self.writes: list[WriteRow] = []  # of the open writers
        self.valid = -1  # rows of later steps, if written already, do not hold: the run was rolled back
        self.pending: list[tuple[int, Mapping[str, Any]]] = []  # reports of steps, not sorted into series yet
        self.usual: frozenset[str] = frozenset()  # the names that most steps report
        self.last: Mapping[str, Any] = {}
        self.series: dict[str, Series] = {}
        self.media: dict[int, dict[str, Any]] = {}
        self.newest = self.written = -1  # the last step that reported, and the last that was written

    def record(self, state: TrainState) -> None:
        if self.written < 0:  # a run that is refused, or has nothing to do, must leave the writers' files alone
            self.open(state)
        if state.step <= self.newest:
            self.forget(state.step - 1)
        self.newest, self.last = state.step, state.metrics
        self.pending.append((state.step, state.metrics))
        if state.step == state.run.max_steps:
            return  # `finish` writes this step, together with what hooks report at the end
        if state.step % self.settings.every == 0:
            self.write(state)
        elif state.metrics.keys() != self.usual or len(self.pending) > self.settings.window:
            self.sort()
            if results := self.results():  # written now: a kill before the next period would lose them
                self.write_results(state, results)

    def open(self, state: TrainState) -> None:
        """Open the writers, on the first rank."""
        self.written = self.valid = state.run.start_step
        writers = self.settings.writers if state.run.ranks.rank == 0 else ()
        self.writes = [self.stack.enter_context(writer.open(state.run.start_step)) for writer in writers]

    def forget(self, step: int) -> None:
        """Drop what was measured after a step: the run was rolled back to it."""
        self.sort()
        for one in self.series.values():
            one.forget(step)
        self.media = {at: media for at, media in self.media.items() if at <= step}
        self.written, self.valid = min(self.written, step), min(self.valid, step)

    def finish(self, state: TrainState) -> None:
        """Write what is left, with what hooks reported after the last step."""
        if self.newest < 0 or state.step <= state.run.start_step:
            return
        rolled_back = state.step < self.newest
        if rolled_back:
            self.forget(state.step - 1)
        last = {} if rolled_back or state.step > self.newest else self.last
        new = {name: value for name, value in state.metrics.items() if value is not last.get(name)}
        self.sort()
        self.pending.append((state.step, new))
        self.write(state)

    def sort(self) -> None:
        """Sort reports into series: of several steps at once, which costs them less than one by one."""
        if not self.pending:
            return
        *rows, last = self.pending
        self.pending = []
        for same in (rows, [last]):  # `record` sorts as soon as names change, so all but the last have the same
            for name in same[0][1] if same else ():
                self.take(name, [(step, metrics[name]) for step, metrics in same])
        if not any(getattr(name, "smooth", "") == "each" for name in last[1]):
            self.usual = frozenset(last[1])

    def take(self, name: str, values: list[tuple[int, Any]]) -> None:
        """Add values of one metric to its series, or to the media."""
        if name not in self.series:
            self.series[name] = Series(self.shown(name), self.settings.window)
        kept = self.series[name].values
        if {type(value) for _, value in values} == {float}:  # the usual case, such as times, needs no check of each
            kept.extend(values)
            return
        for step, value in values:
            if isinstance(value, Tensor) and value.numel() != 1:
                shape = tuple(value.shape)
                raise ValueError(f"metrics[{name!r}]: got shape {shape} at step {step}, expected one number")
            if isinstance(value, (Tensor, int, float)):
                kept.append((step, value))
            else:
                self.media.setdefault(step, {})[name] = value

    def shown(self, name: str) -> Smoothing | Smooth:
        """Return how a metric is shown: as the settings say, or else as its own name says."""
        hint: Smooth = getattr(name, "smooth", "median")
        asked = self.settings.smoothing
        if isinstance(asked, Mapping):
            fitting = (kind for pattern, kind in asked.items() if fnmatchcase(name, pattern))
            return hint if hint == "each" else next(fitting, hint)
        return asked if hint == "median" else hint

    def results(self) -> dict[str, Series]:
        """Return the series in which every value is shown at its own step, such as results of evaluations."""
        return {name: one for name, one in self.series.items() if one.values and one.shown == "each"}

    def write(self, state: TrainState) -> None:
        """Write one row for each step that has results of its own, and one for the period."""
        self.sort()
        self.combine(state.run.ranks)
        results = self.results()
        others = keyfilter(lambda name: name not in results, self.series)
        for one in others.values():
            one.trim(self.written, state.step)
        fresh = valfilter(lambda one: bool(one.since(self.written)), others)
        histories = to_histories({**results, **fresh})
        rows: dict[int, dict[str, float]] = {step: {} for step in self.media}
        for name in results:
            for step, number in histories.pop(name).values():
                rows.setdefault(step, {})[name] = number
        if histories:
            smoothed = {name: self.series[name].number(history) for name, history in histories.items()}
            rows[state.step] = smoothed | rows.get(state.step, {})
        for step in sorted(rows):
            self.write_row(state, step, rows[step], histories if step == state.step else {})
        self.written = state.step
        clear(results)

    def write_results(self, state: TrainState, results: dict[str, Series]) -> None:
        """Write the results of this step alone, between two periods."""
        scalars = {name: history.latest() for name, history in to_histories(results).items()}
        self.write_row(state, state.step, scalars, {})
        clear(results)

    def write_row(
        self, state: TrainState, step: int, scalars: Mapping[str, float], histories: Mapping[str, History]
    ) -> None:
        """Write one row; only the row of a period has histories."""
        values: dict[str, Any] = {"scalars": scalars, "media": self.media.pop(step, {}), "histories": histories}
        row = Row(step=step, max_steps=state.run.max_steps, periodic=bool(histories), valid_step=self.valid, **values)
        for write in self.writes:
            write(row)
        self.valid = max(self.valid, step)

    def combine(self, ranks: Ranks) -> None:
        """Replace the values of this rank since the last write by those of all ranks; only rank 0 keeps them."""
        if ranks.world_size == 1:
            return
        measured = valfilter(lambda one: one.shown != "each", self.series)
        fresh = [(name, *pair) for name, one in measured.items() for pair in one.since(self.written)]
        numbers = to_host([value for *_, value in fresh])
        mine = [(name, step, number) for (name, step, _), number in zip(fresh, numbers, strict=True)]
        parts = []
        for theirs in ranks.gather(mine, only_first=True):
            weights = {step: number for name, step, number in theirs if name == WEIGHT}
            parts += [(name, step, number, weights.get(step, 1.0)) for name, step, number in theirs]
        for one in measured.values():
            one.forget_values(self.written)
        groups = groupby(itemgetter(0, 1), parts)
        for name, step in sorted(groups, key=itemgetter(1)):
            self.take(name, [(step, combined(name, [part[2:] for part in groups[name, step]]))])
        self.series.pop(WEIGHT, None)


def clear(results: dict[str, Series]) -> None:
    """Drop the values of results that are written."""
    for one in results.values():
        one.values.clear()
