"""Job: what a recipe builds, ready for `ft.fit`. Result: what a run of it returns."""

from collections.abc import Callable, Mapping
from inspect import unwrap
from typing import Any

import attrs
from torch import nn

from fntrain.core.hook import UNGATED, AnyHook, Hook, flatten
from fntrain.core.state import StepFn, TrainState
from fntrain.evaluation import flattened
from fntrain.hooks.evaluate import Evaluate
from fntrain.steps.optim import Optimizer

EvaluationFn = Callable[[TrainState], Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Job:
    """What `ft.build` makes of a recipe: the arguments of `ft.fit`, and what hooks may want to know."""

    config: Any
    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    optimizer: Optimizer
    step_fn: StepFn
    data: Any = attrs.field(repr=lambda data: type(data).__name__)
    state: TrainState = attrs.field(repr=False)
    evaluation: EvaluationFn | None = None
    hooks: tuple[AnyHook, ...] = ()

    @property
    def named_hooks(self) -> list[Hook]:
        """Return the single hooks, without their gates, in the order in which they run."""
        return [attrs.evolve(one, **UNGATED) for one in flatten(self.hooks)]

    def results(self, state: TrainState) -> dict[str, float]:
        """Return the results of evaluating a state; they are read off its metrics if a hook has just reported them."""
        if self.evaluation is None:
            return {}
        found: Mapping[str, Any] = self._reported(state)
        if not found and not (state.run.stop and state.run.stop.at_once):  # the process may be killed soon
            found = self.evaluation(state)
        return {name: float(value) for name, value in flattened(found).items()}

    def _reported(self, state: TrainState) -> dict[str, Any]:
        """Return the results in the metrics, by the first hook that evaluates the weights themselves (no average)."""
        callbacks = [unwrap(one.after_step) for one in self.named_hooks if one.after_step]  # `hooks.timed` wraps them
        asked = [callback for callback in callbacks if isinstance(callback, Evaluate)]
        prefixes = [one.prefix for one in asked if one.fn is self.evaluation and one.weights is None]
        if not prefixes:
            return {}
        metrics = state.metrics.items()
        return {name.removeprefix(prefixes[0]): value for name, value in metrics if name.startswith(prefixes[0])}


@attrs.frozen(kw_only=True)
class Result:
    """What `ft.run` returns: the last state, and the results of the evaluation at the end by name."""

    state: TrainState
    results: Mapping[str, float]
