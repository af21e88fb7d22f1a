"""Metrics: names that say how their values combine, and one metric's value over all ranks."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from fntrain.core.state import TrainState

Combine = Literal["mean", "sum", "max", "min"]
Reduce = Literal[Combine, "same"]
Smooth = Literal["median", "latest", "sum", "each"]
Scalar = Tensor | float


class MetricName(str):
    """A metric's name that also says how its values combine and how writers show them.

    It equals the plain string, so `state.metrics["lr"]` finds it. A plain string means ("mean", "median").

    Args:
      reduce: how values of micro-batches and ranks combine; "same": they are the same on all ranks already.
      smooth: writers show the window "median", the "latest" value, the "sum" of the period, or "each" at its own step.
    Example:
      >>> name = MetricName("lr", smooth="latest")
      >>> name == "lr", name.reduce, name.smooth
      (True, 'mean', 'latest')
    """

    __slots__ = ("reduce", "smooth")
    reduce: Reduce
    smooth: Smooth

    def __new__(cls, name: str, reduce: Reduce = "mean", smooth: Smooth = "median") -> "MetricName":
        self = super().__new__(cls, name)
        self.reduce = reduce
        self.smooth = smooth
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MetricName, (str(self), self.reduce, self.smooth)


WEIGHT = MetricName("batch_weight", reduce="sum", smooth="sum")  # of this rank's part of the batch, in means over ranks


def metric_over_ranks(state: TrainState, name: str) -> Any:
    """Return a metric that is the same on all ranks: the values that each has of its part of the batch are combined.

    Returns:
      tensor or number; None if no rank has it. All ranks must ask for it at the same step.
    Example:
      >>> metric_over_ranks(ft.TrainState(step=0, position=0, seed=0, params={}, metrics={"x": 2.0}), "x")
      2.0
    """
    ranks = state.run.ranks
    value = state.metrics.get(name)
    if ranks.world_size == 1:
        return value
    key = next((key for key in state.metrics if key == name), name)
    if getattr(key, "reduce", "mean") == "same" or not ranks.max(value is not None):
        return value
    mine = None if value is None else (key, float(value), float(state.metrics.get(WEIGHT, 1.0)))
    parts = [part for part in ranks.gather(mine) if part is not None]
    return combined(parts[0][0], [(number, weight) for _, number, weight in parts])


def combined(name: str, parts: Sequence[tuple[Scalar, float]]) -> float:
    """Combine a metric's values of several ranks, each with the weight of its part of the batch, as the name says.

    Values that are all the same stay as they are, bit for bit, unless they are summed. Parts of weight 0 have no mean.

    Example:
      >>> combined("accuracy", [(0.5, 3), (1.0, 1)]), combined(MetricName("boxes", reduce="sum"), [(2, 3), (3, 1)])
      (0.625, 5.0)
    """
    reduce = getattr(name, "reduce", "mean")
    values = [float(value) for value, _ in parts]
    if reduce == "same":
        return values[0]
    if reduce == "sum":
        return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    if reduce in ("max", "min"):
        if any(map(math.isnan, values)):
            return math.nan
        return max(values) if reduce == "max" else min(values)
    weighed = [(float(value), weight) for value, weight in parts if weight > 0] or [(value, 1.0) for value in values]
    if len({value for value, _ in weighed}) == 1:
        return weighed[0][0]
    return sum(value * weight for value, weight in weighed) / sum(weight for _, weight in weighed)
