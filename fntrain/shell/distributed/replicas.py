"""The exchange of ranks in a step; that of ranks which each hold the whole state is torch's DistributedDataParallel."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fntrain.core.ranks import Ranks
from fntrain.events import Scalar
from fntrain.steps.batch import Batch
from fntrain.steps.exchange import Sums
from fntrain.steps.loss import Weighted
from fntrain.steps.supervised import LossFn, SupervisedStep

Compress = Literal["bf16", "fp16"]
# Buffers are shared after the backward instead of before the forward, so that all ranks return the same state.
_FORWARD_SYNC = "forward_sync_buffers"  # what newer versions of torch call it
_NO_BROADCAST: dict[str, Any] = {
    _FORWARD_SYNC if _FORWARD_SYNC in signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ModelAndLoss(nn.Module):
    """Both together, as DistributedDataParallel wants them: tensors come out, the rest is kept aside.

    With `carried`, numbers of a step travel with the gradients, as that parameter's: no message of their own.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, carried: nn.Parameter | None = None) -> None:
        super().__init__()
        self.carried = carried
        self.numbers: list[Tensor] = []  # to travel with the next gradients
        self.model = model
        self.loss_fn = (loss_fn,)  # not as a sub-module, should it be one
        self.output: Any = None

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        output = self.loss_fn[0](self.model, batch)
        loss = output.loss_sum if isinstance(output, Weighted) else output
        terms: dict[str, Any] = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        self.output = output, [*terms]
        if self.carried is not None:
            for name, term in terms.items():
                if isinstance(term, Tensor) and term.requires_grad:  # what is wrong with others, the step says
                    terms[name] = _Carry.apply(term, self.carried, self.numbers)  # type: ignore[no-untyped-call]
                    break
        return tuple(terms.values())

    def restored(self, tensors: tuple[Tensor, ...]) -> Any:
        """What the loss function returned, with the tensors that came out."""
        (output, names), self.output = self.output, None
        loss: Any = tensors[0] if names == [""] else dict(zip(names, tensors, strict=True))
        return attrs.evolve(output, loss_sum=loss) if isinstance(output, Weighted) else loss


