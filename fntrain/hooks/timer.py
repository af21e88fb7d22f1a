"""hooks.iteration_timer: seconds per step and per batch."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from fntrain.core.check import whole
from fntrain.core.hook import AnyHook, Hook, hook, resource
from fntrain.core.state import TrainState
from fntrain.events import MetricName
from fntrain.writers.process import duration

_log = logging.getLogger("fntrain")
DATA = MetricName("time/data", reduce="max")  # all ranks wait for the slowest


@attrs.frozen
class IterationTimer:
    """The parameters of the hook; called, it gives the live one, which holds the clock."""

    warmup_steps: int

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        clock = _Clock(self.warmup_steps)
        try:
            yield hook(before_step=clock.before_step, after_step=clock.after_step, wrap_data=clock.wrap_data)
        finally:
            clock.finish()  # opened first, this hook closes last, so the time of other hooks at the end counts


class _Clock:
    """What the hook holds during one run: when the step began, and the seconds of all steps after the warm-up."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.num_steps = 0
        self.data = self.steps = self.hooks = 0.0
        self.begin = self.end = time.perf_counter()
        self.in_hooks = False  # whether the time since `end` is that of hooks

    def wrap_data(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            self.hooks += start - self.end if self.in_hooks else 0.0  # the hooks of the step before
            self.in_hooks = False
            try:
                batch = next(batches)
            except StopIteration:
                self.end, self.in_hooks = time.perf_counter(), True
                return
            self.data = time.perf_counter() - start
            yield batch
            del batch  # drop our reference now, or two batches are alive while the next is read

    def before_step(self, _: TrainState) -> None:
        self.begin = time.perf_counter()

    def after_step(self, state: TrainState) -> TrainState:
        now = time.perf_counter()
        step = now - self.begin
        times = {"time/step": step, DATA: self.data, "time/total": now - self.end}
        self.num_steps += 1
        self.end, self.in_hooks = now, self.num_steps > self.warmup_steps
        if self.in_hooks:
            self.steps += step + self.data
        return state.replace(metrics={**state.metrics, **times})

    def finish(self) -> None:
        num_steps = self.num_steps - self.warmup_steps
        if num_steps <= 0:
            return
        # If a step has raised, the time since `end` is that of the step, and does not count.
        hooks = self.hooks + (time.perf_counter() - self.end if self.in_hooks else 0.0)
        steps, total, in_hooks = map(duration, (self.steps, self.steps + hooks, hooks))
        text = "%d steps in %s (%.3g s / step); total %s, %s in hooks"
        _log.info(text, num_steps, steps, self.steps / num_steps, total, in_hooks)


def iteration_timer(*, warmup_steps: int = 3, name: str = "iteration_timer") -> AnyHook:
    """Report how long steps take, in seconds; list it first.

    `time/step` is the step function, `time/data` the wait for the batch, `time/total` from step to step with data and
    all hooks. On a GPU the step's time is that of launching it; over many steps `time/total` is the true cost. When
    the run ends, however it does, one line at level INFO of the logger "fntrain" sums up the steps of this start, as
    in "50 steps in 0:00:12 (0.24 s / step); total 0:00:14, 0:00:02 in hooks": steps with their data, then with hooks.

    Args:
      warmup_steps: number of steps at the start that the last line leaves out; a run of no more has none.
      name: unique in a run.
    Raises:
      ValueError: `warmup_steps` is negative.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={})
      >>> sorted(ft.fit(step_fn, [iteration_timer()], state=state, data=[1, 2], max_steps=2).metrics)
      ['time/data', 'time/step', 'time/total']

    Source: detectron2's IterationTimer
    """
    return resource(IterationTimer(whole("warmup_steps", warmup_steps, 0)), name=name, makes="metrics", stops=False)
