"""Shards: the exchange of ranks that each hold a part of the state, on torch's fully_shard.

torch keeps each parameter as a DTensor, split by rows. The step works on the parts alone, as on any module's memory;
the state that it hands out has DTensors around the same memory, so that whoever keeps or saves it knows what it is of.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from fntrain.core import tree
from fntrain.core.lease import FIELDS, Home, Leased
from fntrain.core.state import TrainState
from fntrain.core.tree import PyTree, local, relocated, split_like
from fntrain.shell.distributed.connected import Connected
from fntrain.shell.distributed.replicas import Exchanging, ModelAndLoss
from fntrain.shell.steps.in_place import InPlace
from fntrain.steps.batch import Batch, map_batch
from fntrain.steps.supervised import SupervisedStep

Wrap = Callable[[str, nn.Module], bool]
# Their updates look at each element alone, so a part is updated as in the whole.
ELEMENTWISE = frozenset(
    ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"]
)


class Shards(Exchanging):
    """The exchange of ranks that each hold a part; see `fntrain.steps.exchange.Exchange`."""

    def __init__(
        self,
        here: Connected,
        step: SupervisedStep,
        device: torch.device,
        wrap: Wrap | None,
        mixed_precision: torch.dtype | None,
        reshard_after_forward: bool,
    ) -> None:
        blocks = [] if wrap is None else [name for name, module in step.model.named_modules() if wrap(name, module)]
        check(step, blocks)
        super().__init__(Connected(here.group, sharded=True))
        self.both = ModelAndLoss(step.model, step.loss_fn)
        for tensor in (*step.slots.params.values(), *step.slots.buffers.values()):
            self.share([tensor])  # one by one: together they are the whole model once more
        for name in step.bound.frozen:
            step.slots.params[name].requires_grad_(False)
        mesh = init_device_mesh(device.type, (here.world_size,))
        policy, outer = MixedPrecisionPolicy(), MixedPrecisionPolicy()
        if mixed_precision is not None:
            policy = MixedPrecisionPolicy(mixed_precision, torch.float32)
            # What the model is given is cast, not what the loss is: targets and sums keep their precision.
            outer = MixedPrecisionPolicy(mixed_precision, torch.float32, cast_forward_inputs=False)
            step.model.register_forward_pre_hook(partial(_cast_inputs, mixed_precision), with_kwargs=True)
            step.model.register_forward_hook(_cast_outputs)
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
        for name in reversed(blocks):  # inner ones first
            fully_shard(step.model.get_submodule(name), mp_policy=policy, **options)
        fully_shard(self.both, mp_policy=outer, **options)
        self.wrapped = [module for module in self.both.modules() if isinstance(module, FSDPModule)]
        for module in self.wrapped:
            module.set_force_sum_reduction_for_comms(True)  # added up; the step divides its part by the weight
            module.set_gradient_divide_factor(1.0)
        self.params: dict[str, Any] = dict(zip(step.slots.params, step.model.parameters(), strict=True))
        self.parts = {
            name: nn.Parameter(param._local_tensor, requires_grad=param.requires_grad)
            for name, param in self.params.items()
        }
        self.begun = False

    def registered(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The module has DTensors."""
        del params
        return self.params

    def forward(self, model: nn.Module, batch: Batch, last: bool) -> Any:
        """Run model and loss; in all but the last micro-batch gradients stay here, unsharded."""
        del model
        if not self.begun:
            self.clear()
        self.begun = not last
        self.wrapped[0].set_requires_gradient_sync(last)  # of all, recursively
        return self.both.restored(self.both(batch))

    def finish(self) -> None:
        """Hand the parts' gradients to the parts."""
        for name, param in self.params.items():
            self.parts[name].grad = None if param.grad is None else param.grad._local_tensor
            param.grad = None

    def norm(self, norm: float | Tensor) -> Tensor:
        """The norm of all parts together."""
        square = torch.as_tensor(norm, dtype=torch.float64).square()
        dist.all_reduce(square)
        return square.sqrt()

    def missing(self, number: int) -> int:
        """How many micro-batches this rank has fewer than another: each of their forwards gathers parts of all."""
        return self.ranks.max(number) - number

    def clear(self) -> None:
        """Drop gradients that were left."""
        self.begun = False
        for param in self.params.values():
            param.grad = None

    def reset(self) -> None:
        """Forget a step that failed: gathered parameters, gradients of some micro-batches, what torch was about to do.

        Without a word to the other ranks, which may not have failed.
        """
        self.clear()
        root: Any = self.both
        state = root._get_fsdp_state()
        if not state._is_root:
            return  # it failed before torch had begun
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
        """Let the model be called by itself: what no block of its own gathers is gathered here."""
        self.both._get_fsdp_state()._lazy_init()  # type: ignore[operator]  # or the first block called would take itself for the root
        self.both.unshard()  # type: ignore[operator]
        try:
            yield
        except BaseException:
            self.reset()
            raise
        finally:
            for module in self.wrapped:
                module.reshard()


