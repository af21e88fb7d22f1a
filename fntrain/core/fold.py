"""The fold: state_n = reduce(step_fn, batches, state_0), with hooks around every step.

`states` is the lazy scan, `fit` its last element. Order of a step: batch, before_step, step function, after_step;
hooks in list order in every phase. `after_train` runs once for each hook, whatever ended the run.
"""

import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import attrs

from fntrain.core import tree
from fntrain.core.check import whole
from fntrain.core.hook import PHASES, AnyHook, Callback, Gated, Hook, flatten
from fntrain.core.ranks import ALONE
from fntrain.core.source import END, Batches, Positioned, shared
from fntrain.core.state import SAVED, Run, StepFn, Stop, TrainState, named_leaves

Gate = Callable[[TrainState, int], bool]
Phase = list[tuple[Gated, Callback, Gate | None]]


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
    singles = [_as_gated(single) for single in flatten(hooks if isinstance(hooks, AnyHook) else list(hooks))]
    _check_order(singles)
    ranks = getattr(step_fn, "ranks", ALONE)
    mine = [single for single in singles if ranks.rank == 0 or not single.main]
    run = Run(start_step=state.step, max_steps=max_steps, ranks=ranks)
    return _states(step_fn, mine, state.replace(run=run), data)


def _states(
    step_fn: StepFn, singles: list[Gated], state: TrainState, data: Positioned | Iterable[Any]
) -> Generator[TrainState, None, TrainState]:
    max_steps, ranks = state.run.max_steps, state.run.ranks
    asking = _asking(singles) if ranks.world_size > 1 else set()
    opened: list[AbstractContextManager[Any]] = []
    batches = None
    unseen = False  # whether the state was made by a step and not yielded yet
    try:
        if ranks.world_size > 1:
            _check_alike(state, singles, data)
            data = shared(data, ranks)
        live = [_opened(single, opened) for single in singles]
        batches = Batches(data, [one.hook.wrap_data for one in live if one.hook.wrap_data])
        ran: dict[int, int] = {}
        before_step, after_step = _phase(live, "before_step"), _phase(live, "after_step", ran)
        try:
            state = _agreed(_call(_phase(live, "before_train"), _with_memory(state, singles), None))
            while state.run.stop is None and (max_steps is None or state.step < max_steps):
                batch = batches.next(state)
                ended = batch is END
                if ranks.max(ended) if max_steps is None else ended:  # all ask: the data may end on one rank first
                    state = _stopped(state, "done", f"data ended after {batches.given - (not ended)} batches")
                    break
                state = _call(before_step, state, 1)
                if state.position != batches.position - 1:
                    raise ValueError(
                        "hooks: a before_step moved the position, after its batch was read; use after_step"
                    )
                state, unseen = _step(step_fn, state, batch), True
                del batch  # or it would live until the next one is there: one batch of memory
                state = _call(after_step, state, 0)
                if asking and any(state.step % period == 0 for period in asking):
                    state = _agreed(state)
                if state.run.stop is None and (max_steps is None or state.step < max_steps):
                    unseen = False
                    yield state
            state = _stopped(state, "done", f"max_steps={max_steps} reached")
        except GeneratorExit as leaving:
            # An error in the loop over the states, of this rank perhaps alone, closes them while it is on its way.
            error: BaseException | None = leaving
            while isinstance(error, GeneratorExit):  # or generators around this one are closed
                error = error.__context__
            error = error if ranks.world_size > 1 else None
            _finish(live, ran, _stopped(state, "requested", "states() was left early"), error)
            raise
        except BaseException as wrong:
            _finish(live, ran, _stopped(state, "error", f"{type(wrong).__name__}: {wrong}"), wrong)
            raise
        state = _finish(live, ran, state, None)
    except BaseException as error:
        _close(opened, batches, error)
        raise
    _close(opened, batches, None)
    if unseen:  # with finite data the last state is out before the end is known
        yield state
    return state


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


def _call(phase: Phase, state: TrainState, offset: int | None) -> TrainState:
    """Run the callbacks of one phase; with an offset, those whose gates are open for step `state.step + offset`."""
    for gated, callback, gate in phase:
        try:
            if gate is None or offset is None or gate(state, state.step + offset):
                new = callback(state)
                if new is not None:
                    state = _accept(gated, state, new)
        except BaseException as error:
            called = getattr(callback, "__qualname__", repr(callback))
            error.add_note(f"in {called} of hook {gated.hook.name or gated.hook!r}, at step {state.step}")
            raise
    return state


def _accept(gated: Gated, old: TrainState, new: TrainState) -> TrainState:
    """A hook's new state, if it is one it may return. `run` belongs to the fold: a stop may be added, not undone."""
    if not isinstance(new, TrainState):
        raise TypeError(f"{gated.hook!r}: returned {type(new).__name__}, expected a TrainState or None")
    if gated.main:
        for field in attrs.fields(TrainState):
            if field.name != "metrics" and getattr(new, field.name) is not getattr(old, field.name):
                raise ValueError(f"on_main: {gated.hook!r} changed {field.name}; on one rank only metrics may change")
    if new.run is old.run:
        return new
    asked = new.run.stop
    if old.run.stop is None and asked is not None and asked.kind == "requested":
        return new.replace(run=attrs.evolve(old.run, stop=asked))
    return new.replace(run=old.run)


