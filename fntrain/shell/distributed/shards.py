"""Shards: what ranks exchange that each hold a part of the state, by means of torch's fully_shard.

torch keeps each parameter as a DTensor, split by rows. The step works on this rank's rows, its parts, as on any
module's memory. The states that it returns have DTensors around the same memory, from which the shape of the whole and
the rows of this rank can be read, by a checkpoint for instance.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from fntrain.core import tree
from fntrain.core.lease import Home
from fntrain.core.state import TrainState
from fntrain.core.tree import PyTree, local, relocated, split_like
from fntrain.shell.distributed.connected import Connected
from fntrain.shell.distributed.replicas import HALF, Exchanging, ModelAndLoss
from fntrain.shell.steps.memory import Memory
from fntrain.steps.batch import Batch, map_batch
from fntrain.steps.body import Body
from fntrain.steps.exchange import Totals
from fntrain.steps.loss import Objective

# Optimizers that update each element without looking at others: a part gets the same update as in the whole tensor.
ELEMENTWISE = {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"}


class Shards(Exchanging):
    """The exchange of ranks that each hold a part; see `fntrain.steps.exchange.Exchange`."""

    def __init__(self, here: Connected, body: Body, options: dict[str, Any]) -> None:
        step, params, wrap = body.settings, body.slots.params, options["wrap"]
        blocks = [] if wrap is None else [name for name, module in step.model.named_modules() if wrap(name, module)]
        check(body, blocks)
        super().__init__(Connected(here.group, sharded=True))
        self.both = ModelAndLoss(step.model, step.loss_fn)
        for tensor in (*params.values(), *body.slots.buffers.values()):
            self.broadcast([tensor])  # one by one: all in one message would need the memory of the model once more
        for name in body.bound.frozen:
            params[name].requires_grad_(False)
        dtype = HALF.get(options["mixed_precision"])
        policy = partial(MixedPrecisionPolicy, dtype, None if dtype is None else torch.float32)
        if dtype is not None:
            step.model.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)
            step.model.register_forward_hook(_cast_outputs)
        mesh = init_device_mesh(body.device.type, (here.world_size,))
        shard = partial(fully_shard, mesh=mesh, reshard_after_forward=options["reshard_after_forward"])
        for name in reversed(blocks):  # torch wants inner ones first
            shard(step.model.get_submodule(name), mp_policy=policy())
        # The hooks above cast what the model is given; what the loss is given, targets too, keeps its precision.
        shard(self.both, mp_policy=policy(cast_forward_inputs=False))
        self.wrapped = [module for module in self.both.modules() if isinstance(module, FSDPModule)]
        for module in self.wrapped:
            module.set_force_sum_reduction_for_comms(True)  # sums, no means: the step divides them by the weights
            module.set_gradient_divide_factor(1.0)
        self.params: dict[str, Any] = dict(zip(params, step.model.parameters(), strict=True))
        parts = {name: param._local_tensor for name, param in self.params.items()}
        self.parts = {name: nn.Parameter(part, self.params[name].requires_grad) for name, part in parts.items()}
        self.begun = False  # whether a step has begun and not come to its last micro-batch

    def forward(self, model: nn.Module, batch: Batch, last: bool) -> Any:
        """Run model and loss; before the last micro-batch gradients stay whole on this rank, and are not added up."""
        del model
        if not self.begun:
            self.clear()
        self.begun = not last
        self.wrapped[0].set_requires_gradient_sync(last)  # for all modules inside too
        return self.both.restored(self.both(batch))

    def totals(self, parts: Sequence[Objective], device: torch.device) -> Callable[[], Totals]:
        """Add up by a message of their own; then give each part its rows of the gradient."""
        sums = super().totals(parts, device)

        def finish() -> Totals:
            for name, param in self.params.items():
                self.parts[name].grad = None if param.grad is None else param.grad._local_tensor
                param.grad = None
            return sums()

        return finish

    def norm(self, norm: float | Tensor) -> Tensor:
        """The norm of all parts together."""
        square = torch.as_tensor(norm, dtype=torch.float64).square()
        dist.all_reduce(square)
        return square.sqrt()

    def padded(self, micro_batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
        """Repeat the first, uncounted, until all ranks have as many: each forward gathers parts of all ranks."""
        mine = list(micro_batches)
        num_extra_forwards = self.ranks.max(len(mine)) - len(mine)
        return [(mine[0], False)] * num_extra_forwards + [(one, True) for one in mine]

    def clear(self) -> None:
        """Drop the gradients of a step that failed."""
        self.begun = False
        for param in self.params.values():
            param.grad = None

    def reset(self) -> None:
        """Forget a step that failed: gathered parameters, gradients of some micro-batches, what torch was about to do.

        Nothing is sent to the other ranks, because they may not have failed. What torch keeps is put back to what it
        is between steps; otherwise the next step would fail in torch's own checks, or wait for this one's gradients.
        https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/_fsdp_state.py
        """
        self.clear()
        root: Any = self.both
        state = root._get_fsdp_state()
        if not state._is_root:
            return  # the step failed before torch's part in it began
        states = state._state_ctx.all_states
        groups = [group for one in states for group in _groups(one)]
        if hasattr(root, "reset_iter_state"):  # torch >= 2.13
            root.reset_iter_state()
        else:
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            state._comm_ctx.post_forward_order.clear()
            for one in (*states, *groups):
                one._training_state = TrainingState.IDLE
            for group in groups:
                group._all_gather_result = None
                group._post_forward_indices.clear()
                group.reshard()
        for param in (param for group in groups for param in group.fsdp_params):
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model be called without the loss: the parameters that are in no block are gathered here."""
        root: Any = self.both
        root._get_fsdp_state()._lazy_init()  # or torch would take the first block that is called for the root
        root.unshard()
        try:
            yield
        except BaseException:
            self.reset()
            raise
        finally:
            for module in self.wrapped:
                module.reshard()


