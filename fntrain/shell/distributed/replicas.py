"""What ranks exchange in a step, and how ranks do it that each hold the whole state: DistributedDataParallel.

`Exchanging` is what they have in common with ranks that hold parts (shards.py).
"""

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
# Buffers are broadcast after the backward instead of before the forward, so that all ranks return the same state.
_NEW, _OLD = "forward_sync_buffers", "broadcast_buffers"  # what newer and older versions of torch call the option
_NO_BROADCAST = {_NEW if _NEW in signature(DistributedDataParallel).parameters else _OLD: False}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ModelAndLoss(nn.Module):
    """Model and loss as one module, for DistributedDataParallel: `forward` returns tensors, `output` keeps the rest.

    With `carried`, the numbers of a step are added up over ranks as the gradient of that parameter, together with all
    other gradients, so they need no message of their own.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, carried: nn.Parameter | None = None) -> None:
        super().__init__()
        self.carried = carried
        self.numbers: list[Tensor] = []  # what `carried` gets as its gradient in the next backward; at most one
        self.model = model
        self.loss_fn = (loss_fn,)  # in a tuple, or a loss that is a module would be registered as a sub-module
        self.output: Any = None

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        output = self.loss_fn[0](self.model, batch)
        loss = output.loss_sum if isinstance(output, Weighted) else output
        terms: dict[str, Any] = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        self.output = output, [*terms]
        # A loss without any such term is refused by the step, with an error that says why.
        name = next((name for name, term in terms.items() if isinstance(term, Tensor) and term.requires_grad), None)
        if self.carried is not None and name is not None:
            terms[name] = _Carry.apply(terms[name], self.carried, self.numbers)  # type: ignore[no-untyped-call]
        return tuple(terms.values())

    def restored(self, tensors: tuple[Tensor, ...]) -> Any:
        """What the loss function returned, with the tensors that `forward` returned in it."""
        (output, names), self.output = self.output, None
        loss: Any = tensors[0] if names == [""] else dict(zip(names, tensors, strict=True))
        return attrs.evolve(output, loss_sum=loss) if isinstance(output, Weighted) else loss


class _Carry(torch.autograd.Function):
    """Passes a loss through; in the backward, gives `carried` the numbers in the list at that time as its gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, carried: Tensor, numbers: list[Tensor]) -> Tensor:
        del carried
        ctx.numbers = numbers
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], (ctx.numbers[0] if ctx.numbers else None), None