def _finish(live: list[Gated], ran: dict[int, int], state: TrainState, error: BaseException | None) -> TrainState:
    """Run `after_train` of every hook, each after its `at_end`; `ran` says at which step an at_end hook ran last."""
    last, first, ranks = state, error, state.run.ranks
    silent = error is not None and ranks.world_size > 1  # other ranks may not answer any more
    trained = error is None and state.step > state.run.start_step
    hurried = state.run.stop is not None and state.run.stop.at_once
    for gated in live:
        if silent and first is not None and gated.hook.communicates:
            first.add_note(f"after_train of hook {gated.hook.name!r} was skipped: other ranks may not answer any more")
            continue
        # A state that after_train changed (the last evaluation's best score, say) is saved again.
        stale = gated.hook.saves and any(_differ(getattr(state, name), getattr(last, name)) for name in SAVED)
        if gated.hook.saves and gated.hook.communicates and ranks.world_size > 1:
            stale = bool(ranks.max(stale))  # of ranks that hold parts, the part of one may be as it was
        due = gated.at_end and trained and (stale or ran.get(id(gated)) != last.step)
        due &= gated.hook.saves or not hurried
        for callback in (gated.hook.after_step if due else None, gated.hook.after_train):
            try:
                state = _call([(gated, callback, None)], state, None) if callback else state
            except BaseException as later:
                first = _noted(first, later)
                silent |= gated.hook.communicates and ranks.world_size > 1
                if silent:
                    break
    if error is not first and first is not None:
        raise first
    return state


def _differ(a: Any, b: Any) -> bool:
    return a is not b and not tree.bitwise_equal(a, b)


def _close(opened: list[AbstractContextManager[Any]], batches: Batches | None, error: BaseException | None) -> None:
    """Close data and resources, last opened first, all of them; the first error wins."""
    first = None if isinstance(error, GeneratorExit) else error  # leaving early is no error to hide one behind
    closers: list[Callable[[], Any]] = [
        partial(manager.__exit__, type(error) if error else None, error, getattr(error, "__traceback__", None))
        for manager in opened
    ]
    for close in reversed([*closers, batches.close] if batches else closers):
        try:
            close()
        except BaseException as later:
            first = _noted(first, later) if later is not error else first
    if error is not first and first is not None:
        raise first


def _noted(first: BaseException | None, later: BaseException) -> BaseException:
    """The error to raise: the first one with the later as a note, but the weightier one before."""
    if first is None:
        return later
    winner, other = (later, first) if _weight(later) > _weight(first) else (first, later)
    winner.add_note("\n".join([f"besides {type(other).__name__}: {other}", *getattr(other, "__notes__", ())]))
    return winner


def _weight(error: BaseException) -> int:
    """Ctrl-C before ordinary errors, and these before SystemExit, which would end the process without showing them."""
    return 0 if isinstance(error, SystemExit) else 1 if isinstance(error, Exception) else 2


def _check_alike(state: TrainState, singles: list[Gated], data: Any) -> None:
    """Refuse ranks that would do different things, and so wait for each other for ever."""
    shared = [single for single in singles if not single.main]
    mine = {
        "max_steps": state.run.max_steps,
        "data": getattr(data, "order", None),
        "hooks": [f"{one.hook.name} every {one.every} from {one.first} to {one.last}" for one in shared],
        **{f"state.{leaf}": tree.brief(value) for leaf, value in named_leaves(state)},
    }
    ranks = state.run.ranks
    if len(set(ranks.gather(tree.fingerprint(mine)))) == 1:
        return
    everyone = ranks.gather(mine)
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        for rank, theirs in enumerate(everyone):
            if repr(theirs.get(name)) != repr(everyone[0].get(name)):  # nan is nan
                raise ValueError(
                    f"{name}: rank {rank} has {theirs.get(name)!r}, rank 0 has {everyone[0].get(name)!r}; all ranks "
                    "must start alike: from the same checkpoint, with the same settings and hooks"
                )


def _asking(singles: list[Gated]) -> set[int]:
    """The periods at which a hook runs that may ask to stop on one rank alone; of those that all ranks have."""
    alone = [one for one in singles if one.hook.stops and not one.main]
    return {one.every for one in alone if one.hook.before_step or one.hook.after_step or one.hook.open}


def _agreed(state: TrainState) -> TrainState:
    """The state with the stop that any rank has asked for: all leave the loop after the same step."""
    ranks, asked = state.run.ranks, state.run.stop
    if ranks.world_size == 1 or not ranks.max(asked is not None):
        return state
    stops = ranks.gather(asked)
    rank, first = next((rank, one) for rank, one in enumerate(stops) if one is not None)
    alike = all(one == first for one in stops)
    at_once = any(one is not None and one.at_once for one in stops)
    reason = first.reason if alike else f"{first.reason} (rank {rank})"
    return state.replace(run=attrs.evolve(state.run, stop=attrs.evolve(first, reason=reason, at_once=at_once)))