class _Carry(torch.autograd.Function):
    """Gives numbers, those that are in the list at the time, as the gradient of a parameter."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, carried: Tensor, numbers: list[Tensor]) -> Tensor:
        del carried
        ctx.numbers = numbers
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], (ctx.numbers[0] if ctx.numbers else None), None


class Exchanging:
    """What exchanges have in common; see `fntrain.steps.exchange.Exchange`."""

    def __init__(self, here: Ranks) -> None:
        self.ranks = here

    def registered(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """They are the same."""
        return params

    def missing(self, number: int) -> int:
        """None: only the last forward of a step needs the others."""
        del number
        return 0

    def sums(self, numbers: Sequence[Scalar], device: torch.device) -> Sums:
        """Begin to add up numbers over ranks, in float64."""
        mine = _doubles(numbers, device)
        work: Any = dist.all_reduce(mine, async_op=True)

        def wait() -> list[Scalar]:
            work.wait()
            return _apart(mine)

        return Sums(wait)

    def totals(self, numbers: Sequence[Scalar], device: torch.device) -> Sums:
        """By a message of their own."""
        return self.sums(numbers, device)

    def divide(self, divisor: Callable[[], Scalar] | None) -> None:
        """Nothing to remember: the step divides."""

    def finish(self) -> None:
        """Nothing left to do: gradients are where they belong."""

    def reset(self) -> None:
        """Forget a step that failed."""

    def norm(self, norm: float | Tensor) -> float | Tensor:
        """The norm of the gradients, which all ranks have whole."""
        return norm

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors of rank 0, as bytes in one message: they may be of several dtypes."""
        if not tensors:
            return
        ordered = sorted((one.detach() for one in tensors), key=lambda one: -one.itemsize)  # views want alignment
        flat = torch.cat([one.resolve_conj().reshape(-1).view(torch.uint8) for one in ordered])
        dist.broadcast(flat, 0)
        if self.ranks.rank > 0:
            for one, part in zip(ordered, torch.split(flat, [one.nbytes for one in ordered]), strict=True):
                one.copy_(part.view(one.dtype).view(one.shape))


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
        self.params = step.slots.params
        self.begun = False  # whether a step is on its way
        self.adding = None if compress is None else _Adding(HALF[compress])
        carried = None if self.adding else _carried(step.slots.params.values(), device)
        self.both = ModelAndLoss(step.model, step.loss_fn, carried)
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
        if self.adding is not None:
            self.ddp.register_comm_hook(self.adding, _Adding.up)

    def forward(self, model: nn.Module, batch: Batch, last: bool) -> Any:
        """Run model and loss; in all but the last micro-batch gradients stay here (torch's `no_sync`)."""
        del model
        self.begun = True
        self.ddp.require_backward_grad_sync = last
        return self.both.restored(self.ddp(batch))

    def totals(self, numbers: Sequence[Scalar], device: torch.device) -> Sums:
        """With the gradients, unless these are compressed."""
        carried = self.both.carried
        if carried is None:
            return attrs.evolve(super().totals(numbers, device), divided=True)
        carried.grad = None  # or they would be added to those of a step that failed
        self.both.numbers[:] = [_doubles(numbers, device).to(carried.dtype)]

        def means() -> list[Scalar]:
            assert carried.grad is not None
            return _apart(carried.grad)

        return Sums(means, share=1 / self.ranks.world_size)

    def finish(self) -> None:
        """Say which parameters torch still waits for: what it has added up by now is a part of the gradients."""
        try:
            self.ddp.reducer._check_reducer_finalized()
        except RuntimeError as error:
            names = [name for name, param in self.params.items() if param.requires_grad and param.grad is None]
            raise ValueError(
                f"loss_fn: {names or 'a parameter'} got no gradient, and the other ranks wait for it; use every "
                "parameter, freeze them (ft.group), or pass find_unused_parameters=True to ft.shell.distribute"
            ) from error
        self.begun = False

    def reset(self) -> None:
        """Forget a step that failed on its way: torch would wait for the rest of its gradients."""
        if self.begun:
            self.ddp.reducer._reset_state()
            self.begun = False

    def divide(self, divisor: Callable[[], Scalar] | None) -> None:
        """Remember what gradients are to be divided by before they are cast: their sums might overflow."""
        if self.adding is not None:
            self.adding.divisor = divisor


def _carried(params: Iterable[Tensor], device: torch.device) -> nn.Parameter:
    """A parameter for the numbers of a step; as precise as gradients are, float32 at least."""
    double = any(param.dtype in (torch.float64, torch.complex128) for param in params)
    dtype = torch.float64 if double else torch.float32
    return nn.Parameter(torch.zeros(3, dtype=dtype, device=device))


def _doubles(numbers: Sequence[Scalar], device: torch.device) -> Tensor:
    """Numbers in float64 on a device, which nobody waits for: those of the host are filled in, not copied."""
    if device.type == "cpu":
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    return torch.stack(
        [
            number.detach().to(device, torch.float64).reshape(())
            if isinstance(number, Tensor)
            else torch.full((), float(number), dtype=torch.float64, device=device)
            for number in numbers
        ]
    )


def _apart(numbers: Tensor) -> list[Scalar]:
    """Numbers one by one, in float64; copies, since the next step writes over the bucket that they may lie in."""
    if numbers.device.type == "cpu":
        return numbers.tolist()
    return list(numbers.to(torch.float64, copy=True).unbind())


class _Adding:
    """How gradients add up as halves; it does not know the module, which torch's reducer would then keep alive."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.divisor: Callable[[], Scalar] | None = None

    def up(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Add up a bucket of gradients over ranks, divided; torch's own hooks divide by the number of ranks."""
        grads = bucket.buffer()
        if self.divisor is not None:
            grads.div_(self.divisor())
        future: Any = dist.all_reduce(grads.to(self.dtype), async_op=True).get_future()
        return future.then(lambda done: grads.copy_(done.value()[0]))  # type: ignore[no-any-return]