class Exchanging:
    """What replicas and shards have in common; see `fntrain.steps.exchange.Exchange`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def sums(self, numbers: Mapping[str, Scalar], device: torch.device) -> Mapping[str, Scalar]:
        """Add up numbers over ranks, in float64."""
        return dict(zip(numbers, _sums(list(numbers.values()), device)(), strict=True))

    def padded(self, micro_batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
        """Give all as they are: ranks may run different numbers, only the last forward of a step needs the others."""
        return ((one, True) for one in micro_batches)

    def totals(self, parts: Sequence[Objective], device: torch.device) -> Callable[[], Totals]:
        """Add up by a message of their own."""
        wait, divide = _sums(_numbers(parts), device), parts[0].divide
        return lambda: _totals(wait(), divide=divide)

    def norm(self, norm: Scalar) -> Scalar:
        """Return the norm as it is: every rank has the whole gradients."""
        return norm

    def broadcast_buffers(self, slots: Slots) -> None:
        """Broadcast the buffers of rank 0."""
        self.broadcast(list(slots.buffers.values()))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors of rank 0 in one message, as bytes because their dtypes may differ."""
        if not tensors:
            return
        ordered = sorted((one.detach() for one in tensors), key=lambda one: -one.itemsize)  # keeps all views aligned
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
        self.begun = False  # whether a step has begun and not finished
        self.adding = None if compress is None else _Adding(HALF[compress])
        double = any(param.dtype in (torch.float64, torch.complex128) for param in self.params.values())
        # As precise as the gradients, float32 at least. Rounded to half precision, a sum of weights would be wrong.
        numbers = torch.zeros(3, dtype=torch.float64 if double else torch.float32, device=body.device)
        self.carried = nn.Parameter(numbers)
        carried = self.carried if self.adding is None else None
        self.both = ModelAndLoss(body.settings.model, body.settings.loss_fn, carried)
        frozen = [self.params[name] for name in body.bound.frozen if self.params[name].requires_grad]
        for param in frozen:  # DistributedDataParallel would wait for their gradients, which never come
            param.requires_grad_(False)
        options = {"gradient_as_bucket_view": True, **_NO_BROADCAST, **options}
        if body.device.type == "cuda":
            options["device_ids"] = [body.device.index]
        try:
            self.ddp = DistributedDataParallel(self.both, **options)
        finally:
            for param in frozen:
                param.requires_grad_(True)
        if self.adding is not None:
            self.ddp.register_comm_hook(self.adding, _Adding.up)

    def forward(self, model: nn.Module, batch: Batch, last: bool) -> Any:
        """Run model and loss; gradients are added up over ranks in the last micro-batch alone (torch's `no_sync`)."""
        del model
        self.begun = True
        self.ddp.require_backward_grad_sync = last
        return self.both.restored(self.ddp(batch))

    def totals(self, parts: Sequence[Objective], device: torch.device) -> Callable[[], Totals]:
        """Add up together with the gradients; by a message of their own if gradients are compressed."""
        numbers, divide, share = _numbers(parts), parts[0].divide, 1.0
        if self.adding is not None:
            sums = _sums(numbers, device)
            self.adding.divisor = (lambda: sums()[1]) if divide else None
        else:
            sums = self._carried_sums
            share = 1 / self.ranks.world_size  # torch's gradients, and these numbers with them, are means over ranks
            self.carried.grad = None  # or the numbers would be added to those of a step that failed
            self.both.numbers[:] = [_doubles(numbers, device).to(self.carried.dtype)]

        def finish() -> Totals:
            self._check_finished()
            totals = _totals(sums(), divide=divide, share=share)
            return totals if self.adding is None else attrs.evolve(totals, divisor=None)  # divided by `_Adding`

        return finish

    def _carried_sums(self) -> list[Scalar]:
        assert self.carried.grad is not None
        return _unbound(self.carried.grad)

    def _check_finished(self) -> None:
        """Raise if torch still waits for gradients, naming their parameters: what it has added up so far is not all."""
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
        """Forget a step that failed: torch would wait in the next one for the rest of its gradients."""
        if self.begun:
            self.ddp.reducer._reset_state()
            self.begun = False


def _numbers(parts: Sequence[Objective]) -> list[Scalar]:
    return [total(parts, field) for field in ("total", "weight", "counts")]


def _totals(numbers: Sequence[Scalar], *, divide: bool, share: float = 1.0) -> Totals:
    """Totals of numbers summed over ranks; `share` is 1 / ranks if they, and the gradients, are means over ranks."""
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


def _doubles(numbers: Sequence[Scalar], device: torch.device) -> Tensor:
    """Numbers in float64 on a device. The host does not wait for a GPU: its own numbers are filled in, not copied."""
    if device.type == "cpu":
        return torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
    return torch.stack(
        [n.detach().to(**kind).reshape(()) if isinstance(n, Tensor) else torch.full((), n, **kind) for n in numbers]
    )


def _unbound(numbers: Tensor) -> list[Scalar]:
    """Numbers one by one in float64: copies, because the next step writes over the bucket of gradients they lie in."""
    if numbers.device.type == "cpu":
        return numbers.tolist()
    return list(numbers.to(torch.float64, copy=True).unbind())


class _Adding:
    """Adds up gradients in half precision. It has no reference to the module: torch's reducer would keep that alive."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.divisor: Callable[[], Scalar] | None = None

    def up(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Divide a bucket of gradients, then add it up over ranks; torch's own hooks divide by the number of ranks."""
        grads = bucket.buffer()
        if self.divisor is not None:  # before the cast: in half precision undivided sums might overflow
            grads.div_(self.divisor())
        future: Any = dist.all_reduce(grads.to(self.dtype), async_op=True).get_future()
        return future.then(lambda done: grads.copy_(done.value()[0]))  # type: ignore[no-any-return]
