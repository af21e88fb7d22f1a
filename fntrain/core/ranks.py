"""Ranks: the processes of a run, as one of them sees them. What communicates gets this value; alone, nobody answers.

The pure ring only asks it: the shell makes the one that is connected (`ft.shell.distribute`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from fntrain.events import MetricName, Scalar
from fntrain.steps.batch import Batch


@attrs.frozen(eq=False)
class Ranks:
    """One process among several; this one is alone, what a connected one asks of the others it knows by itself.

    Every method must be called by all ranks, in the same order.

    Args:
      rank: this process's number, from 0.
      world_size: number of processes.
      sharded: whether each holds a part of the state, so that even a forward needs them all.
    Example:
      >>> ALONE.gather("x"), ALONE.max(3)
      (['x'], 3)
    """

    rank: int = 0
    world_size: int = 1
    sharded: bool = False

    def gather(self, value: Any, *, only_first: bool = False) -> list[Any]:
        """Return the values of all ranks, in their order; with `only_first` to the first rank, to others none."""
        del only_first
        return [value]

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        return number

    def barrier(self) -> None:
        """Wait for all ranks."""

    def channel(self) -> "Ranks":
        """Return a channel of its own, for a thread that communicates beside the training; to be closed."""
        return self

    def close(self) -> None:
        """Give up a channel that `aside` made; the one method that each rank may call when it likes."""


ALONE = Ranks()
WEIGHT = MetricName("batch_weight", reduce="sum", smooth="sum")  # of this rank's part of the batch, in means over ranks


@attrs.frozen(eq=False)
class Sums:
    """Sums over ranks, on their way.

    Args:
      wait: for what the numbers given add up to; as precise as gradients are, float32 at least.
      share: part of the totals that these, and the gradients, are: 1 over the number of ranks for means over them.
      divided: whether gradients come out divided by the weight already.
    """

    wait: Callable[[], list[Scalar]]
    share: float = 1.0
    divided: bool = False


class Exchange(Protocol):
    """What a step asks of the other ranks: around each forward, before the last backward, and after it."""

    @property
    def ranks(self) -> Ranks:
        """Who they are."""

    def registered(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Give the parameters that the module has, by those that the step works on."""

    def missing(self, number: int) -> int:
        """Tell how many forwards more than these this rank has to take part in."""

    def forward(self, model: nn.Module, batch: Batch, last: bool) -> Any:
        """Run model and loss on a micro-batch; in the last one gradients meet."""

    def sums(self, numbers: Sequence[Scalar], device: torch.device) -> Sums:
        """Begin to add up numbers over ranks, in float64; tensors where the host would have to wait for the device."""

    def totals(self, numbers: Sequence[Scalar], device: torch.device) -> Sums:
        """Begin, before the last backward, to add up what the forwards gave; the sums are there after it."""

    def divide(self, divisor: Callable[[], Scalar] | None) -> None:
        """Say what the gradients, added up over ranks, are to be divided by; before the last backward."""

    def finish(self) -> None:
        """Put the gradients where they belong, after the last backward."""

    def reset(self) -> None:
        """Forget a step that failed, without a word to the other ranks."""

    def norm(self, norm: Scalar) -> Scalar:
        """Give the norm of all gradients by that of this rank's."""

    def share(self, buffers: Sequence[Tensor]) -> None:
        """Give all ranks the buffers of rank 0."""


def agreed(state: Any, name: str) -> Any:
    """Return a metric of the state, the same on all ranks: those of one rank's part of the batch are combined.

    Returns:
      tensor or number; None if no rank has it. All ranks must ask for it at the same step.
    Example:
      >>> agreed(ft.TrainState(step=0, position=0, seed=0, params={}, metrics={"x": 2.0}), "x")
      2.0
    """
    ranks: Ranks = state.run.ranks
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
