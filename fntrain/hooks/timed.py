"""hooks.timed: what every hook costs."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs

from fntrain.core.hook import (
    PHASES,
    UNGATED,
    AnyHook,
    Callback,
    Hook,
    called,
    compose,
    flatten,
    hook,
    identity,
    resource,
)
from fntrain.core.state import TrainState

_log = logging.getLogger("fntrain")


@attrs.frozen
class Spent:
    """What the hooks of one `timed` have cost, by hook and phase; shared by them, and empty outside of a run."""

    phases: dict[str, dict[str, list[float]]] = attrs.field(factory=dict, eq=False, repr=False, init=False)

    def bill(self, label: str, phase: str, begin: float) -> None:
        """Add a call that began at `begin` to its phase: number of calls, total, longest."""
        seconds = time.perf_counter() - begin
        bill = self.phases.setdefault(label, {}).setdefault(phase, [0, 0.0, 0.0])
        bill[0] += 1
        bill[1] += seconds
        bill[2] = max(bill[2], seconds)

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        """The live hook that reports; opened before the hooks it reports on, so closed after them."""
        self.phases.clear()
        try:
            yield hook()
        finally:
            totals = {label: sum(total for _, total, _ in bills.values()) for label, bills in self.phases.items()}
            for label in sorted(totals, key=totals.__getitem__, reverse=True):
                bills = "; ".join(
                    f"{phase} {calls} x, mean {total / calls:.3g}, max {longest:.3g}, total {total:.3g}"
                    for phase, (calls, total, longest) in self.phases[label].items()
                )
                _log.info("%s: %.3g s in all; %s", label, totals[label], bills)
            self.phases.clear()


@attrs.frozen(repr=False)
class TimedCallback:
    """A callback that is billed to its hook."""

    callback: Callback
    spent: Spent
    label: str
    phase: str

    @property
    def __wrapped__(self) -> Callback:
        """What it is around, as `inspect.unwrap` finds it."""
        return self.callback

    def __call__(self, state: TrainState) -> TrainState | None:
        begin = time.perf_counter()
        try:
            return self.callback(state)
        finally:
            self.spent.bill(self.label, self.phase, begin)

    def __repr__(self) -> str:
        return f"timed({called(self.callback)})"


@attrs.frozen(repr=False)
class TimedOpen:
    """The `open` of a hook that holds a resource; the live hook is timed too."""

    opener: Callable[[], AbstractContextManager[Hook]]
    spent: Spent
    label: str

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        phase, begin = "open", time.perf_counter()
        try:
            with self.opener() as live:
                self.spent.bill(self.label, phase, begin)
                try:
                    yield _timed(live, self.spent, self.label) if isinstance(live, Hook) else live
                finally:
                    phase, begin = "close", time.perf_counter()
        finally:
            self.spent.bill(self.label, phase, begin)

    def __repr__(self) -> str:
        return f"timed({self.opener!r})"


def timed(hooks: Any, *, name: str = "timed") -> AnyHook:
    """Measure what hooks cost: the same hooks in the same order, each callback timed.

    When the run ends, however it does, the logger "fntrain" gets one line at level INFO for each hook that ran, the
    dearest first: number of calls, mean, longest and total seconds, by phase. States are bitwise those without.
    Work that a hook leaves to a thread or a GPU is not its own time. Costs about 1 us a call.

    Args:
      hooks: one hook or several, also gated ones and those with memory or a resource.
      name: unique in a run; two `timed` in one run need two names.
    Raises:
      TypeError: an element is no hook.
    Example:
      >>> timed(ft.every(2, ft.hook(after_step=print, name="show")))
      compose(Spent(), every(2, hook('show', after_step=timed(print))))
    """
    singles, spent = flatten(hooks), Spent()
    if not singles:
        return identity
    return compose(
        resource(spent, name=name, stops=False),
        *(_timed(one, spent, one.name or f"{attrs.evolve(one, **UNGATED)!r} ({i})") for i, one in enumerate(singles)),
    )


def _timed(inner: Hook, spent: Spent, label: str) -> Hook:
    """The hook with its callbacks, or the opening of its resource, timed."""
    changes: dict[str, Any] = {
        phase: TimedCallback(callback, spent, label, phase) for phase in PHASES if (callback := getattr(inner, phase))
    }
    return attrs.evolve(inner, **changes, open=TimedOpen(inner.open, spent, label) if inner.open else None)
