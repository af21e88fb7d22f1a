"""Hooks: frozen values with up to four callbacks, and `compose`, which joins them; gates.py has the gates.

A callback takes the state and returns a new one, or None for no change. Everything here is a record, so hooks compare,
print and (where their callbacks do) pickle.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import attrs

from fntrain.core import tree
from fntrain.core.state import TrainState

Callback = Callable[[TrainState], TrainState | None]
Predicate = Callable[[TrainState], bool]
Wrap = Callable[[Iterator[Any]], Iterator[Any]]
PHASES = ("before_train", "before_step", "after_step", "after_train")


def _words(words: str | Iterable[str]) -> frozenset[str]:
    return frozenset({words} if isinstance(words, str) else words)


@attrs.frozen
class Needs:
    """What must come before a hook in the list of hooks, and why.

    Args:
      what: a word that other hooks have in `made`; every hook that has it must come before.
      reason: what would go wrong otherwise; it goes on after "which" in the error.
      but: hooks that have one of these words too may come after all the same.
      of: name of the one hook that it is needed of, which then must be there; `reason` goes on after the name of the
        hook that needs it.
    Example:
      >>> Needs("metrics", "would not see them").but
      frozenset()
    """

    what: str
    reason: str
    but: frozenset[str] = attrs.field(default=frozenset(), converter=_words)
    of: str | None = None


def _tuple(needs: Iterable[Needs]) -> tuple[Needs, ...]:
    return tuple(needs)


def _is_callback(_hook: "Hook", phase: "attrs.Attribute[Any]", callback: Any) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"{phase.name}: got {type(callback).__name__}, expected a function of the state")


@attrs.frozen(kw_only=True)
class Hook:
    """Callbacks, each `state -> state or None`, and what the fold has to know of them; `ft.hook(...)` makes one.

    Args:
      before_train, before_step, after_step, after_train: called in list order in every phase. `after_train` runs once,
        also when a step raised; `state.run.stop` then says so.
      name: unique in a run; needed for memory, shown in errors.
      init: function of the state that makes the memory at the start of a run; None for a hook without memory.
      open: makes a context manager that gives the live hook; for what holds a file or a clock.
      wrap_data: wraps the iterator of batches; for what watches the loading.
      communicates: runs collectives between ranks, so it may be gated by functions of the step only.
      stops: False declares that it never asks to stop, or on all ranks alike: several ranks then spare the message by
        which they agree after each of its steps (0.2 ms between processes of one machine).
      makes: words for what it makes: "metrics" that it reports, "branch" for checkpoints from which the run can be
        resumed, "best" for the best checkpoint, or words of your own.
      needs: what must come before it in the list, and why: `ft.Needs` records.
      outlives: whether its memory survives a roll-back (`state.go_back`): True, or the keys of those entries that do.
      every, first, last, predicates, main, at_end: when its step callbacks run; the gates (`ft.every`, ...) set them.
    Raises:
      TypeError: a callback can't be called.
    Example:
      >>> hook(after_step=print, name="show")
      hook('show', after_step=print)

    Source: detectron2's CallbackHook, https://detectron2.readthedocs.io/en/latest/modules/engine.html
    """

    before_train: Callback | None = attrs.field(default=None, validator=_is_callback)
    before_step: Callback | None = attrs.field(default=None, validator=_is_callback)
    after_step: Callback | None = attrs.field(default=None, validator=_is_callback)
    after_train: Callback | None = attrs.field(default=None, validator=_is_callback)
    name: str | None = None
    init: Callable[[TrainState], tree.PyTree] | None = None
    open: Callable[[], AbstractContextManager["Hook"]] | None = None
    wrap_data: Wrap | None = None
    communicates: bool = False
    stops: bool = True
    makes: frozenset[str] = attrs.field(default=frozenset(), converter=_words)
    needs: tuple[Needs, ...] = attrs.field(default=(), converter=_tuple)
    outlives: bool | tuple[str, ...] = False
    every: int = 1
    first: int = 1
    last: int | None = None
    predicates: tuple[Predicate, ...] = ()
    main: bool = False
    at_end: bool = False

    @property
    def made(self) -> frozenset[str]:
        """What others may need: `makes`, "memory" if it has one, and "lasting memory" if that outlives a roll-back."""
        memory = {"memory"} if self.init is not None else set()
        return self.makes | memory | ({"lasting memory"} if self.outlives else set())

    def admits(self, state: TrainState, number: int) -> bool:
        """Tell whether its gates are open for step `number`."""
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
        callbacks = [f"{phase}={called(getattr(self, phase))}" for phase in PHASES if getattr(self, phase)]
        text = f"hook({', '.join([repr(self.name), *callbacks] if self.name else callbacks)})"
        text = text if self.open is None else repr(self.open)
        if self.every != 1:
            text = f"every({self.every}, {text})"
        if self.first != 1 or self.last is not None:
            text = f"between({self.first}, {self.last}, {text})"
        for predicate in self.predicates:
            text = f"when({called(predicate)}, {text})"
        text = f"on_main({text})" if self.main else text
        return f"at_end({text})" if self.at_end else text


# Fields by which gates say when step callbacks run, as they are without any gate.
UNGATED: dict[str, Any] = {"every": 1, "first": 1, "last": None, "predicates": (), "main": False, "at_end": False}


@attrs.frozen(repr=False)
class Composed:
    """Several hooks in order; made by `compose`, always flat."""

    hooks: tuple[Hook, ...] = ()

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.hooks))})"


hook = Hook  # the name by which a user makes one, as for all other makers of hooks
AnyHook = Hook | Composed
identity = Composed()


def stateful(name: str, init: tree.PyTree | Callable[[TrainState], tree.PyTree], **callbacks: Any) -> Hook:
    """Make a hook with memory, kept in `state.hooks[name]` and so in every checkpoint.

    Callbacks read it there and write it with `ft.remember(state, name, memory)`.

    Args:
      name: unique in a run; the memory is found under it on resume.
      init: memory at the start of a run, or a function of the state that makes it.
      callbacks: these and what is declared, as for `ft.hook`.
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
    return hook(name=name, init=init if callable(init) else _Value(init), **callbacks)


