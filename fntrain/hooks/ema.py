"""hooks.ema: keep an exponential moving average of the weights. averaged: put it in place of the weights.

The average is kept in `state.hooks`, so every checkpoint has it; each update makes a new one, so that older states
keep theirs.
"""

from collections.abc import Mapping
from itertools import compress
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core import gates, tree
from fntrain.core.check import number
from fntrain.core.hook import AnyHook, stateful
from fntrain.core.state import TrainState, remember
from fntrain.core.tree import PyTree

# Averaged in float32: in half precision an update by 1 - decay = 0.001 of the difference would be rounded away.
_LOW = (torch.float16, torch.bfloat16)


def ema(decay: float = 0.999, *, every: int = 1, warmup: bool = True, name: str = "ema") -> AnyHook:
    """Keep an exponential moving average of parameters and buffers; list it before hooks that read or save it.

        average = d * average + (1 - d) * weights,    d = min(decay, (1 + updates) / (10 + updates))

    It begins as the weights at the start of the run. Integer buffers are copied, half precision is averaged in float32.
    A step whose update was skipped counts like any other: asking which were would wait for the device. Memory and cost:
    one more copy of the weights, made anew at each update by one foreach call, as the states before keep theirs.

    Args:
      decay: share of the old average, in [0, 1).
      every: number of steps between two updates; what comes after the last one is not in the average.
      warmup: let the decay grow with the number of updates, as above; False uses `decay` from the first one on.
      name: unique in a run; `state.hooks[name]` has "params", "buffers" and "updates".
    Raises:
      ValueError: the decay is not in [0, 1), or `every` is not positive.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(params={"w": state.params["w"] + batch})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(())})
      >>> final = ft.fit(step_fn, [ema(0.5, warmup=False)], state=state, data=[1, 1], max_steps=2)
      >>> final.params["w"], averaged(final).params["w"]
      (tensor(2.), tensor(1.2500))

    Source: Polyak and Juditsky 1992; the warm-up is that of tf.train.ExponentialMovingAverage
    """
    number("decay", decay, lambda decay: 0 <= decay < 1, "in [0, 1)")
    return gates.every(every, stateful(name, _start, after_step=Ema(name, decay, warmup), stops=False))


def averaged(state: TrainState, name: str = "ema") -> TrainState:
    """Return a state with the averages of `hooks.ema` in place of its parameters and buffers, in their dtypes.

    For evaluation, `ft.export` and `ft.bound`. Shares memory with the average; the state given stays as it is.

    Args:
      state: of a run with that hook, or a checkpoint of one.
      name: of the hook.
    Raises:
      ValueError: the state has no averages of that name, or they are of another model.
    Example:
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(())})
      >>> averaged(state)
      Traceback (most recent call last):
      ValueError: state.hooks: has no averages named 'ema', only those named []; list ft.hooks.ema(...) in the run
    """
    memory: Any = state.hooks.get(name)
    if not _is_average(memory):
        there = sorted(other for other, kept in state.hooks.items() if _is_average(kept))
        raise ValueError(
            f"state.hooks: has no averages named {name!r}, only those named {there}; list ft.hooks.ema(...) in the run"
        )
    changes = {}
    for field in ("params", "buffers"):
        current = getattr(state, field)
        pairs = _paired(current, memory[field])
        if not all(_fits(old, new) for new, old in pairs):
            raise ValueError(f"state.hooks[{name!r}]: averages of another model than state.{field}, by names or shapes")
        averages = [tree.split_like(new, old).to(new.dtype) for new, old in pairs if old is not None]
        changes[field] = _filled(current, averages)
    return state.replace(**changes)


@attrs.frozen
class Ema:
    """The callback: moves the averages towards the state's weights."""

    name: str
    decay: float
    warmup: bool

    def __call__(self, state: TrainState) -> TrainState:
        memory: Any = state.hooks[self.name]
        updates = memory["updates"]
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay
        return remember(state, self.name, {**_moved(state, memory, 1 - decay), "updates": updates + 1})


def _start(state: TrainState) -> dict[str, Any]:
    """Return the memory at the start: a copy of the weights."""
    return {**_moved(state, {"params": {}, "buffers": {}}, 1.0), "updates": 0}


def _moved(state: TrainState, memory: Mapping[str, Any], weight: float) -> dict[str, Any]:
    """Move the averages by `weight` towards the state's tensors, in new memory; what has no average is copied."""
    current = {"params": state.params, "buffers": state.buffers}
    whole = _paired(current, memory)
    # Of a tensor that is split over ranks, each rank averages the part that it holds.
    pairs = [(tree.local(new), old if old is None else tree.local(tree.split_like(new, old))) for new, old in whole]
    # Integers, and what is new in this run, have no mean to move towards the weights.
    moving = [_fits(old, new) and (new.is_floating_point() or new.is_complex()) for new, old in pairs]
    news = [new.float() if new.dtype in _LOW else new for new, _ in pairs]
    olds = [old.to(new) for (_, old), new, moves in zip(pairs, news, moving, strict=True) if moves and old is not None]
    copies = iter(tree.clone_tensors([new for new, moves in zip(news, moving, strict=True) if not moves]))
    with torch.no_grad():
        means = iter(torch._foreach_lerp(olds, list(compress(news, moving)), weight) if olds else ())
    averages = [
        tree.relocated(new, next(means if moves else copies)) for (new, _), moves in zip(whole, moving, strict=True)
    ]
    return dict(_filled(current, averages))


def _paired(current: PyTree, memory: PyTree) -> list[tuple[Tensor, Tensor | None]]:
    """Pair every tensor of a tree with that of the same name in memory, which may have another order or lack it."""
    if isinstance(current, Tensor):
        return [(current, memory if isinstance(memory, Tensor) else None)]
    kept = memory if isinstance(memory, Mapping) else {}
    return [pair for name, value in current.items() for pair in _paired(value, kept.get(name))]


def _filled(current: PyTree, tensors: list[Tensor]) -> PyTree:
    """A tree like `current` of other tensors, in its order."""
    following = iter(tensors)
    return tree.map_tensors(lambda _: next(following), current)


def _fits(old: Tensor | None, new: Tensor) -> bool:
    return old is not None and old.shape == new.shape


def _is_average(memory: PyTree) -> bool:
    return isinstance(memory, Mapping) and memory.keys() == {"params", "buffers", "updates"}
