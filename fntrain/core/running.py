"""A run around its fold: how it opens, agrees with other ranks to stop, finishes and closes."""

import warnings
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import attrs

from fntrain.core import tree
from fntrain.core.callbacks import Phase, call, phase_of
from fntrain.core.hook import PHASES, UNGATED, Hook, Needs
from fntrain.core.ranks import Ranks
from fntrain.core.source import END, Batches, shared
from fntrain.core.state import SAVED, Stop, TrainState, named_leaves


class Running:
    """A run that is open: its hooks as they live, its batches, and what has to be closed, which its block does.

    It holds no state: the fold has the only reference, or the memory of a replaced state could not be freed.
    """

    def __init__(self, singles: list[Hook], ranks: Ranks) -> None:
        self.singles = singles
        self.ranks = ranks
        self.live: list[Hook] = []
        # For which step a hook that also runs at the end ran last; by its id, as two hooks of a list may be equal.
        self.ran: dict[int, int] = {}
        self.batches = Batches((), [])  # so that there is something to close if opening fails
        self.opened: list[AbstractContextManager[Any]] = []
        # Ranks ask each other whether to stop after the steps at which some hook may have asked for it on one of them.
        may_stop = [one for one in singles if one.stops and not one.main] if ranks.world_size > 1 else []
        self.periods = {one.every for one in may_stop if one.before_step or one.after_step or one.open}

    def __enter__(self) -> "Running":
        return self

    def open(self, state: TrainState, data: Any) -> None:
        """Open hooks and data, after all ranks have found that they start alike."""
        if self.ranks.world_size > 1:
            _check_alike(state, self.singles, data)
            data = shared(data, self.ranks)
        self.live = [self._opened(one) for one in self.singles]
        self.batches = Batches(data, [one.wrap_data for one in self.live if one.wrap_data])

    def _opened(self, one: Hook) -> Hook:
        """The live form of a hook that holds a resource."""
        if one.open is None:
            return one
        try:
            manager = one.open()
            live = manager.__enter__()
            self.opened.append(manager)
            if not isinstance(live, Hook) or live != attrs.evolve(live, **UNGATED):
                given = repr(live) if isinstance(live, Hook) else type(live).__name__
                raise TypeError(f"open() gave {given}, expected ft.hook(...); put gates around the resource")
        except BaseException as error:
            error.add_note(f"while opening hook {one.name!r}")
            raise
        callbacks = {name: getattr(live, name) for name in (*PHASES, "wrap_data")}
        return attrs.evolve(one, open=None, **callbacks)

    def phase(self, name: str) -> Phase:
        """List the callbacks of a phase with their gates."""
        return phase_of(self.live, name, self.ran if name == "after_step" else None)

    def data_ended(self, batch: Any) -> bool:
        """Tell whether data that is declared finite has ended: it may do so on one rank first, so all are asked."""
        return bool(self.ranks.max(batch is END))

    def stop_agreed(self, state: TrainState, numbers: list[int]) -> TrainState:
        """Return the state with a stop that any rank asks for, if a hook that may had its turn at these steps.

        The numbers are those for which gates were asked. All ranks have the same ones, and `state.step` is not enough:
        a hook may have gone back after another one had asked to stop.
        """
        due = any(number % period == 0 for number in numbers for period in self.periods)
        return with_any_stop(state) if due else state

    def abandon(self, state: TrainState, error: BaseException) -> None:
        """Run `after_train` of every hook after an error, or after the loop over `states` was left."""
        if not isinstance(error, GeneratorExit):
            self.finish(stopped(state, "error", f"{type(error).__name__}: {error}"), error)
            return
        # An error in the loop over the states, of this rank perhaps alone, closes them while it is on its way.
        cause: BaseException | None = error
        while isinstance(cause, GeneratorExit):  # or generators around this one are closed
            cause = cause.__context__
        left = stopped(state, "requested", "states() was left early")
        self.finish(left, cause if self.ranks.world_size > 1 else None)

    def finish(self, state: TrainState, error: BaseException | None = None) -> TrainState:
        """Run `after_train` of every hook, and before it after_step of those that run at the end and are due."""
        last, first = state, error
        several = self.ranks.world_size > 1
        silent = error is not None and several  # other ranks may not answer any more
        for one in self.live:
            if silent and first is not None and one.communicates:
                first.add_note(f"after_train of hook {one.name!r} was skipped: other ranks may not answer any more")
                continue
            due = one.at_end and error is None and self._due_at_end(one, last, state)
            for callback in (one.after_step if due else None, one.after_train):
                try:
                    state = call([(one, callback, None)], state) if callback else state
                except BaseException as later:
                    first = _noted(first, later)
                    # The others wait in a collective of this hook: one of the next hook would meet that one.
                    silent |= one.communicates and several
                    if silent:
                        break
        if error is not first and first is not None:
            raise first
        return state

    def _due_at_end(self, one: Hook, last: TrainState, state: TrainState) -> bool:
        """Whether an at_end hook has not seen this state: the last step, and what hooks changed after it."""
        stop = last.run.stop
        if last.step == last.run.start_step or (stop and stop.at_once and "branch" not in one.makes):
            return False
        if self.ran.get(id(one)) != last.step:
            return True
        changed = any(_differ(getattr(state, name), getattr(last, name)) for name in SAVED)
        # Of a state in parts, the part of one rank may be as it was; a whole one is the same on all ranks.
        return bool(self.ranks.max(changed)) if self.ranks.sharded and one.communicates else changed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close data and resources, last opened first, all of them; the first error wins."""
        first = None if isinstance(error, GeneratorExit) else error  # leaving early is no error to hide one behind
        for close in (lambda *_: self.batches.close(), *(manager.__exit__ for manager in reversed(self.opened))):
            try:
                close(kind, error, trace)
            except BaseException as later:
                first = _noted(first, later) if later is not error else first
        if error is not first and first is not None:
            raise first


def stopped(state: TrainState, kind: Any, reason: str) -> TrainState:
    """Return the state with a reason why the run ended; one that is there already stays."""
    return state if state.run.stop else state.replace(run=attrs.evolve(state.run, stop=Stop(kind, reason)))


def with_any_stop(state: TrainState) -> TrainState:
    """Return the state with the stop that any rank has asked for: all leave the loop after the same step."""
    ranks, asked = state.run.ranks, state.run.stop
    if ranks.world_size == 1 or not ranks.max(asked is not None):
        return state
    stops = ranks.gather(asked)
    rank, first = next((rank, one) for rank, one in enumerate(stops) if one is not None)
    alike = all(one == first for one in stops)
    at_once = any(one is not None and one.at_once for one in stops)
    reason = first.reason if alike else f"{first.reason} (rank {rank})"
    return state.replace(run=attrs.evolve(state.run, stop=attrs.evolve(first, reason=reason, at_once=at_once)))


def check_order(hooks: list[Hook]) -> None:
    """Refuse two hooks of one name, and a list in which a hook comes after one that needs what it makes.

    Raises:
      ValueError: names both hooks, says why the order matters, and what to do.
    """
    names = [hook.name for hook in hooks if hook.name is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"hooks: two hooks are named {', '.join(twice)}; give each a name of its own (name=...)")
    for index, late in enumerate(hooks):
        before = hooks[:index]
        for need in late.needs:
            found = [early.name for early in before if need.what in early.made]
            if need.of is not None and need.of not in found:
                raise ValueError(
                    f"hooks: {late.name!r} {need.reason}, and no hook of that name is listed before it, only {found}; "
                    "list that hook before it"
                )
        for early in before:
            for need in early.needs:
                if need.of is None and need.what in late.made and not need.but & late.made:
                    raise ValueError(_too_late(late, early, need))


def _too_late(late: Hook, early: Hook, need: Needs) -> str:
    name = late.name or late
    makes = {"memory": "has memory", "metrics": "reports metrics"}.get(need.what, f"makes {need.what!r}")
    return (
        f"hooks: {name!r} {makes} and is listed after {early.name or early!r}, which {need.reason}; "
        f"list {name!r} before it"
    )


def _check_alike(state: TrainState, singles: list[Hook], data: Any) -> None:
    """Refuse ranks that would do different things, and so wait for each other for ever."""
    common = [single for single in singles if not single.main]
    mine = {
        "max_steps": state.run.max_steps,
        "data": getattr(data, "order", None),
        "hooks": [f"{one.name} every {one.every} from {one.first} to {one.last}" for one in common],
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


def with_memory(state: TrainState, singles: list[Hook]) -> TrainState:
    """Start the memory of new hooks, drop that of hooks which are no longer there."""
    memory = {}
    for single in singles:
        name, init = single.name, single.init
        if name is not None and init is not None:
            memory[name] = state.hooks[name] if name in state.hooks else init(state)
    if gone := sorted(state.hooks.keys() - memory.keys()):
        warnings.warn(f"state.hooks: dropped the memory of {gone}: no hook of that name is in this run", stacklevel=4)
    return state.replace(hooks=memory) if memory or state.hooks else state


def _differ(a: Any, b: Any) -> bool:
    return a is not b and not tree.bitwise_equal(a, b)


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
