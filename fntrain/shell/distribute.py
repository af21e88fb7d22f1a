"""distribute: a step that several processes do together, on torch's DistributedDataParallel.

Each rank computes sums over its part of the global batch. Before the last backward one small collective adds up
weights and losses; gradients are divided by the total weight where torch would divide by the number of ranks. So k
ranks with m ragged micro-batches each give the gradient of the whole batch.
"""

from collections.abc import Mapping, Sequence
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
from fntrain.shell.cuda import CudaEngine, CudaStep
from fntrain.shell.in_place import InPlace, check_free, check_step, in_place
from fntrain.shell.ranks import ranks
from fntrain.step import LossFn, SupervisedStep

Strategy = Literal["ddp"]
Compress = Literal["bf16", "fp16"]
# Buffers are shared after the backward instead of before the forward, so that all ranks return the same state.
_FORWARD_SYNC = "forward_sync_buffers"  # what newer versions of torch call it
_NO_BROADCAST: dict[str, Any] = {
    _FORWARD_SYNC if _FORWARD_SYNC in signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def distribute(
    step_fn: SupervisedStep,
    strategy: Strategy = "ddp",
    *,
    sync_batchnorm: bool = False,
    compress: Compress | None = None,
    bucket_cap_mb: float | None = None,
    static_graph: bool = False,
    find_unused_parameters: bool = False,
) -> InPlace | CudaStep:
    """Make the form of a step that all processes of the process group do together, in place.

    The global batch is the unit: each rank gets its share of `ft.data.stream`, losses and gradients are those of the
    whole batch, whatever the number of ranks. A loss that returns a mean weighs its samples; one over something else
    (unmasked tokens) returns `ft.weighted(sum, weight)`. The model is given rank 0's values. Outside of a process
    group, and with one process, it is the step in place.

    Args:
      step_fn: from `ft.supervised_step`; not one that runs in place already.
      strategy: "ddp": every rank holds the whole state.
      sync_batchnorm: statistics over the global batch (on GPUs). Without, each rank normalises by its own share, and
        all keep the running statistics of rank 0.
      compress: add up gradients as bfloat16 or float16, half the bytes.
      bucket_cap_mb, static_graph, find_unused_parameters: of torch's DistributedDataParallel.
    Raises:
      ValueError: an unknown strategy or compression, or options that torch can't combine; another step runs in place
        on the model.
      TypeError: the step is none of `ft.supervised_step`.
    Example:
      >>> model = torch.nn.Linear(2, 1)
      >>> sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
      >>> step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), sgd)
      >>> distribute(step_fn)(ft.init_state(model, sgd), torch.ones(4, 2)).step
      1

    Source: Li et al. 2020, https://arxiv.org/abs/2006.15704
    """
    if strategy != "ddp":
        raise ValueError(f"strategy: got {strategy!r}, expected 'ddp'")
    if compress is not None and compress not in _HALF:
        raise ValueError(f"compress: got {compress!r}, expected 'bf16', 'fp16' or None")
    check_step(step_fn)
    if static_graph and step_fn.accumulate > 1:
        raise ValueError(f"static_graph: torch has it without micro-batches only, and accumulate={step_fn.accumulate}")
    device = next(step_fn.model.parameters()).device
    here = ranks()
    if sync_batchnorm and here.world_size > 1:
        step_fn = _with_sync_batchnorm(step_fn, device)
    if here.world_size > 1:
        check_free(step_fn)
        options: dict[str, Any] = {"static_graph": static_graph, "find_unused_parameters": find_unused_parameters}
        exchange = Replicas(here, step_fn, device, compress, options | {"bucket_cap_mb": bucket_cap_mb})
        step_fn = attrs.evolve(step_fn, rank=here.rank, exchange=exchange)
    eager = in_place(step_fn)
    return CudaStep(eager, CudaEngine(device), "never") if device.type == "cuda" else eager


def _with_sync_batchnorm(step_fn: SupervisedStep, device: torch.device) -> SupervisedStep:
    if device.type != "cuda":
        raise ValueError(f"sync_batchnorm: torch has it on GPUs only, the model is on {device.type}; leave it out")
    return attrs.evolve(step_fn, model=nn.SyncBatchNorm.convert_sync_batchnorm(step_fn.model))  # type: ignore[no-untyped-call]


class _ModelAndLoss(nn.Module):
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


class Replicas:
    """The exchange of ranks that each hold the whole state; see `fntrain.ranks.Exchange`."""

    def __init__(
        self,
        here: Ranks,
        step: SupervisedStep,
        device: torch.device,
        compress: Compress | None,
        options: dict[str, Any],
    ) -> None:
        self.ranks = here
        self.both = _ModelAndLoss(step.model, step.loss_fn)
        self.adding = _Adding(None if compress is None else _HALF[compress])
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

    def sums(self, numbers: Sequence[Scalar], device: torch.device) -> list[Tensor]:
        """Add up numbers over ranks, in float64."""
        with torch.no_grad():
            mine = torch.stack([torch.as_tensor(one, device=device).detach().double().reshape(()) for one in numbers])
        dist.all_reduce(mine)
        return list(mine.unbind())

    def divide(self, divisor: Tensor | None) -> None:
        """Remember what gradients are to be divided by."""
        self.adding.divisor = divisor

    def share(self, buffers: Sequence[Tensor]) -> None:
        """Broadcast the buffers of rank 0, together."""
        if buffers:
            group: Any = dist.group.WORLD
            dist._broadcast_coalesced(group, [one.detach() for one in buffers], 250 << 20, 0)  # type: ignore[attr-defined]


class _Adding:
    """How gradients add up; it does not know the module, which it would keep alive: torch's reducer holds it."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.divisor: Tensor | None = None

    def up(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Add up a bucket of gradients over ranks, divided; torch's own hook divides by the number of ranks here."""
        grads = bucket.buffer()
        if self.divisor is not None:
            grads.div_(self.divisor)
        small = grads if self.dtype is None else grads.to(self.dtype)
        future: Any = dist.all_reduce(small, async_op=True).get_future()
        if self.dtype is None:
            return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]
        return future.then(lambda done: grads.copy_(done.value()[0]))  # type: ignore[no-any-return]
