"""The exchange of ranks in a step; that of ranks which each hold the whole state is torch's DistributedDataParallel."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fntrain.batch import Batch
from fntrain.events import Scalar
from fntrain.loss import Weighted
from fntrain.ranks import Ranks
from fntrain.step import LossFn, SupervisedStep

Compress = Literal["bf16", "fp16"]
# Buffers are shared after the backward instead of before the forward, so that all ranks return the same state.
_FORWARD_SYNC = "forward_sync_buffers"  # what newer versions of torch call it
_NO_BROADCAST: dict[str, Any] = {
    _FORWARD_SYNC if _FORWARD_SYNC in signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ModelAndLoss(nn.Module):
    """Both together, as DistributedDataParallel wants them: tensors come out, the rest is kept aside."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = (loss_fn,)  # not as a sub-module, should it be one
        self.output: Any = None

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        output = self.loss_fn[0](self.model, batch)
        loss = output.loss_sum if isinstance(output, Weighted) else output
        terms: dict[str, Any] = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        self.output = output, [*terms]
        return tuple(terms.values())

    def restored(self, tensors: tuple[Tensor, ...]) -> Any:
        """What the loss function returned, with the tensors that came out."""
        (output, names), self.output = self.output, None
        loss: Any = tensors[0] if names == [""] else dict(zip(names, tensors, strict=True))
        return attrs.evolve(output, loss_sum=loss) if isinstance(output, Weighted) else loss


class Exchanging:
    """What exchanges have in common; see `fntrain.ranks.Exchange`."""

    divides = True

    def __init__(self, here: Ranks) -> None:
        self.ranks = here

    def registered(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """They are the same."""
        return params

    def missing(self, number: int) -> int:
        """None: only the last forward of a step needs the others."""
        del number
        return 0

    def sums(self, numbers: Sequence[Scalar], device: torch.device) -> Callable[[], list[Tensor]]:
        """Begin to add up numbers over ranks, in float64; the function returned waits for them."""
        with torch.no_grad():
            mine = torch.stack([_double(one, device) for one in numbers])
        work: Any = dist.all_reduce(mine, async_op=True)

        def wait() -> list[Tensor]:
            work.wait()
            return list(mine.unbind())

        return wait

    def divide(self, divisor: Callable[[], Tensor] | None) -> None:
        """Nothing to remember: the step divides."""

    def finish(self) -> None:
        """Nothing left to do: gradients are where they belong."""

    def norm(self, norm: float | Tensor) -> float | Tensor:
        """The norm of the gradients, which all ranks have whole."""
        return norm

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors of rank 0, together."""
        if tensors:
            group: Any = dist.group.WORLD
            dist._broadcast_coalesced(group, [one.detach() for one in tensors], 250 << 20, 0)  # type: ignore[attr-defined]


class Replicas(Exchanging):
    """The exchange of ranks that each hold the whole state."""

    def __init__(
        self,
        here: Ranks,
        step: SupervisedStep,
        device: torch.device,
        compress: Compress | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(here)
        self.both = ModelAndLoss(step.model, step.loss_fn)
        self.adding = _Adding(None if compress is None else HALF[compress])
        frozen = [step.slots.params[name] for name in step.bound.frozen if step.slots.params[name].requires_grad]
        for param in frozen:  # they get no gradient, and must not be waited for
            param.requires_grad_(False)
        try:
            self.ddp = DistributedDataParallel(
                self.both,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **options,
                **_NO_BROADCAST,
            )
        finally:
            for param in frozen:
                param.requires_grad_(True)
        self.ddp.register_comm_hook(self.adding, _Adding.up)

    def forward(self, model: nn.Module, batch: Batch, last: bool) -> Any:
        """Run model and loss; in all but the last micro-batch gradients stay here (torch's `no_sync`)."""
        del model
        self.ddp.require_backward_grad_sync = last
        return self.both.restored(self.ddp(batch))

    def divide(self, divisor: Callable[[], Tensor] | None) -> None:
        """Remember what gradients are to be divided by."""
        self.adding.divisor = divisor


def _double(number: Scalar, device: torch.device) -> Tensor:
    """A number in float64 on a device, which nobody waits for: those of the host are filled in, not copied."""
    if isinstance(number, Tensor):
        return number.detach().to(device, torch.float64).reshape(())
    return torch.full((), float(number), dtype=torch.float64, device=device)


class _Adding:
    """How gradients add up; it does not know the module, which it would keep alive: torch's reducer holds it."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.divisor: Callable[[], Tensor] | None = None

    def up(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Add up a bucket of gradients over ranks, divided; torch's own hook divides by the number of ranks here."""
        grads = bucket.buffer()
        if self.divisor is not None:
            grads.div_(self.divisor())
        small = grads if self.dtype is None else grads.to(self.dtype)
        future: Any = dist.all_reduce(small, async_op=True).get_future()
        if self.dtype is None:
            return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]
        return future.then(lambda done: grads.copy_(done.value()[0]))  # type: ignore[no-any-return]
