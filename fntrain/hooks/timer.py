"""hooks.iteration_timer: seconds per step and per batch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from fntrain.hook import AnyHook, Hook, hook, resource
from fntrain.state import TrainState


@attrs.frozen
class IterationTimer:
    """The hook's value; called, it gives the live one, which holds the clock."""

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        clock = {"step_end": time.perf_counter(), "data": 0.0, "step_start": 0.0}

        def wrap_data(batches: Iterator[Any]) -> Iterator[Any]:
            while True:
                start = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                clock["data"] = time.perf_counter() - start
                yield batch
                del batch  # or it would live until the next one is there

        def before_step(_: TrainState) -> None:
            clock["step_start"] = time.perf_counter()

        def after_step(state: TrainState) -> TrainState:
            now = time.perf_counter()
            times = {
                "time/step": now - clock["step_start"],
                "time/data": clock["data"],
                "time/total": now - clock["step_end"],
            }
            clock["step_end"] = now
            return state.replace(metrics={**state.metrics, **times})

        yield attrs.evolve(hook(before_step=before_step, after_step=after_step), wrap_data=wrap_data)


def iteration_timer(*, name: str = "iteration_timer") -> AnyHook:
    """Report how long steps take, in seconds; list it first.

    `time/step` is the step function, `time/data` the wait for the batch, `time/total` from step to step with data and
    all hooks. On a GPU the step's time is that of launching it; over many steps `time/total` is the true cost.

    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={})
      >>> sorted(ft.fit(step_fn, [iteration_timer()], state=state, data=[1, 2], max_steps=2).metrics)
      ['time/data', 'time/step', 'time/total']

    Source: detectron2's IterationTimer
    """
    return resource(IterationTimer(), name=name, reports=True)
