"""The fold: state_n = reduce(step_fn, batches, state_0), with hooks around every step.

`states` is the lazy scan, `fit` its last element. Order of a step: batch, before_step, step function, after_step;
hooks in list order in every phase. `after_train` runs once for each hook, whatever ended the run.
"""

from collections.abc import Generator, Iterable
from typing import Any

from fntrain.core.callbacks import call
from fntrain.core.check import whole
from fntrain.core.hook import AnyHook, Hook, flatten
from fntrain.core.running import Running, check_order, stopped, with_any_stop, with_memory
from fntrain.core.source import END, Positioned
from fntrain.core.state import Run, StepFn, TrainState
from fntrain.core.wrapping import ranks_of


def fit(
    step_fn: StepFn,
    hooks: Iterable[AnyHook] = (),
    *,
    state: TrainState,
    data: Positioned | Iterable[Any],
    max_steps: int | None = None,
) -> TrainState:
    """Run a step function over data until `state.step` is `max_steps`, a hook stops, or finite data ends.

    Args:
      step_fn: (state, batch) -> state, from `ft.supervised_step` or written by hand with `state.advance(...)`.
      hooks: in the order in which they run.
      state: where to start; a resumed state goes on at its own step and position.
      data: an object with `.at(position)`; or an iterable, whose first batch is taken for number `state.position`.
      max_steps: the total to reach, not a number to add. None runs to the end of the data, which declares it finite.
    Returns:
      the last state, after `after_train`; its `run.stop` says why the run ended.
    Raises:
      DataExhaustedError: the data ended before `max_steps`.
      ValueError: hooks that don't fit together, a re-iterable given to a state that is under way, a step function
        that does not advance step and position by one.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(params={"w": state.params["w"] + batch})
      >>> start = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(())})
      >>> fit(step_fn, state=start, data=[1, 2, 3], max_steps=3).params["w"]
      tensor(6.)
    """
    run = states(step_fn, hooks, state=state, data=data, max_steps=max_steps)
    del state  # a resumed state that was copied in must not stay in memory for the whole run
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def states(
    step_fn: StepFn,
    hooks: Iterable[AnyHook] = (),
    *,
    state: TrainState,
    data: Positioned | Iterable[Any],
    max_steps: int | None = None,
) -> Generator[TrainState, None, TrainState]:
    """Yield the state after every step, lazily; arguments and errors as for `fit`.

    Leaving the loop early runs `after_train` and closes everything. The last state is yielded after `after_train`; with
    data declared finite it is out before the end is known, and `fit` alone returns it as `after_train` leaves it.

    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={"seen": batch})
      >>> start = ft.TrainState(step=0, position=0, seed=0, params={})
      >>> [s.metrics["seen"] for s in states(step_fn, state=start, data="abc", max_steps=2)]
      ['a', 'b']
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"state: got {type(state).__name__}, expected a TrainState (ft.init_state makes one)")
    max_steps = max_steps if max_steps is None else whole("max_steps", max_steps, 0)
    singles = list(flatten(hooks if isinstance(hooks, AnyHook) else list(hooks)))
    check_order(singles)
    ranks = ranks_of(step_fn)
    mine = [single for single in singles if ranks.rank == 0 or not single.main]
    outlives = {one.name: one.outlives for one in mine if one.name and one.outlives}
    run = Run(start_step=state.step, max_steps=max_steps, ranks=ranks, outlives=outlives)
    return _states(step_fn, mine, state.replace(run=run), data)


def _states(
    step_fn: StepFn, singles: list[Hook], state: TrainState, data: Positioned | Iterable[Any]
) -> Generator[TrainState, None, TrainState]:
    finite = state.run.max_steps is None  # whether the data decides where the run ends
    unseen = False  # whether the state was made by a step and not yielded yet
    with Running(singles, state.run.ranks) as run:
        run.open(state, data)
        before_step, after_step = run.phase("before_step"), run.phase("after_step")
        try:
            state = with_any_stop(call(run.phase("before_train"), with_memory(state, singles)))
            over = _over(state)
            while not over:
                batch = run.batches.next(state)
                if finite and run.data_ended(batch):
                    state = stopped(state, "done", f"data ended after {run.batches.given - (batch is not END)} batches")
                    break
                turns = [state.step + 1]  # the numbers of the steps for which gates are asked
                if before_step:
                    state = call(before_step, state, 1, turns)
                if state.position != run.batches.position - 1:
                    raise ValueError(
                        "hooks: a before_step moved the position, after its batch was read; use after_step"
                    )
                state, unseen = _step(step_fn, state, batch), True
                del batch  # drop our reference now, or two batches are alive while the next one is read
                if after_step:
                    state = call(after_step, state, 0, turns)
                if run.periods:
                    state = run.stop_agreed(state, turns)
                over = _over(state)
                if not over:
                    unseen = False
                    yield state
            state = stopped(state, "done", f"max_steps={state.run.max_steps} reached")
        except BaseException as error:
            run.abandon(state, error)
            raise
        state = run.finish(state)
    if unseen:  # with finite data the last state is out before the end is known
        yield state
    return state


def _over(state: TrainState) -> bool:
    run = state.run
    return run.stop is not None or (run.max_steps is not None and state.step >= run.max_steps)


def _step(step_fn: StepFn, state: TrainState, batch: Any) -> TrainState:
    try:
        new = step_fn(state, batch)
    except BaseException as error:
        error.add_note(f"in the step function, at step {state.step + 1} (batch number {state.position})")
        raise
    if not isinstance(new, TrainState):
        raise TypeError(f"step function: returned {type(new).__name__} at step {state.step + 1}, expected a TrainState")
    if new.step != state.step + 1 or new.position != state.position + 1:
        raise ValueError(
            f"step function: went from step {state.step}, position {state.position} to step {new.step}, position "
            f"{new.position}; expected both to grow by 1: return state.advance(...)"
        )
    return new if new.run is state.run else new.replace(run=state.run)