def _groups(state: Any) -> list[Any]:
    """Parameters that torch gathers together; one group of a module before torch 2.12."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _cast_inputs(dtype: torch.dtype, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return map_batch(partial(_cast, dtype), args), map_batch(partial(_cast, dtype), kwargs)


def _cast_outputs(_module: nn.Module, _args: Any, output: Any) -> Any:
    return map_batch(partial(_cast, torch.float32), output)


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check(step: SupervisedStep, blocks: Sequence[str]) -> None:
    """Refuse what would look at a part as if it were the whole, and what torch can't split, before anything changes."""
    for name, param in step.model.named_parameters():  # now: the step may be from before they were split
        if local(param) is not param:
            raise ValueError(f"model: {name!r} is split over ranks already; build the model anew for another step")
    for name, param in step.slots.params.items():
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


class ShardedStep(InPlace):
    """A step in place on this rank's parts; its states have DTensors around them."""

    def __init__(self, step: SupervisedStep, exchange: Shards) -> None:
        self.exchange = exchange
        bound = step.bound
        step = attrs.evolve(step, rank=exchange.ranks.rank, exchange=exchange)
        # The module's parameters are DTensors now; the step's own are the memory that these are made around.
        object.__setattr__(step, "slots", attrs.evolve(step.slots, params=exchange.parts))
        object.__setattr__(step, "bound", bound)  # groups were chosen by whole tensors
        super().__init__(step)
        self.sharded = Home.of(dict(step.model.named_parameters()))  # what the module itself shows
        self.sharded.binder = self.bound
        self.home.join(self.sharded)
        self.shown: tuple[Any, dict[str, Any]] = (None, {})  # the optimizer's state, and in DTensors
        self.shown_params: tuple[int, dict[str, Any]] = (-1, {})  # the same of the parameters, for so many moves

    def own(self, state: TrainState) -> TrainState:
        """Copy in what of a state is not this memory already, of whole tensors this rank's part."""
        changes: dict[str, Any] = {}
        for field in FIELDS:
            theirs: Any = getattr(state, field)
            if not self.home.leased(theirs, field):
                changes[field] = {name: self.part(name, value) for name, value in theirs.items()}
            elif field != "buffers":
                mine = self.params if field == "params" else self.opt_state
                if field == "opt_state" and theirs.tensors is not self.shown[1]:
                    mine = {name: self.part(name, value) for name, value in theirs.items()}
                changes[field] = Leased(mine, self.home, field, state.step)
        return super().own(state.replace(**changes))

    def part(self, name: str, value: PyTree) -> PyTree:
        """Return the part of this rank, of a parameter or of what the optimizer keeps of it."""
        if name not in self.exchange.params:
            return value  # a buffer
        whole = self.exchange.params[name]

        return tree.map_tensors(lambda tensor: local(split_like(whole, tensor)), value)

    def advanced(self, state: TrainState, changes: dict[str, Any]) -> TrainState:
        """The next state: this memory, on lease, in DTensors."""
        if self.shown[0] is not self.opt_state:
            self.shown = self.opt_state, {name: self.around(name, value) for name, value in self.opt_state.items()}
        if self.shown_params[0] != self.moves:  # made once: each takes 3 us
            self.shown_params = self.moves, {name: self.around(name, part) for name, part in self.params.items()}
        new = super().advanced(state, changes)
        step = state.step + 1
        return new.replace(
            params=Leased(self.shown_params[1], self.home, "params", step),
            opt_state=Leased(self.shown[1], self.home, "opt_state", step),
        )

    def around(self, name: str, value: PyTree) -> PyTree:
        """DTensors around parts."""
        whole = self.exchange.params[name]
        shape = self.exchange.parts[name].shape
        return tree.map_tensors(lambda t: relocated(whole, t) if whole.ndim and t.shape == shape else t, value)

    @contextmanager
    def bound(self, state: TrainState) -> Iterator[None]:
        """The module with a state's values in its memory, callable by itself, for `ft.bound`."""
        slots = self.step.slots
        own: dict[str, Any] = {**self.params, **{f"buffers.{name}": one for name, one in slots.buffers.items()}}
        kept = tree.clone(
            {**own, **{f"scratch.{n}": o[k] for n, (_, o, k) in enumerate(slots.places) if o[k] is not None}}
        )
        with torch.no_grad():
            for name, tensor in self.params.items():
                if not self.home.leased(state.params, "params"):
                    tensor.copy_(self.part(name, state.params[name]))
            for name, tensor in slots.buffers.items():
                tensor.copy_(state.buffers[name])
        try:
            with self.exchange.whole():
                yield
        finally:
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(kept[name])
                for number, (_, owner, key) in enumerate(slots.places):
                    buffer = owner[key]
                    if buffer is not None:
                        buffer.copy_(kept[f"scratch.{number}"])
