"""hooks.write_metrics: hand what the steps report to writers, smoothed, every n steps."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any, Literal, get_args

import attrs
import torch
from torch import Tensor

from fntrain.core.check import whole
from fntrain.core.hook import AnyHook, Hook, Needs, hook, resource
from fntrain.core.metrics import WEIGHT, combined
from fntrain.core.ranks import Ranks
from fntrain.core.state import TrainState
from fntrain.steps.grads import stalls
from fntrain.writers import Row, Writer, WriteRow
from fntrain.writers.history import History

Smoothing = Literal["median", "mean", "latest", "global_mean"]
WINDOWED = ("median", "mean")


@attrs.frozen
class WriteMetrics:
    """The hook's value; called, it gives the live one, which holds the window and opens the writers."""

    writers: tuple[Writer, ...]
    every: int
    window: int
    smoothing: Smoothing | Mapping[str, Smoothing]

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        with ExitStack() as stack:
            live = _Live(self, stack)
            yield hook(after_step=live.record, after_train=live.finish)


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
    for writer in several:
        if not callable(getattr(writer, "open", None)):
            raise TypeError(
                f"writers: got {type(writer).__name__}, expected ft.writers.default(...) or records with `open`"
            )
    for asked in smoothing.values() if isinstance(smoothing, Mapping) else (smoothing,):
        if asked not in get_args(Smoothing):
            raise ValueError(f"smoothing: got {asked!r}, expected one of {', '.join(get_args(Smoothing))}")
    record = WriteMetrics(several, every, window, smoothing)
    return resource(record, name=name, needs=[Needs("metrics", "would not see them")], communicates=True, stops=False)


