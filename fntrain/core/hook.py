"""Hooks: frozen values with up to four callbacks, and `compose`, which joins them; gates.py has the gates.

A callback takes the state and returns a new one, or None for no change. Everything here is a record, so hooks compare,
print and (where their callbacks do) pickle.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import attrs

from fntrain.core import tree
from fntrain.core.state import TrainState
from fntrain.core.tree import PyTree

Callback = Callable[[TrainState], TrainState | None]
Predicate = Callable[[TrainState], bool]
Wrap = Callable[[Iterator[Any]], Iterator[Any]]
PHASES = ("before_train", "before_step", "after_step", "after_train")


@attrs.frozen(kw_only=True)
class Hook:
    """Callbacks, and what the fold has to know of them; made by `hook`, `stateful` and `resource`.

    Args:
      before_train, before_step, after_step, after_train: callbacks, state -> state or None.
      name: unique in a run; needed for memory, shown in errors.
      init: function of the state that makes the memory at the start of a run; None for a hook without memory.
      open: makes a context manager that gives the live hook; for what holds a file or a clock.
      wrap_data: wraps the iterator of batches; for what watches the loading.
      communicates: runs collectives between ranks, so it may be gated by functions of the step only.
      stops: may ask to stop on one rank and not on the others, which all then have to be asked after each of its steps.
      saves: writes the state to disk, so hooks with memory must come before it.
      reports: adds to the metrics, so it must come before hooks that write them.
      writes: hands the metrics on.
      reads: name of a hook whose memory it reads, which must come before it.
      rewinds: may go back to an earlier state, so hooks with memory must come before it, or would count steps twice.
    """

    before_train: Callback | None = None
    before_step: Callback | None = None
    after_step: Callback | None = None
    after_train: Callback | None = None
    name: str | None = None
    init: Callable[[TrainState], PyTree] | None = None
    open: Callable[[], AbstractContextManager["Hook"]] | None = None
    wrap_data: Wrap | None = None
    communicates: bool = False
    stops: bool = True
    saves: bool = False
    reports: bool = False
    writes: bool = False
    reads: str | None = None
    rewinds: bool = False

    def __repr__(self) -> str:
        shown = [repr(self.name)] if self.name else []
        for phase in PHASES:
            if callback := getattr(self, phase):
                shown.append(f"{phase}={getattr(callback, '__qualname__', repr(callback))}")
        return f"hook({', '.join(shown)})" if self.open is None else repr(self.open)


@attrs.frozen(kw_only=True, repr=False)
class Gated:
    """One hook and when its step callbacks run; made by the gates below, which merge into it."""

    hook: Hook
    every: int = 1
    first: int = 1
    last: int | None = None
    predicates: tuple[Predicate, ...] = ()
    main: bool = False
    at_end: bool = False

    def admits(self, state: TrainState, number: int) -> bool:
        """Tell whether the gate is open for step `number`."""
        return (
            number % self.every == 0
            and number >= self.first
            and (self.last is None or number <= self.last)
            and all(predicate(state) for predicate in self.predicates)
        )

    @property
    def is_open(self) -> bool:
        """Whether no step is ever turned away."""
        return self.every == 1 and self.first == 1 and self.last is None and not self.predicates

    def __repr__(self) -> str:
        text = repr(self.hook)
        if self.every != 1:
            text = f"every({self.every}, {text})"
        if self.first != 1 or self.last is not None:
            text = f"between({self.first}, {self.last}, {text})"
        for predicate in self.predicates:
            text = f"when({getattr(predicate, '__qualname__', repr(predicate))}, {text})"
        text = f"on_main({text})" if self.main else text
        return f"at_end({text})" if self.at_end else text


@attrs.frozen(repr=False)
class Composed:
    """Several hooks in order; made by `compose`, always flat."""

    hooks: tuple["Hook | Gated", ...] = ()

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.hooks))})"


AnyHook = Hook | Gated | Composed
identity = Composed()


def hook(
    *,
    before_train: Callback | None = None,
    before_step: Callback | None = None,
    after_step: Callback | None = None,
    after_train: Callback | None = None,
    name: str | None = None,
    communicates: bool = False,
    stops: bool = True,
) -> Hook:
    """Make a hook from callbacks, each `state -> state or None`.

    `after_train` runs once, also when a step raised; `state.run.stop` then says so.

    Args:
      before_train, before_step, after_step, after_train: called in list order in every phase.
      name: unique in a run; shown in errors.
      communicates: declares that a callback runs collectives between ranks.
      stops: False declares that it never asks to stop, or on all ranks alike: several ranks then spare the message by
        which they agree after each step (0.2 ms between processes of one machine).
    Raises:
      TypeError: a callback can't be called.
    Example:
      >>> hook(after_step=print, name="show")
      hook('show', after_step=print)

    Source: detectron2's CallbackHook, https://detectron2.readthedocs.io/en/latest/modules/engine.html
    """
    phases: dict[str, Any] = {
        "before_train": before_train,
        "before_step": before_step,
        "after_step": after_step,
        "after_train": after_train,
    }
    for phase, callback in phases.items():
        if callback is not None and not callable(callback):
            raise TypeError(f"{phase}: got {type(callback).__name__}, expected a function of the state")
    return Hook(**phases, name=name, communicates=communicates, stops=stops)


def stateful(name: str, init: PyTree | Callable[[TrainState], PyTree], **callbacks: Any) -> Hook:
    """Make a hook with memory, kept in `state.hooks[name]` and so in every checkpoint.

    Callbacks read it there and write it with `ft.remember(state, name, memory)`.

    Args:
      name: unique in a run; the memory is found under it on resume.
      init: memory at the start of a run, or a function of the state that makes it.
      callbacks: as for `hook`.
    Raises:
      ValueError: the name is empty.
    Example:
      >>> def count(state):
      ...     return ft.remember(state, "count", state.hooks["count"] + 1)
      >>> stateful("count", 0, after_step=count)
      hook('count', after_step=count)
    """
    if not name or not isinstance(name, str):
        raise ValueError(f"name: got {name!r}, expected a non-empty string")
    return attrs.evolve(hook(name=name, **callbacks), init=init if callable(init) else _Value(init))


def resource(open: Callable[[], AbstractContextManager[Hook]], *, name: str, **declared: Any) -> Hook:  # noqa: A002
    """Make a hook that holds a resource (a file, a clock) during a run, and always lets go of it.

    `fit` enters the context manager that `open()` returns and uses the hook it gives; the value itself holds nothing.

    Args:
      open: function without arguments; a frozen record with `__call__` keeps equality and pickle.
      name: unique in a run.
      declared: `init`, `communicates`, `stops`, `saves`, `reports`, `writes`, `reads`, `rewinds`, see `Hook`.
    Example:
      >>> from contextlib import contextmanager
      >>> @contextmanager
      ... def opened():
      ...     with open("/dev/null", "w") as file:
      ...         yield hook(after_step=lambda state: print(state.step, file=file))
      >>> resource(opened, name="log").name
      'log'
    """
    return Hook(name=name, open=open, **declared)


def compose(*hooks: AnyHook) -> AnyHook:
    """Join hooks into one, run in the order given; `identity` is the neutral element.

    Example:
      >>> a, b = hook(after_step=print, name="a"), hook(after_step=print, name="b")
      >>> compose(a, compose(b, identity)) == compose(compose(a), b), compose(a) == a
      (True, True)
    """
    flat = flatten(hooks)
    return flat[0] if len(flat) == 1 else Composed(flat)


def flatten(hooks: Any) -> tuple[Hook | Gated, ...]:
    """List the single hooks of nested sequences and compositions, in order.

    Raises:
      TypeError: an element is no hook.
    Example:
      >>> h = hook(after_step=print)
      >>> flatten([h, compose(h, h)]) == (h, h, h)
      True
    """
    if isinstance(hooks, Hook | Gated):
        return (hooks,)
    if isinstance(hooks, Composed):
        return hooks.hooks
    if isinstance(hooks, list | tuple):
        return tuple(single for item in hooks for single in flatten(item))
    raise TypeError(f"hooks: got {type(hooks).__name__}, expected ft.hook(...), one of ft.hooks, or a list of them")


@attrs.frozen
class _Value:
    """A memory given as a value rather than as a function of the state."""

    value: PyTree

    def __call__(self, state: TrainState) -> PyTree:
        del state
        return tree.clone(self.value)  # each run starts with a memory of its own
