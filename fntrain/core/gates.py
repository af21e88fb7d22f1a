"""Gates: combinators that take hooks and give hooks which run at some steps, or on one rank, only.

They push inwards to the single hook and merge in its fields, which is why the laws hold by `==`: every(a, every(b, h))
is every(lcm(a, b), h), different gates commute, and they distribute over `compose`.
"""

import math
from collections.abc import Callable

import attrs

from fntrain.core.check import function, whole
from fntrain.core.hook import AnyHook, Hook, Predicate, compose, flatten


def every(n: int, hook: AnyHook) -> AnyHook:
    """Run a hook's step callbacks at every n-th step only: when n divides the number of the step (from 1).

    Raises:
      ValueError: n is no whole number >= 1.
    Example:
      >>> h = ft.hook(after_step=print)
      >>> every(4, every(6, h)) == every(12, h)
      True
    """
    n = whole("every", n, 1)
    return _gate(hook, lambda one: attrs.evolve(one, every=math.lcm(one.every, n)))


def first(n: int, hook: AnyHook) -> AnyHook:
    """Run a hook's step callbacks in the first n steps only.

    Raises:
      ValueError: n is no whole number >= 1.
    Example:
      >>> h = ft.hook(after_step=print)
      >>> first(3, h) == between(1, 3, h)
      True
    """
    n = whole("first", n, 1)
    return between(1, n, hook)


def between(a: int, b: int, hook: AnyHook) -> AnyHook:
    """Run a hook's step callbacks from step a to step b, both included.

    Raises:
      ValueError: a is less than 1, or b less than a.
    Example:
      >>> h = ft.hook(after_step=print)
      >>> between(2, 9, between(5, 20, h)) == between(5, 9, h)
      True
    """
    a, b = whole("between: a", a, 1), whole("between: b", b, 1)
    if b < a:
        raise ValueError(f"between: got {a} to {b}, expected a <= b")
    return _gate(
        hook, lambda one: attrs.evolve(one, first=max(one.first, a), last=b if one.last is None else min(one.last, b))
    )


def when(predicate: Predicate, hook: AnyHook) -> AnyHook:
    """Run a hook's step callbacks when `predicate(state)` holds, asked for each hook on its own.

    Raises:
      TypeError: the predicate can't be called.
      ValueError: the hook communicates between ranks: ranks that disagree would wait for each other for ever.
    Example:
      >>> when(lambda state: state.metrics["loss"] < 1, ft.hook(after_step=print))
      when(<lambda>, hook(after_step=print))
    """
    function("predicate", predicate, "a function of the state")
    return _gate(hook, lambda one: attrs.evolve(_alone(one, "when"), predicates=(*one.predicates, predicate)))


def on_main(hook: AnyHook) -> AnyHook:
    """Run a hook on rank 0 only; there it may change metrics, nothing else, so that ranks stay alike.

    Raises:
      ValueError: the hook communicates between ranks (the others would never answer) or has memory.
    Example:
      >>> on_main(ft.hook(after_step=print))
      on_main(hook(after_step=print))
    """
    return _gate(hook, lambda one: attrs.evolve(_stateless(_alone(one, "on_main")), main=True))


def at_end(hook: AnyHook) -> AnyHook:
    """Also run a hook's after_step at the end of training, if the last step did not run it already.

    It overrides every other gate, `when` too. It runs once more if `after_train` or at_end of hooks before it changed
    the state since: a checkpoint is then saved again. Not when a step raised, and not when `fit` had no step to do.

    Example:
      >>> at_end(every(100, ft.hook(after_step=print)))
      at_end(every(100, hook(after_step=print)))
    """
    return _gate(hook, lambda one: attrs.evolve(one, at_end=True))


def _gate(hook: AnyHook, change: Callable[[Hook], Hook]) -> AnyHook:
    return compose(*map(change, flatten(hook)))


def _stateless(one: Hook) -> Hook:
    if one.init is not None:
        raise ValueError(f"on_main: {one!r} has memory, which is part of the state and must be alike on all ranks")
    return one


def _alone(one: Hook, gate: str) -> Hook:
    if one.communicates:
        advice = "gate it by every, first or between, or decide inside the function that it calls"
        if gate == "on_main":
            advice = "leave on_main out: what one rank is enough for, such as writing, it does on rank 0 only"
        raise ValueError(
            f"{gate}: {one!r} communicates between ranks, so wherever there are several all must run it at the "
            f"same steps; {advice}"
        )
    return one
