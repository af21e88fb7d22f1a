"""hooks.evaluate: measure the state every n steps and after the last one."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from toolz import keymap, merge_with, valmap
from torch import Tensor

from fntrain.core import gates
from fntrain.core.check import function, real
from fntrain.core.hook import AnyHook, Needs, hook
from fntrain.core.ranks import Ranks
from fntrain.core.state import TrainState
from fntrain.evaluation import flattened
from fntrain.events import MetricName, Scalar
from fntrain.hooks.ema import averaged
from fntrain.metrics import combined


@attrs.frozen
class Evaluate:
    """The callback: runs a function of the state and adds its results to the metrics."""

    fn: Callable[[TrainState], Mapping[str, Any]] = attrs.field(repr=lambda fn: getattr(fn, "__qualname__", repr(fn)))
    prefix: str
    weights: str | None = None

    def __call__(self, state: TrainState) -> TrainState:
        results = self.fn(state if self.weights is None else averaged(state, self.weights))
        if not isinstance(results, Mapping):
            raise TypeError(f"evaluate: the function returned {type(results).__name__}, expected a dict of numbers")
        numbers = {name: _number(name, value) for name, value in flattened(results).items()}
        if state.run.ranks.world_size > 1:
            numbers = _means(state.run.ranks, numbers)
        named = keymap(lambda name: MetricName(f"{self.prefix}{name}", reduce="same", smooth="each"), numbers)
        return state.replace(metrics={**state.metrics, **named})


def _means(ranks: Ranks, numbers: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the mean of each result over the ranks that have it; those of `ft.evaluation` are equal on all ranks."""
    values = merge_with(list, *ranks.gather(valmap(float, numbers)))
    return {name: combined(name, [(value, 1.0) for value in several]) for name, several in values.items()}


def _number(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"evaluate: {name!r} has shape {tuple(value.shape)}, expected a number")
    return value if isinstance(value, Tensor) else real(f"evaluate: {name!r} is", value, ValueError)


def evaluate(
    fn: Callable[[TrainState], Mapping[str, float]],
    *,
    every: int,
    prefix: str = "eval/",
    weights: str | None = None,
    name: str = "evaluate",
) -> AnyHook:
    """Run a function of the state every n steps and after the last one, and report its results.

    Whatever their period, writers write every result at its own step. List it before `write_metrics` and before
    hooks that read the results, in the order evaluate, best checkpoint, write.

    Args:
      fn: state -> {name: number}, nested names join with "/"; `ft.evaluation(model, fn, data)` makes one. A
        hand-written one must bind the state (`ft.bound`): closing over the module alone would see its first weights
        in pure mode. Every rank calls it; a result is the mean over those that return it.
      every: number of steps between two.
      prefix: put before every name.
      weights: name of a `hooks.ema`, listed before this one, whose averages are evaluated instead of the weights.
      name: unique in a run.
    Raises:
      TypeError: `fn` can't be called, or (in the run) returns no dict.
      ValueError: `every` is not positive; (when the run starts) no hook named `weights` is listed before it; (in the
        run) that hook keeps no averages, or a result is no number.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={})
      >>> hook = evaluate(lambda state: {"twice": 2 * state.step}, every=2)
      >>> dict(ft.fit(step_fn, [hook], state=state, data=[1, 2, 3], max_steps=3).metrics)
      {'eval/twice': 6}

    Source: detectron2's EvalHook
    """
    function("fn", fn, "a function of the state, such as ft.evaluation(...)")
    needs = [] if weights is None else [Needs("memory", f"reads the memory of {weights!r}", of=weights)]
    declared: Any = {"communicates": True, "stops": False, "makes": "metrics", "needs": needs}
    reporting = hook(after_step=Evaluate(fn, prefix, weights), name=name, **declared)
    return gates.at_end(gates.every(every, reporting))
