"""distribute: a step that several processes do together, on torch's DistributedDataParallel or fully_shard.

Each rank computes sums over its part of the global batch. The weights of these sums are added up over ranks together
with the gradients, as the gradient of one more parameter; then gradients are divided by the total weight. So k ranks
with m micro-batches of any sizes give the gradient of the whole batch.
"""

from collections.abc import Callable
from typing import Any, Literal

import attrs
from torch import nn

from fntrain.core.check import one_of
from fntrain.shell.distributed.connected import ranks
from fntrain.shell.distributed.replicas import Compress, Replicas
from fntrain.shell.steps.device import CudaEngine
from fntrain.shell.steps.graphs import Graphs
from fntrain.shell.steps.in_place import Donated, Execution, check_step, in_place, run
from fntrain.shell.steps.memory import Memory, check_free
from fntrain.steps.supervised import SupervisedStep

Wrap = Callable[[str, nn.Module], bool]
Strategy = Literal["ddp", "fsdp"]


def distribute(
    step_fn: SupervisedStep,
    strategy: Strategy = "ddp",
    *,
    sync_batchnorm: bool = False,
    compress: Compress | None = None,
    bucket_cap_mb: float | None = None,
    static_graph: bool = False,
    find_unused_parameters: bool = False,
    wrap: Wrap | None = None,
    mixed_precision: Compress | None = None,
    reshard_after_forward: bool = True,
) -> Donated:
    """Make the form of a step that all processes of the process group do together, in place.

    The global batch is the unit: each rank gets its share of `ft.data.stream`, losses and gradients are those of the
    whole batch, whatever the number of ranks. A loss that returns a mean weighs its samples; one over something else
    (unmasked tokens) returns `ft.weighted(sum, weight)`. The model is given rank 0's values. Outside of a process
    group, and with one process, it is the step in place.

    Args:
      step_fn: from `ft.supervised_step`; not one that runs in place already.
      strategy: "ddp": every rank holds the whole state. "fsdp": each holds a part of every parameter and of what the
        optimizer keeps of it (rows), and gathers a block's parameters while it computes; `state.params` has DTensors,
        and a state of whole tensors is cut. The model is changed for good. All ranks must call what runs it
        (evaluations, code inside `ft.bound`) and `ft.save`, and use the same parameters in a step.
      sync_batchnorm: statistics over the global batch (on GPUs). Without, each rank normalises by its own share, and
        all keep the running statistics of rank 0.
      compress: "ddp": add up gradients as bfloat16 or float16, half the bytes.
      bucket_cap_mb, static_graph, find_unused_parameters: "ddp": of torch's DistributedDataParallel.
      wrap: "fsdp": (name, module) -> whether it is a block that is gathered by itself, such as a transformer's layer;
        what is in no block is gathered for the whole step. A block is called as a whole, not what is in it.
      mixed_precision: "fsdp": gather and compute the model in this dtype, the loss and the sum of gradients in float32.
      reshard_after_forward: "fsdp": drop gathered parameters between forward and backward; False keeps them.
    Raises:
      ValueError: an unknown strategy, or an option that it does not have; static_graph with micro-batches; another
        step runs in place on the model; "fsdp" with an optimizer that is not elementwise, with transform_grads, with a
        parameter of no dimension or not contiguous, with one tied across blocks, or on a model that is split already.
      TypeError: the step is none of `ft.supervised_step`.
    Example:
      >>> model = torch.nn.Linear(2, 1)
      >>> sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
      >>> step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), sgd)
      >>> distribute(step_fn)(ft.init_state(model, sgd), torch.ones(4, 2)).step
      1

    Source: Li et al. 2020, https://arxiv.org/abs/2006.15704; Zhao et al. 2023, https://arxiv.org/abs/2304.11277
    """
    ddp: dict[str, Any] = {"static_graph": static_graph, "find_unused_parameters": find_unused_parameters}
    ddp["bucket_cap_mb"] = bucket_cap_mb
    fsdp = {"wrap": wrap, "mixed_precision": mixed_precision, "reshard_after_forward": reshard_after_forward}
    _check_options(strategy, {**ddp, "compress": compress}, fsdp)
    check_step(step_fn)
    if static_graph and step_fn.accumulate > 1:
        raise ValueError(f"static_graph: torch has it without micro-batches only, and accumulate={step_fn.accumulate}")
    here: Any = ranks()
    if here.world_size == 1:
        return in_place(step_fn) if step_fn.body.device.type == "cpu" else _on_device(Memory(step_fn.body), step_fn)
    if sync_batchnorm:
        step_fn = _with_sync_batchnorm(step_fn)
    check_free(step_fn.body)
    if strategy == "fsdp":
        from fntrain.shell.distributed.shards import ShardedMemory, Shards  # imports much of torch

        shards = Shards(here, step_fn.body, fsdp)
        # The module's parameters are DTensors from here on; the step works on the local tensors inside them. The
        # optimizer is kept: it chose its groups by the shapes of the whole tensors.
        slots = attrs.evolve(step_fn.body.slots, params=shards.parts)
        body = attrs.evolve(step_fn.body, slots=slots, exchange=shards, registered=shards.params)
        return _on_device(ShardedMemory(body, shards), step_fn)
    replicas = Replicas(here, step_fn.body, compress, ddp)
    return _on_device(Memory(attrs.evolve(step_fn.body, exchange=replicas)), step_fn)


def _on_device(memory: Memory, step_fn: SupervisedStep) -> Donated:
    """The step that runs eagerly on this memory; where that is on a GPU, batches are copied there first."""
    device = memory.body.device
    execution: Execution = Graphs(CudaEngine(device), "never") if device.type == "cuda" else run
    return Donated(memory, execution, step_fn)


def _check_options(strategy: str, ddp: dict[str, Any], fsdp: dict[str, Any]) -> None:
    one_of("strategy", strategy, ("ddp", "fsdp"))
    for name in ("compress", "mixed_precision"):
        one_of(name, {**ddp, **fsdp}[name], ("bf16", "fp16", None))
    usual = {"reshard_after_forward": True}
    for name, value in (fsdp if strategy == "ddp" else ddp).items():
        if bool(value) != usual.get(name, False):
            raise ValueError(f"{name}: is not an option of strategy={strategy!r}; leave it out")


def _with_sync_batchnorm(step_fn: SupervisedStep) -> SupervisedStep:
    device = step_fn.body.device
    if device.type != "cuda":
        raise ValueError(f"sync_batchnorm: torch has it on GPUs only, the model is on {device.type}; leave it out")
    return attrs.evolve(step_fn, model=nn.SyncBatchNorm.convert_sync_batchnorm(step_fn.model))  # type: ignore[no-untyped-call]