class _Live:
    """What the hook holds during one run: values not yet written, and the open writers."""

    def __init__(self, settings: WriteMetrics, stack: ExitStack) -> None:
        self.settings = settings
        self.stack = stack
        self.writes: list[WriteRow] = []
        self.pending: list[tuple[int, Mapping[str, Any]]] = []  # of steps that reported the usual names
        self.usual: frozenset[str] = frozenset()
        self.windows: dict[str, deque[tuple[int, Any]]] = {}
        self.last: Mapping[str, Any] = {}
        self.each: dict[tuple[int, str], Any] = {}
        self.media: dict[int, dict[str, Any]] = {}
        self.sums: dict[str, list[tuple[int, float]]] = {}  # of all values up to a step, for means over the run
        self.written = self.newest = self.valid = -1
        self.opened = False

    def open(self, state: TrainState) -> None:
        """Open the writers, at the first step: a run that is refused or has nothing to do leaves their files alone."""
        self.written = self.valid = state.run.start_step
        self.opened = True
        for writer in self.settings.writers if state.run.ranks.rank == 0 else ():
            self.writes.append(self.stack.enter_context(writer.open(state.run.start_step)))

    def record(self, state: TrainState) -> None:
        if not self.opened:
            self.open(state)
        if state.step <= self.newest:
            self.forget(state.step - 1)
        self.newest, self.last = state.step, state.metrics
        self.pending.append((state.step, state.metrics))
        if state.step == state.run.max_steps:
            return  # written by finish, together with what hooks still report at the end
        if state.step % self.settings.every == 0:
            self.write(state)
        elif state.metrics.keys() != self.usual or len(self.pending) > self.settings.window:
            self.sort()
            if self.each:
                self.write_each(state)  # at once: kept until the next period, a kill would lose it

    def forget(self, step: int) -> None:
        """Drop what was measured after a step: the run was rolled back to it."""
        self.sort()
        for values in (*self.windows.values(), *self.sums.values()):
            while values and values[-1][0] > step:
                values.pop()
        self.each = {key: value for key, value in self.each.items() if key[0] <= step}
        self.media = {at: media for at, media in self.media.items() if at <= step}
        self.written, self.valid = min(self.written, step), min(self.valid, step)

    def finish(self, state: TrainState) -> None:
        """Write what is left, with what hooks reported after the last step."""
        if self.newest >= 0 and state.step > state.run.start_step:
            rolled_back = state.step < self.newest
            if rolled_back:
                self.forget(state.step - 1)
            last = {} if rolled_back or state.step > self.newest else self.last
            new = {name: value for name, value in state.metrics.items() if value is not last.get(name)}
            self.sort()
            self.pending.append((state.step, new))
            self.write(state)

    def sort(self) -> None:
        """Put what steps reported where it belongs: several steps at once, as doing it at each costs them more."""
        if not self.pending:
            return
        *rows, last = self.pending
        self.pending = []
        for same in (rows, [last]):
            for name in same[0][1] if same else ():
                self.take(name, [(step, metrics[name]) for step, metrics in same])
        if not any(getattr(name, "smooth", "") == "each" for name in last[1]):
            self.usual = frozenset(last[1])

    def take(self, name: str, values: list[tuple[int, Any]]) -> None:
        smooth = self.smoothing(name)
        size = {"latest": 1}.get(smooth, self.settings.window if smooth in WINDOWED else None)
        if smooth != "each" and {type(value) for _, value in values} == {float}:  # times: the most of what there is
            self.windows.setdefault(name, deque(maxlen=size)).extend(values)
            return
        for step, value in values:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    f"metrics[{name!r}]: got shape {tuple(value.shape)} at step {step}, expected one number"
                )
            if not isinstance(value, (Tensor, int, float)):
                self.media.setdefault(step, {})[name] = value
            elif smooth == "each":
                self.each[step, name] = value
            else:
                self.windows.setdefault(name, deque(maxlen=size)).append((step, value))

    def smoothing(self, name: str) -> str:
        """How a metric is shown: what the settings say of it, or what it says of itself."""
        hint: str = getattr(name, "smooth", "median")
        asked = self.settings.smoothing
        if isinstance(asked, Mapping):
            fitting = (kind for pattern, kind in asked.items() if fnmatchcase(name, pattern))
            return hint if hint == "each" else next(fitting, hint)
        return asked if hint == "median" else hint

    def write(self, state: TrainState) -> None:
        """One row per step that has results of its own, and one for the period."""
        self.sort()
        self.combine(state.run.ranks)
        for name, values in self.windows.items():
            windowed = self.smoothing(name) in WINDOWED
            while values and values[0][0] <= (state.step - self.settings.window if windowed else self.written):
                values.popleft()
        recent = {name: values for name, values in self.windows.items() if values and values[-1][0] > self.written}
        columns = {name: tuple(zip(*values, strict=True)) for name, values in recent.items()}  # steps, values
        numbers = to_host([*self.each.values(), *(value for _, values in columns.values() for value in values)])
        rows: dict[int, dict[str, float]] = {step: {} for step in self.media}
        for (step, name), number in zip(self.each, numbers, strict=False):
            rows.setdefault(step, {})[name] = number
        histories, start = {}, len(self.each)
        for name, (steps, _) in columns.items():
            histories[name] = History(steps, tuple(numbers[start : start + len(steps)]))
            start += len(steps)
        smoothed = {name: self.smoothed(name, history) for name, history in histories.items()}
        if smoothed:
            rows[state.step] = smoothed | rows.get(state.step, {})
        for step in sorted(rows):
            periodic = step == state.step
            self.emit(state, step, rows[step], self.media.get(step, {}), histories if periodic else {})
        self.each, self.media, self.written = {}, {}, state.step

    def combine(self, ranks: Ranks) -> None:
        """Put in place of what this rank measured since the last write what all ranks did; the others forget it."""
        if ranks.world_size == 1:
            return
        fresh = [
            (name, step, value)
            for name, values in self.windows.items()
            for step, value in values
            if step > self.written
        ]
        numbers = to_host([value for *_, value in fresh])
        mine = [(name, step, number) for (name, step, _), number in zip(fresh, numbers, strict=True)]
        everyone = ranks.gather(mine, only_first=True)
        weights = [{step: number for name, step, number in theirs if name == WEIGHT} for theirs in everyone]
        parts: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for theirs, weight in zip(everyone, weights, strict=True):
            for name, step, number in theirs:
                parts.setdefault((name, step), []).append((number, weight.get(step, 1.0)))
        for values in self.windows.values():
            while values and values[-1][0] > self.written:
                values.pop()
        for name, step in sorted(parts, key=itemgetter(1)):
            self.take(name, [(step, combined(name, parts[name, step]))])
        self.windows.pop(WEIGHT, None)

    def write_each(self, state: TrainState) -> None:
        """The results of this step alone, between two periods."""
        scalars = dict(zip((name for _, name in self.each), to_host(list(self.each.values())), strict=True))
        self.emit(state, state.step, scalars, self.media.pop(state.step, {}), {})
        self.each = {}

    def smoothed(self, name: str, history: History) -> float:
        """The one number that stands for the values of a period or window."""
        match self.smoothing(name):
            case "median":
                return history.median()
            case "mean":
                return history.average()
            case "sum":
                return sum(history.numbers)
            case "global_mean":
                sums = self.sums.setdefault(name, [])
                for step, number in history.values():
                    sums.append((step, number + (sums[-1][1] if sums else 0.0)))
                return sums[-1][1] / len(sums)
        return history.latest()

    def emit(
        self,
        state: TrainState,
        step: int,
        scalars: Mapping[str, float],
        media: Mapping[str, Any],
        histories: Mapping[str, History],
    ) -> None:
        row = Row(
            step=step,
            max_steps=state.run.max_steps,
            scalars=scalars,
            media=media,
            periodic=bool(histories),
            histories=histories,
            valid_step=self.valid,
        )
        for write in self.writes:
            write(row)
        self.valid = max(self.valid, step)


def to_host(values: list[Any]) -> list[float]:
    """Numbers of the values, in order; of those on a device by one stacked transfer for each dtype."""
    from toolz import groupby  # 4 ms to import: only where it is used

    numbers, waiting = [], []
    for index, value in enumerate(values):
        waits = isinstance(value, Tensor) and stalls(value)
        numbers.append(0.0 if waits else float(value.item() if isinstance(value, Tensor) else value))
        if waits:
            waiting.append(index)
    groups = groupby(lambda index: (values[index].device, values[index].dtype), waiting)
    for indices in groups.values():
        stacked = torch.stack([values[index].detach().reshape(()) for index in indices]).tolist()
        for index, number in zip(indices, stacked, strict=True):
            numbers[index] = float(number)
    return numbers