def _groups(state: Any) -> list[Any]:
    """The groups of parameters that torch gathers together; a module has at most one before torch 2.12."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [one for one in (state._fsdp_param_group,) if one is not None] if groups is None else list(groups)


def _cast_inputs(dtype: torch.dtype, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return map_batch(partial(_cast, dtype), (args, kwargs))  # type: ignore[no-any-return]


def _cast_outputs(_module: nn.Module, _args: Any, output: Any) -> Any:
    return map_batch(partial(_cast, torch.float32), output)


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check(body: Body, blocks: Sequence[str]) -> None:
    """Before anything changes, refuse what would take a part for the whole tensor, and what torch can't split."""
    step = body.settings
    for name, param in step.model.named_parameters():  # not those of the slots, which may be from before a split
        if local(param) is not param:
            raise ValueError(f"model: {name!r} is split over ranks already; build the model anew for another step")
    for name, param in body.slots.params.items():
        if not param.ndim or not param.is_contiguous():
            kind = "has no dimension" if not param.ndim else "is not contiguous"
            raise ValueError(f"model: {name!r} {kind}, so it can't be split by rows; change it, or use strategy='ddp'")
    inside: dict[int, tuple[str | None, str]] = {}
    for name, module in step.model.named_modules():
        block = max((one for one in blocks if not one or f"{name}.".startswith(f"{one}.")), key=len, default=None)
        for key, param in module.named_parameters(name, recurse=False):
            other, first = inside.setdefault(id(param), (block, key))
            if other != block:
                raise ValueError(
                    f"wrap: {first!r} and {key!r} are one tied parameter, gathered with different blocks ({other!r}, "
                    f"{block!r}); wrap neither of them, or a block that holds both"
                )
    cls = step.optimizer.cls
    if cls.__name__ not in ELEMENTWISE or not cls.__module__.startswith("torch.optim"):
        raise ValueError(
            f"optimizer: {cls.__name__} may look at whole tensors, and ranks hold parts under strategy='fsdp'; use one "
            f"of {', '.join(sorted(ELEMENTWISE))}, or strategy='ddp'"
        )
    if step.transform_grads is not None:
        raise ValueError("transform_grads: would get parts of the gradients under strategy='fsdp'; use strategy='ddp'")


class ShardedMemory(Memory):
    """The memory of a rank that holds parts; the states that share it have DTensors around the parts."""

    def __init__(self, body: Body, shards: Shards) -> None:
        self.shards = shards
        super().__init__(body)
        self.sharded = Home.of(dict(body.settings.model.named_parameters()))  # of the DTensors, kept alive from here
        self.sharded.binder = self.bound
        self.home.join(self.sharded)
        self._around: dict[str, tuple[Any, int, dict[str, Any]]] = {}  # field -> for which tensors, at which `moves`

    def shown(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the mappings that states hold: DTensors around the parts, kept because each takes 3 us."""
        return self._all_around("params", self.params), self.buffers, self._all_around("opt_state", self.opt_state)

    def _all_around(self, field: str, own: dict[str, Any]) -> dict[str, Any]:
        of, moves, known = self._around.get(field, (None, -1, {}))
        if of is not own or moves != self.moves:
            known = {name: self.around(name, value) for name, value in own.items()}
            self._around[field] = own, self.moves, known
        return known

    def own_part(self, name: str, value: PyTree) -> PyTree:
        """Return this rank's part of a parameter, or of what the optimizer keeps of it."""
        if name not in self.shards.params:
            return value  # a buffer, whole on every rank
        whole = self.shards.params[name]
        return tree.map_tensors(lambda tensor: local(split_like(whole, tensor)), value)

    def around(self, name: str, value: PyTree) -> PyTree:
        """The same with DTensors around the parts; what has another shape, a count say, is whole and stays as it is."""
        whole, shape = self.shards.params[name], self.shards.parts[name].shape
        return tree.map_tensors(lambda t: relocated(whole, t) if whole.ndim and t.shape == shape else t, value)

    @contextmanager
    def bound(self, state: TrainState) -> Iterator[None]:
        """For `ft.bound`: put a state's values into the module's memory, so that the module can be called; undo it."""
        slots = self.body.slots
        places = [(owner, key, owner[key]) for _, owner, key in slots.places]
        own = [*self.params.values(), *(buffer for _, _, buffer in places if buffer is not None)]
        values = tree.clone_tensors(own)
        with torch.no_grad():
            for name, tensor in self.params.items():
                if not self.home.leased(state.params, "params"):
                    tensor.copy_(self.own_part(name, state.params[name]))
            for name, tensor in slots.buffers.items():
                tensor.copy_(state.buffers[name])
        try:
            with self.shards.whole():
                yield
        finally:
            for owner, key, buffer in places:
                owner[key] = buffer  # a forward may have assigned another tensor
            with torch.no_grad():
                for tensor, value in zip(own, values, strict=True):
                    tensor.copy_(value)
