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
from fntrain.steps.body import Body
from fntrain.steps.exchange import Totals, divided, total
from fntrain.steps.loss import Objective, Weighted
from fntrain.steps.module import Slots
from fntrain.steps.settings import LossFn

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
    """What exchanges between processes have in common; see `fntrain.steps.exchange.Exchange`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def sums(self, numbers: Mapping[str, Scalar], device: torch.device) -> Mapping[str, Scalar]:
        """Add up numbers over ranks, in float64."""
        return dict(zip(numbers, _sums(list(numbers.values()), device)(), strict=True))

    def padded(self, micro_batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
        """All count: only the last forward of a step needs the others."""
        return ((one, True) for one in micro_batches)

    def totals(self, parts: Sequence[Objective], device: torch.device) -> Callable[[], Totals]:
        """Add up by a message of their own."""
        wait, divide = _sums(_numbers(parts), device), parts[0].divide
        return lambda: _totals(wait(), divide=divide)

    def norm(self, norm: Scalar) -> Scalar:
        """The norm of the gradients, which all ranks have whole."""
        return norm

    def broadcast_buffers(self, slots: Slots) -> None:
        """Broadcast the buffers of rank 0."""
        self.broadcast(list(slots.buffers.values()))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors of rank 0, as bytes in one message: they may be of several dtypes."""
        if not tensors:
            return
        ordered = sorted((one.detach() for one in tensors), key=lambda one: -one.itemsize)  # views want alignment
        flat = torch.cat([one.resolve_conj().reshape(-1).view(torch.uint8) for one in ordered])
        dist.broadcast(flat, 0)
        if self.ranks.rank > 0:
            for one, part in zip(ordered, torch.split(flat, [one.nbytes for one in ordered]), strict=True):
                one.copy_(part.view(one.dtype).view(one.shape))

    def reset(self) -> None:
        """Forget a step that failed."""


class Replicas(Exchanging):
    """The exchange of ranks that each hold the whole state."""

    def __init__(self, ranks: Ranks, body: Body, compress: Compress | None, options: dict[str, Any]) -> None:
        super().__init__(ranks)
        self.params = body.slots.params
        self.begun = False  # whether a step is on its way
        self.adding = None if compress is None else _Adding(HALF[compress])
        carried = None if self.adding else _carried(self.params.values(), body.device)
        self.both = ModelAndLoss(body.settings.model, body.settings.loss_fn, carried)
        frozen = [self.params[name] for name in body.bound.frozen if self.params[name].requires_grad]
        for param in frozen:  # they get no gradient, and must not be waited for
            param.requires_grad_(False)
        try:
            self.ddp = DistributedDataParallel(
                self.both,
                device_ids=[body.device.index] if body.device.type == "cuda" else None,
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

    def totals(self, parts: Sequence[Objective], device: torch.device) -> Callable[[], Totals]:
        """Add up with the gradients; by a message of their own if these are compressed."""
        carried, divide = self.both.carried, parts[0].divide
        if carried is None:
            wait = _sums(_numbers(parts), device)
            assert self.adding is not None
            self.adding.divisor = (lambda: wait()[1]) if divide else None  # before the cast: sums might overflow

            def finish_compressed() -> Totals:
                self._check_finished()
                return attrs.evolve(_totals(wait(), divide=divide), divisor=None)

            return finish_compressed
        carried.grad = None  # or they would be added to those of a step that failed
        self.both.numbers[:] = [_doubles(_numbers(parts), device).to(carried.dtype)]
        share = 1 / self.ranks.world_size  # torch's gradients, and these numbers with them, are means over ranks

        def finish() -> Totals:
            self._check_finished()
            assert carried.grad is not None
            return _totals(_unbound(carried.grad), divide=divide, share=share)

        return finish

    def _check_finished(self) -> None:
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


def _numbers(parts: Sequence[Objective]) -> list[Scalar]:
    return [total(parts, field) for field in ("total", "weight", "counts")]


def _totals(numbers: Sequence[Scalar], *, divide: bool, share: float = 1.0) -> Totals:
    """What sums over ranks come to; these, and the gradients, are `share` of them: 1 / ranks if they are means."""
    loss, weight, counts = numbers
    divisor = weight if divide else share
    return Totals(divided(loss, divisor), None if not divide and share == 1.0 else divisor, counts)


def _sums(numbers: Sequence[Scalar], device: torch.device) -> Callable[[], list[Scalar]]:
    """Begin to add up numbers over ranks, in float64; what is returned waits for the sums."""
    mine = _doubles(numbers, device)
    work: Any = dist.all_reduce(mine, async_op=True)

    def wait() -> list[Scalar]:
        work.wait()
        return _unbound(mine)

    return wait


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


def _unbound(numbers: Tensor) -> list[Scalar]:
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
