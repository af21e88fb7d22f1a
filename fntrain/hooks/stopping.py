"""hooks.early_stopping: stop when a metric gets no better. hooks.stop_when: stop when a predicate holds."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from fntrain.core.check import function, number, one_of, whole
from fntrain.core.hook import AnyHook, Hook, Predicate, hook, stateful
from fntrain.core.state import TrainState, remember, stop
from fntrain.hooks.retention import Mode
from fntrain.metrics import metric_over_ranks

_log = logging.getLogger("fntrain")


def early_stopping(
    metric: str, *, mode: Mode, patience: int, min_delta: float = 0.0, name: str = "early_stopping"
) -> AnyHook:
    """Stop when a metric has not got better in `patience` reports; list it after the hook that reports the metric.

    Steps without the metric do not count, nor does an evaluation that runs only because the run ends. A score that is
    nan or inf is no improvement and never the best. The best score, its step and the count are in the state: a run that
    was stopped stops at once if it is resumed, and goes on if it is given more patience. Looking at a metric that lies
    on a GPU waits for it: for one that every step reports, `ft.every(100, early_stopping("loss", ...))`.

    Args:
      metric: name in `state.metrics`.
      mode: "max" if more is better, "min" if less is.
      patience: number of reports in a row without improvement after which to stop.
      min_delta: how much better than the best is better, in the metric's unit.
      name: unique in a run; `state.hooks[name]` has "best", "step" and "waited".
    Raises:
      ValueError: the mode is none of the two, patience is not positive, or min_delta is negative.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={"error": batch})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={})
      >>> hook = early_stopping("error", mode="min", patience=2)
      >>> ft.fit(step_fn, [hook], state=state, data=[3.0, 2.0, 2.5, 2.0, 1.0], max_steps=5).run.stop.reason
      'early_stopping: error has not got better in 2 reports than 2 at step 2'

    Source: Prechelt 1998, "Early Stopping - But When?"
    """
    one_of("mode", mode, ("max", "min"))
    number("min_delta", min_delta, lambda delta: delta >= 0, ">= 0")
    record = EarlyStopping(metric, mode, whole("patience", patience, 1), min_delta, name)
    start = {"best": None, "step": None, "waited": 0}
    return stateful(name, start, open=record, communicates=True, stops=False)  # all ranks decide on the same number


def stop_when(predicate: Predicate, reason: str, *, name: str = "stop_when") -> AnyHook:
    """Stop after the first step at which a predicate of the state holds; all other hooks still run at that step.

    Args:
      predicate: state -> bool. Metrics that only some steps report are best read with `state.metrics.get`.
      reason: what `final.run.stop` is to say; an earlier request of the same step stays.
      name: unique in a run.
    Raises:
      TypeError: the predicate can't be called, or the reason is no text.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={"loss": batch})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={})
      >>> hook = stop_when(lambda state: state.metrics["loss"] < 0.1, "loss is below 0.1")
      >>> final = ft.fit(step_fn, [hook], state=state, data=[0.5, 0.01, 0.2], max_steps=3)
      >>> final.step, final.run.stop
      (2, Stop(kind='requested', reason='loss is below 0.1'))
    """
    function("predicate", predicate, "a function of the state")
    if not isinstance(reason, str):
        raise TypeError(f"reason: got {type(reason).__name__}, expected a text")
    return hook(after_step=StopWhen(predicate, reason), name=name)


@attrs.frozen
class EarlyStopping:
    """The parameters of the hook; its memory is the best score, its step, and how many reports came since."""

    metric: str
    mode: Mode
    patience: int
    min_delta: float
    name: str

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        # Also before the first step: a run that this hook has stopped must stop again when it is resumed.
        yield hook(before_train=self.stopped, after_step=self.count, after_train=self.warn_unseen)

    def count(self, state: TrainState) -> TrainState | None:
        """Note the score that the state reports; if there have been too many no better than the best, ask to stop."""
        found = metric_over_ranks(state, self.metric)
        if found is None:
            return None
        value, memory = float(found), state.hooks[self.name]
        if self.improves(value, memory["best"]):
            return remember(state, self.name, {"best": value, "step": state.step, "waited": 0})
        return self.stopped(remember(state, self.name, {**memory, "waited": memory["waited"] + 1}))

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best by more than `min_delta`; inf and nan are not."""
        if best is None or not math.isfinite(value):
            return math.isfinite(value)  # the first finite score is the best
        return value > best + self.min_delta if self.mode == "max" else value < best - self.min_delta

    def stopped(self, state: TrainState) -> TrainState:
        """Return the state; it asks to stop if there is no patience left."""
        memory: Any = state.hooks[self.name]
        if memory["waited"] < self.patience:
            return state
        reason = f"{self.name}: {self.metric} has not got better in {memory['waited']} reports"
        if memory["best"] is None:
            return stop(state, f"{reason}: it was never a finite number")
        return stop(state, f"{reason} than {memory['best']:.6g} at step {memory['step']}")

    def warn_unseen(self, state: TrainState) -> None:
        """Warn if no step reported the metric: otherwise a misspelt name is never noticed."""
        memory: Any = state.hooks[self.name]
        failed = state.run.stop is not None and state.run.stop.kind == "error"
        if memory["best"] is None and not memory["waited"] and state.step > state.run.start_step and not failed:
            _log.warning("%s: saw no %r; list it after the hook that reports it", self.name, self.metric)


@attrs.frozen
class StopWhen:
    """The callback of `stop_when`."""

    predicate: Predicate
    reason: str

    def __call__(self, state: TrainState) -> TrainState | None:
        return stop(state, self.reason) if self.predicate(state) else None