def resource(open: Callable[[], AbstractContextManager[Hook]], *, name: str, **declared: Any) -> Hook:  # noqa: A002
    """Make a hook that holds a resource (a file, a clock) during a run, and always lets go of it.

    `fit` enters the context manager that `open()` returns and uses the hook it gives; the value itself holds nothing.

    Args:
      open: function without arguments; a frozen record with `__call__` keeps equality and pickle.
      name: unique in a run.
      declared: `init`, `communicates`, `stops`, `makes`, `needs`, `outlives`, see `ft.hook`.
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


def flatten(hooks: Any) -> tuple[Hook, ...]:
    """List the single hooks of nested sequences and compositions, in order.

    Raises:
      TypeError: an element is no hook.
    Example:
      >>> h = hook(after_step=print)
      >>> flatten([h, compose(h, h)]) == (h, h, h)
      True
    """
    if isinstance(hooks, Hook):
        return (hooks,)
    if isinstance(hooks, Composed):
        return hooks.hooks
    if isinstance(hooks, list | tuple):
        return tuple(single for item in hooks for single in flatten(item))
    raise TypeError(f"hooks: got {type(hooks).__name__}, expected ft.hook(...), one of ft.hooks, or a list of them")


def called(function: Any) -> str:
    """Return the name of a function, of what a `functools.partial` calls, or else what stands for it.

    Example:
      >>> called(print), called(partial(print, 1)), called(3)
      ('print', 'print', '3')
    """
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", repr(function)))


@attrs.frozen
class _Value:
    """A memory given as a value rather than as a function of the state."""

    value: tree.PyTree

    def __call__(self, state: TrainState) -> tree.PyTree:
        del state
        return tree.clone(self.value)  # each run starts with a memory of its own
