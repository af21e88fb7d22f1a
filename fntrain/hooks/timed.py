"""hooks.timed: what every hook costs."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs

from fntrain.core.hook import PHASES, UNGATED, AnyHook, Callback, Hook, called, compose, flatten, hook, resource
from fntrain.core.state import TrainState

_log = logging.getLogger("fntrain")


@attrs.frozen
class Spent:
    """The seconds that the hooks of one `timed` took, by hook and phase; they share it. Empty outside of a run."""

    phases: dict[str, dict[str, list[float]]] = attrs.field(factory=dict, eq=False, repr=False, init=False)

    def add(self, label: str, phase: str, begin: float) -> None:
        """Add a call that began at `begin` to its phase: number of calls, total, longest."""
        seconds = time.perf_counter() - begin
        spent = self.phases.setdefault(label, {}).setdefault(phase, [0, 0.0, 0.0])
        spent[:] = spent[0] + 1, spent[1] + seconds, max(spent[2], seconds)

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        """Give the live hook, which reports when it closes; opened first, it closes after the hooks that it times."""
        self.phases.clear()
        try:
            yield hook()
        finally:
            totals = {label: sum(total for _, total, _ in phases.values()) for label, phases in self.phases.items()}
            for label in sorted(totals, key=totals.__getitem__, reverse=True):
                parts = (
                    f"{phase} {calls} x, mean {total / calls:.3g}, max {longest:.3g}, total {total:.3g}"
                    for phase, (calls, total, longest) in self.phases[label].items()
                )
                _log.info("%s: %.3g s in all; %s", label, totals[label], "; ".join(parts))
            self.phases.clear()


@attrs.frozen(repr=False)
class TimedCallback:
    """A callback whose time is added to its hook's."""

    callback: Callback
    spent: Spent
    label: str
    phase: str

    @property
    def __wrapped__(self) -> Callback:
        """The callback itself, as `inspect.unwrap` finds it."""
        return self.callback

    def __call__(self, state: TrainState) -> TrainState | None:
        begin = time.perf_counter()
        try:
            return self.callback(state)
        finally:
            self.spent.add(self.label, self.phase, begin)

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
                self.spent.add(self.label, phase, begin)
                try:  # what happens in the run is not the time of opening or closing
                    yield _timed(live, self.spent, self.label) if isinstance(live, Hook) else live
                finally:
                    phase, begin = "close", time.perf_counter()
        finally:
            self.spent.add(self.label, phase, begin)

    def __repr__(self) -> str:
        return f"timed({self.opener!r})"


def timed(hooks: Any, *, name: str = "timed") -> AnyHook:
    """Measure what hooks cost: the same hooks in the same order, each callback timed.

    When the run ends, however it does, the logger "fntrain" gets one line at level INFO for each hook that ran, the
    most expensive first: number of calls, mean, longest and total seconds, by phase. States are bitwise those without.
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
    labels = [one.name or f"{attrs.evolve(one, **UNGATED)!r} ({index})" for index, one in enumerate(singles)]
    parts = [_timed(one, spent, label) for one, label in zip(singles, labels, strict=True)]
    return compose(resource(spent, name=name, stops=False), *parts) if parts else compose()


def _timed(inner: Hook, spent: Spent, label: str) -> Hook:
    """Return the hook with its callbacks, or the opening of its resource, timed."""
    callbacks = {phase: getattr(inner, phase) for phase in PHASES if getattr(inner, phase) is not None}
    changes: dict[str, Any] = {phase: TimedCallback(one, spent, label, phase) for phase, one in callbacks.items()}
    return attrs.evolve(inner, **changes, open=TimedOpen(inner.open, spent, label) if inner.open else None)
