"""TrainState: the immutable record that a step maps to the next one.

Everything the next step depends on is in the record, by name; no optimizer object, iterator, module or lambda ever is.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import StateConsumedError
from fntrain.core.lease import Leased
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.tree import PyTree

StepFn = Callable[["TrainState", Any], "TrainState"]
SAVED = ("step", "position", "seed", "params", "buffers", "opt_state", "hooks", "extra")


@attrs.frozen
class Stop:
    """Why a run ended: `done` (max_steps or data), `requested` (a hook or the caller) or `error`.

    With `at_once`, of what hooks do at the end only saving is done: the process may be killed soon.
    """

    kind: Literal["done", "requested", "error"]
    reason: str
    at_once: bool = attrs.field(default=False, kw_only=True, repr=False)


@attrs.frozen(kw_only=True)
class Run:
    """What `fit` knows of its own call. Steps must not read it; hooks may; only `ft.stop` changes it.

    `ranks` are the processes that run it together, see `fntrain.core.ranks`; `outlives` says of which hooks the memory
    survives a roll-back (see `ft.Hook`).
    """

    start_step: int = 0
    max_steps: int | None = None
    stop: Stop | None = None
    ranks: Ranks = attrs.field(default=ALONE, eq=False, repr=False)
    outlives: Mapping[str, bool | tuple[str, ...]] = attrs.field(factory=dict, eq=False, repr=False)


def _view(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping if type(mapping) in (MappingProxyType, Leased) else MappingProxyType(dict(mapping))


@attrs.frozen(kw_only=True, eq=False, repr=False)
class TrainState:
    """All that the next step depends on, plus what the last step reported.

    Mappings are read-only views (of their first level); the tensors in them must not be written to. `==` and `digest`
    cover the saved fields (all but `metrics` and `run`) and hold exactly when every leaf is bitwise equal.

    Args:
      step: completed calls of the step function; a skipped update counts too.
      position: batches taken from the data; equals `step` unless a roll-back skipped some.
      seed: every random draw is a function of (seed, step, rank, use).
      params, buffers: tensors by the module's own names; buffers are the persistent ones.
      opt_state: by parameter name, then by the optimizer's own names; empty until the first update.
      hooks: what hooks remember, by hook name.
      extra: the user's own pytree.
      metrics: 0-d tensors or floats (and media) that the last step and the hooks after it reported.
      run: record of this `fit` call.
    Example:
      >>> state = TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> state.advance(metrics={"loss": 1.0}).step
      1
    """

    step: int
    position: int
    seed: int
    params: Mapping[str, Tensor] = attrs.field(converter=_view)
    buffers: Mapping[str, Tensor] = attrs.field(factory=dict, converter=_view)
    opt_state: Mapping[str, Mapping[str, PyTree]] = attrs.field(factory=dict, converter=_view)
    hooks: Mapping[str, PyTree] = attrs.field(factory=dict, converter=_view)
    extra: Mapping[str, PyTree] = attrs.field(factory=dict, converter=_view)
    metrics: Mapping[str, Any] = attrs.field(factory=dict, converter=_view)
    run: Run = attrs.field(factory=Run)

    def replace(self, **changes: Any) -> "TrainState":
        """Return a state with some fields changed; `attrs.evolve`, without its checks, as it runs at every step.

        Example:
          >>> state = TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
          >>> state.replace(extra={"note": "warm"}).extra["note"]
          'warm'
        """
        new = object.__new__(TrainState)
        for name, read, write in _SLOTS:
            if name not in changes:
                write(new, read(self))
            else:
                value = changes.pop(name)
                write(new, _view(value) if name in _MAPPINGS else value)
        if changes:
            raise TypeError(f"replace: got {sorted(changes)}, expected some of {[name for name, *_ in _SLOTS]}")
        return new

    def advance(self, **changes: Any) -> "TrainState":
        """Return `replace(**changes)` with step and position one further: what a hand-written step returns."""
        return self.replace(step=self.step + 1, position=self.position + 1, **changes)

    def go_back(self, to: "TrainState") -> "TrainState":
        """Return an earlier state of the same run, `to`, with what outlives a roll-back as it is now.

        A best checkpoint on disk survives a roll-back, so the memory of its score must too; all other memory is that
        of then, and so is the position: `state.go_back(to.replace(position=state.position))` skips the data since.

        Args:
          to: a state that a hook kept (`ft.snapshot`, if steps run in place).
        Example:
          >>> start = TrainState(step=0, position=0, seed=0, params={}, hooks={"best": 0.5, "count": 1})
          >>> now = start.advance(hooks={"best": 0.9, "count": 2}, run=Run(outlives={"best": True}))
          >>> now.go_back(start).step, dict(now.go_back(start).hooks)
          (0, {'best': 0.9, 'count': 1})
        """
        memory = dict(to.hooks)
        for name, kept in self.run.outlives.items():
            now = self.hooks[name]
            memory[name] = {**memory[name], **{key: now[key] for key in kept}} if isinstance(kept, tuple) else now
        return to.replace(hooks=memory, run=self.run)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrainState):
            return NotImplemented
        return self is other or tree.bitwise_equal(saved_fields(self), saved_fields(other))

    __hash__ = None  # type: ignore[assignment]  # equality reads every leaf

    def __copy__(self) -> "TrainState":
        return self  # immutable; plain dicts of the same tensors would escape the lease

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only views do not pickle (or deepcopy); plain dicts do.
        fields = {name: read(self) for name, read, _ in _SLOTS}
        return _rebuild, ({name: dict(one) if name in _MAPPINGS else one for name, one in fields.items()},)

    def __repr__(self) -> str:
        parts = {name: _summary(getattr(self, name)) for name in _TREES}
        parts |= {"metrics": ", ".join(self.metrics)}
        parts |= {"stop": f"{self.run.stop.kind}: {self.run.stop.reason}"} if self.run.stop else {}
        first = f"TrainState(step={self.step}, position={self.position}, seed={self.seed})"
        return "\n".join([first, *(f"  {name:<10}{text}" for name, text in parts.items() if text)])


_TREES = ("params", "buffers", "opt_state", "hooks", "extra")
_MAPPINGS = frozenset({*_TREES, "metrics"})
_SLOTS = [
    (field.name, getattr(TrainState, field.name).__get__, getattr(TrainState, field.name).__set__)
    for field in attrs.fields(TrainState)
]


def check_state(name: str, value: Any) -> None:
    """Raise TypeError unless a value is a TrainState.

    Example:
      >>> check_state("state", {})
      Traceback (most recent call last):
      TypeError: state: got dict, expected a TrainState (ft.init_state makes one)
    """
    if not isinstance(value, TrainState):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a TrainState (ft.init_state makes one)")


def saved_fields(state: TrainState) -> dict[str, Any]:
    """Return the fields that checkpoints hold and equality compares, by name; raises TypeError for what is no state."""
    check_state("state", state)
    return {name: getattr(state, name) for name in SAVED}


def named_leaves(state: TrainState) -> Iterator[tuple[str, tree.Leaf]]:
    """Yield (dotted path, leaf) for every saved leaf of a state.

    Example:
      >>> state = TrainState(step=3, position=3, seed=0, params={"fc.bias": torch.zeros(2)})
      >>> [path for path, _ in named_leaves(state)]
      ['step', 'position', 'seed', 'params.fc.bias']
    """
    return tree.named_leaves(saved_fields(state))


def digest(state: TrainState) -> str:
    """Return 16 hexadecimal digits that are equal for two states exactly when the states are (`==`).

    Of a state in parts (strategy "fsdp") it is of this rank's part; a checkpoint of it, loaded, is whole.
    Cost: reads every saved byte once; a device transfer for tensors on a GPU.

    Example:
      >>> state = TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> digest(state) == digest(snapshot(state)), digest(state) == digest(state.replace(seed=1))
      (True, False)
    """
    return tree.fingerprint(saved_fields(state))


def snapshot(state: TrainState) -> TrainState:
    """Copy a state into memory of its own, so that it outlives a donated step or a write to the module.

    Example:
      >>> weight = torch.zeros(2)
      >>> state = TrainState(step=0, position=0, seed=0, params={"w": weight})
      >>> kept = snapshot(state); _ = weight.add_(1)
      >>> kept.params["w"]
      tensor([0., 0.])
    """
    metrics = {name: one.detach().clone() if isinstance(one, Tensor) else one for name, one in state.metrics.items()}
    return state.replace(**tree.clone({name: getattr(state, name) for name in _TREES}), metrics=metrics)


def stop(state: TrainState, reason: str, *, at_once: bool = False) -> TrainState:
    """Return a state that asks `fit` to stop after this step; an earlier request stays.

    With `at_once`, hooks that also run at the end (an evaluation) do not, but for those that save.

    Example:
      >>> state = TrainState(step=0, position=0, seed=0, params={})
      >>> stop(state, "loss below 0.1").run.stop
      Stop(kind='requested', reason='loss below 0.1')
    """
    if state.run.stop is not None:
        return state
    return state.replace(run=attrs.evolve(state.run, stop=Stop("requested", reason, at_once=at_once)))


def remember(state: TrainState, name: str, memory: PyTree) -> TrainState:
    """Return a state in which the hook `name` remembers `memory` (see `ft.stateful`).

    Example:
      >>> state = TrainState(step=0, position=0, seed=0, params={})
      >>> dict(remember(state, "best", 0.5).hooks)
      {'best': 0.5}
    """
    return state.replace(hooks={**state.hooks, name: memory})


def _rebuild(fields: dict[str, Any]) -> TrainState:
    return TrainState(**fields)


def _summary(value: PyTree) -> str:
    try:
        leaves = [leaf for _, leaf in tree.named_leaves(value)]
    except StateConsumedError:
        return repr(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    numbers, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    text = f"{len(tensors)} tensors, {numbers:,} numbers, {size:,} bytes" if leaves else ""
    return text + (f", {len(leaves) - len(tensors)} other leaves" if len(leaves) > len(tensors) else "")
