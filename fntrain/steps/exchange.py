"""Exchange: what a step asks of the other ranks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from fntrain.core.metrics import Scalar
from fntrain.core.ranks import Ranks
from fntrain.steps.batch import Batch


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