def _stopped(state: TrainState, kind: Any, reason: str) -> TrainState:
    return state if state.run.stop else state.replace(run=attrs.evolve(state.run, stop=Stop(kind, reason)))


def _as_gated(single: Hook | Gated) -> Gated:
    return single if isinstance(single, Gated) else Gated(hook=single)


def _phase(live: list[Gated], name: str, ran: dict[int, int] | None = None) -> Phase:
    """Callbacks of a phase with their gates; those of at_end hooks write down at which step they opened."""
    phase: Phase = []
    # What is saved on the side (the best) stays when the run goes back, and so does the memory of it.
    aside = [gated.hook.name for gated in live if gated.hook.saves and not gated.at_end]
    for gated in live:
        callback = getattr(gated.hook, name)
        if callback is not None and gated.hook.rewinds and aside:
            callback = partial(_going_back, callback, aside)
        gate = partial(_noting, gated, ran) if gated.at_end and ran is not None else gated.admits
        if callback is not None:
            phase.append((gated, callback, None if gated.is_open and not gated.at_end else gate))
    return phase


def _going_back(callback: Callback, names: list[str | None], state: TrainState) -> TrainState | None:
    """The callback's new state; if it is an earlier one, what these hooks remember is that of now."""
    new = callback(state)
    if new is None or new.step >= state.step:
        return new
    kept = {name: state.hooks[name] for name in names if name is not None and name in state.hooks}
    return new.replace(hooks={**new.hooks, **kept}) if kept else new


def _noting(gated: Gated, ran: dict[int, int], state: TrainState, number: int) -> bool:
    admitted = gated.admits(state, number)
    if admitted:
        ran[id(gated)] = number
    return admitted


def _opened(gated: Gated, opened: list[AbstractContextManager[Any]]) -> Gated:
    """The live form of a hook that holds a resource; what has to be closed is put on the list."""
    if gated.hook.open is None:
        return gated
    try:
        manager = gated.hook.open()
        live = manager.__enter__()
        opened.append(manager)
        if not isinstance(live, Hook):
            raise TypeError(f"open() gave {type(live).__name__}, expected ft.hook(...)")
    except BaseException as error:
        error.add_note(f"while opening hook {gated.hook.name!r}")
        raise
    callbacks = {name: getattr(live, name) for name in (*PHASES, "wrap_data")}
    return attrs.evolve(gated, hook=attrs.evolve(gated.hook, open=None, **callbacks))


def _check_order(singles: list[Gated]) -> None:
    from toolz import frequencies, valfilter  # 4 ms to import: only where they are used

    counts = frequencies(single.hook.name for single in singles if single.hook.name is not None)
    if twice := sorted(valfilter(lambda count: count > 1, counts)):
        raise ValueError(f"hooks: two hooks are named {', '.join(twice)}; give each a name of its own (name=...)")
    saver = writer = rewinder = None
    final = False  # whether a saver saves at the end, so that the run is resumed from what it saved
    remembering: list[str | None] = []
    for single in singles:
        hook = single.hook
        # Savers with memory (of the best score) may follow each other, before the one that saves at the end.
        if saver is not None and hook.init is not None and (final or not hook.saves):
            raise ValueError(
                f"hooks: {hook.name!r} has memory and is listed after {saver!r}, which would save that memory "
                f"one step old; list {hook.name!r} before it"
            )
        if writer is not None and hook.reports:
            raise ValueError(
                f"hooks: {hook.name!r} reports metrics and is listed after {writer!r}, which would not see them; "
                f"list {hook.name!r} before it"
            )
        if rewinder is not None and hook.init is not None and not hook.saves and not hook.rewinds:
            raise ValueError(
                f"hooks: {hook.name!r} has memory and is listed after {rewinder!r}, which may go back to an earlier "
                f"step, and it would count that step twice; list {hook.name!r} before it"
            )
        if hook.reads is not None and hook.reads not in remembering:
            raise ValueError(
                f"hooks: {hook.name!r} reads the memory of {hook.reads!r}, and no hook of that name is listed before "
                f"it, only {remembering}; list that hook before it"
            )
        remembering += [hook.name] if hook.init is not None else []
        rewinder = hook.name if hook.rewinds else rewinder
        saver = hook.name if hook.saves else saver
        final |= hook.saves and single.at_end
        writer = hook.name if hook.writes else writer


def _with_memory(state: TrainState, singles: list[Gated]) -> TrainState:
    """Start the memory of new hooks, drop that of hooks which are no longer there."""
    memory = {}
    for single in singles:
        name, init = single.hook.name, single.hook.init
        if name is not None and init is not None:
            memory[name] = state.hooks[name] if name in state.hooks else init(state)
    if gone := sorted(state.hooks.keys() - memory.keys()):
        warnings.warn(f"state.hooks: dropped the memory of {gone}: no hook of that name is in this run", stacklevel=4)
    return state.replace(hooks=memory) if memory or state.hooks else state
