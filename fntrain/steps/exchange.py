"""What a step asks of the other ranks, as a protocol, and the answers of a rank that is alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from fntrain.core.ranks import ALONE, Ranks
from fntrain.events import Scalar
from fntrain.steps.batch import Batch
from fntrain.steps.loss import Objective
from fntrain.steps.module import Slots


@attrs.frozen(eq=False)
class Totals:
    """What the parts of a step add up to, over its micro-batches and over ranks.

    Args:
      loss: the loss of the whole batch, divided as the gradients are.
      divisor: what the gradients are still to be divided by; None: they are as they should be.
      counts: the step is skipped if this is 0.
    """

    loss: Scalar
    divisor: Scalar | None
    counts: Scalar


def total(parts: Sequence[Objective], field: str) -> Any:
    """Return the sum of a field over micro-batches."""
    if len(parts) == 1:
        return getattr(parts[0], field)
    return reduce(add, [getattr(part, field) for part in parts])  # not sum(): 0 + value is one operation more


def divided(loss: Scalar, divisor: Scalar) -> Scalar:
    """Divide a loss as torch does: by 0 too, where Python's numbers raise."""
    if isinstance(loss, Tensor) or isinstance(divisor, Tensor) or divisor:
        return loss / divisor
    return loss * math.inf


class Exchange(Protocol):
    """What a step asks of the other ranks: around each forward, before the last backward, and after it."""

    @property
    def ranks(self) -> Ranks:
        """Who they are."""

    def sums(self, numbers: Mapping[str, Scalar], device: torch.device, /) -> Mapping[str, Scalar]:
        """Add up numbers over ranks, in float64; tensors where the host would have to wait for the device."""

    def padded(self, micro_batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
        """Give the micro-batches, and whether each counts: some run only because other ranks have more of them."""

    def forward(self, model: nn.Module, batch: Batch, last: bool, /) -> Any:
        """Run model and loss on a micro-batch; in the backward of the last one gradients are added up over ranks."""

    def totals(self, parts: Sequence[Objective], device: torch.device, /) -> Callable[[], Totals]:
        """Begin, before the last backward, to add up what the forwards gave.

        What is returned is called after that backward: it puts gradients where they belong, and gives the sums.
        """

    def norm(self, norm: Scalar) -> Scalar:
        """Return the norm of all gradients, given that of the gradients which this rank holds."""

    def broadcast_buffers(self, slots: Slots) -> None:
        """Give all ranks the buffers of rank 0."""

    def reset(self) -> None:
        """Forget a step that failed, without communication: the other ranks may not have failed."""


@attrs.frozen(eq=False)
class Alone:
    """The exchange of a process that trains alone: every answer is its own."""

    loss_fn: Callable[[nn.Module, Batch], Any]
    ranks: Ranks = ALONE

    def sums(self, numbers: Mapping[str, Scalar], _device: torch.device, /) -> Mapping[str, Scalar]:
        """Return the numbers as they are."""
        return numbers

    def padded(self, micro_batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
        """Return the micro-batches; all count."""
        return ((one, True) for one in micro_batches)

    def forward(self, model: nn.Module, batch: Batch, _last: bool, /) -> Any:
        """Run model and loss."""
        return self.loss_fn(model, batch)

    def totals(self, parts: Sequence[Objective], _device: torch.device, /) -> Callable[[], Totals]:
        """Add up at once; without weights nothing is divided, so that one micro-batch is bitwise the raw loop."""
        loss, weight = total(parts, "total"), total(parts, "weight") if parts[0].divide else None
        sums = Totals(loss if weight is None else divided(loss, weight), weight, total(parts, "counts"))
        return lambda: sums

    def norm(self, norm: Scalar) -> Scalar:
        """Return the norm as it is."""
        return norm

    def broadcast_buffers(self, slots: Slots) -> None:
        """Do nothing: no other rank has buffers."""

    def reset(self) -> None:
        """Do nothing: no other rank waits."""
