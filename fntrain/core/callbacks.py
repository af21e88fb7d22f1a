"""How callbacks of hooks are called: in list order, where their gates are open; what they return is checked."""

from collections.abc import Callable

import attrs

from fntrain.core.hook import Callback, Hook, called
from fntrain.core.state import TrainState

Gate = Callable[[TrainState, int], bool]
Phase = list[tuple[Hook, Callback, Gate | None]]


def phase_of(live: list[Hook], name: str, ran: dict[int, int] | None = None) -> Phase:
    """List the callbacks of a phase with their gates; at_end hooks write into `ran` for which step they ran last."""

    def gate(one: Hook) -> Gate | None:
        if ran is None or not one.at_end:
            return None if one.is_open else one.admits  # None spares a call for each hook and step

        def noting(state: TrainState, number: int) -> bool:
            admitted = one.admits(state, number)
            if admitted:
                ran[id(one)] = number
            return admitted

        return noting

    callbacks = [(one, getattr(one, name)) for one in live]
    return [(one, callback, gate(one)) for one, callback in callbacks if callback is not None]


def call(phase: Phase, state: TrainState, offset: int | None = None, numbers: list[int] | None = None) -> TrainState:
    """Run the callbacks of a phase, each on the state that the one before it returned.

    Gates are asked for step `state.step + offset`; None runs all. A hook that goes back to another step adds that one
    to `numbers`, as the gates after it are asked for it.
    """
    for one, callback, gate in phase:
        try:
            if gate is None or offset is None or gate(state, state.step + offset):
                new = callback(state)
                if new is not None:
                    new = _accepted(one, state, new)
                    if numbers is not None and new.step != state.step:
                        numbers.append(new.step + (offset or 0))
                    state = new
        except BaseException as error:
            error.add_note(f"in {called(callback)} of hook {one.name or one!r}, at step {state.step}")
            raise
    return state


def _accepted(one: Hook, old: TrainState, new: TrainState) -> TrainState:
    """A hook's new state, if it is one it may return. `run` belongs to the fold: a stop may be added, not undone."""
    if not isinstance(new, TrainState):
        raise TypeError(f"{one!r}: returned {type(new).__name__}, expected a TrainState or None")
    if one.main:
        for field in attrs.fields(TrainState):
            if field.name != "metrics" and getattr(new, field.name) is not getattr(old, field.name):
                raise ValueError(f"on_main: {one!r} changed {field.name}; on one rank only metrics may change")
    if new.run is old.run:
        return new
    asked = new.run.stop
    if old.run.stop is None and asked is not None and asked.kind == "requested":
        return new.replace(run=attrs.evolve(old.run, stop=asked))
    return new.replace(run=old.run)
