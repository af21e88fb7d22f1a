"""Where a state meets a module: the tensors of a state are lent to the module's own slots and taken out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from fntrain import tree
from fntrain.state import TrainState
from fntrain.tree import PyTree

if TYPE_CHECKING:
    from fntrain.optim import Optimizer


def init_state(
    model: nn.Module, optimizer: "Optimizer", *, seed: int = 0, extra: Mapping[str, PyTree] | None = None
) -> TrainState:
    """Make the state before the first step from a module and an optimizer.

    Copies nothing: the state shares memory with the module, so write to the module (`load_into`) only when the state
    is no longer needed. The pure step never writes to it; the module keeps these first values while training goes on.

    Args:
      model: a module with parameters; tied ones are listed once, under their first name.
      optimizer: what `ft.optimizer` returned; its options are checked against the model here.
      seed: what every random draw of the run derives from.
      extra: your own pytree, saved with the rest.
    Raises:
      ValueError: the model has no parameters, or a group of the optimizer selects none of them.
    Example:
      >>> import fntrain as ft
      >>> ft.init_state(nn.Linear(4, 2), ft.optimizer(torch.optim.SGD, lr=0.1))
      TrainState(step=0, position=0, seed=0)
        params    2 tensors, 10 numbers, 40 bytes
    """
    slots = Slots.of(model)
    params = {name: param.detach() for name, param in slots.params.items()}
    buffers = {name: buffer.detach() for name, buffer in slots.buffers.items()}
    return TrainState(
        step=0,
        position=0,
        seed=int(seed),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(params),
        extra=extra or {},
    )


@contextmanager
def bound(model: nn.Module, state: TrainState) -> Iterator[nn.Module]:
    """Give the module with a state's tensors in its slots, and take them out again.

    In pure mode the module itself keeps its first weights, so code that evaluates must bind the state it is given.
    Parameters are lent without a copy; buffers as copies, so a forward in training mode cannot write to the state.
    Not for two threads on one module.

    Raises:
      ValueError: names or shapes of the state are not the module's.
    Example:
      >>> model = nn.Linear(1, 1, bias=False)
      >>> state = TrainState(step=0, position=0, seed=0, params={"weight": torch.full((1, 1), 2.0)})
      >>> with bound(model, state) as m, torch.no_grad():
      ...     print(m(torch.ones(1, 1)).item())
      2.0
    """
    slots = Slots.of(model)
    slots.check(state)
    lease = slots.lend(state.params, tree.clone(state.buffers))
    try:
        yield model
    finally:
        slots.take_back(lease)


def load_into(model: nn.Module, state: TrainState) -> None:
    """Write a state's parameters and buffers into the module for good, by copy.

    Raises:
      ValueError: names or shapes of the state are not the module's.
    Example:
      >>> model = nn.Linear(1, 1, bias=False)
      >>> load_into(model, TrainState(step=0, position=0, seed=0, params={"weight": torch.full((1, 1), 2.0)}))
      >>> model.weight.item()
      2.0
    """
    slots = Slots.of(model)
    slots.check(state)
    with torch.no_grad():
        for name, param in slots.params.items():
            param.copy_(state.params[name])
        for name, buffer in slots.buffers.items():
            buffer.copy_(state.buffers[name])


@attrs.frozen(eq=False)
class Slots:
    """Where a module keeps its parameters and persistent buffers, found once.

    Lending writes `param.data`, 0.15 us a tensor: parameter objects stay who they are, so tied weights, shared
    sub-modules, LSTM weight lists and closures over parameters all see the lent tensor. Buffers that the forward
    assigns anew (`self.mean = ...`) are found in their slot afterwards. Non-persistent buffers are the module's own
    scratch memory, as for torch's state_dict: not lent, not saved.
    """

    params: dict[str, nn.Parameter]
    places: tuple[tuple[str, dict[str, Tensor | None], str], ...]  # (buffer name, its owner's _buffers, key there)

    @classmethod
    def of(cls, model: nn.Module) -> "Slots":
        params = dict(model.named_parameters())
        if not params:
            raise ValueError(f"model: {type(model).__name__} has no parameters, expected at least one")
        first_name: dict[int, str] = {}
        places = []
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    name = first_name.setdefault(id(buffer), f"{prefix}.{key}" if prefix else key)
                    places.append((name, module._buffers, key))
        return cls(params, tuple(places))

    @cached_property
    def buffer_names(self) -> frozenset[str]:
        """Names of the buffers; one in several places has its first place's."""
        return frozenset(name for name, _, _ in self.places)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The module's buffers as they are now, by name; a buffer in several places once."""
        found: dict[str, Tensor] = {}
        for name, owner, key in self.places:
            buffer = owner[key]
            if buffer is None:
                raise ValueError(f"model: buffer {name!r} has become None, expected a tensor")
            found.setdefault(name, buffer)
        return found

    def check(self, state: TrainState) -> None:
        """Raise ValueError unless the state has exactly the module's names, shapes and dtypes."""
        _check_like("params", self.params, state.params)
        _check_like("buffers", self.buffers, state.buffers)

    def lend(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> "Lease":
        """Put tensors into the slots, gradients set to None; returns what `take_back` needs."""
        lease = Lease([(p, p.data, p.grad) for p in self.params.values()], self.buffers, {})
        try:
            for name, param in self.params.items():
                param.data = params[name]
                param.grad = None
            for name, buffer in lease.buffers.items():
                lease.data[name] = buffer.data
                buffer.data = buffers[name]
        except BaseException:
            self.take_back(lease)
            raise
        return lease

    def take_back(self, lease: "Lease") -> None:
        """Put the module's own tensors back into its slots."""
        for param, data, grad in lease.params:
            param.data = data
            param.grad = grad
        for name, buffer in lease.buffers.items():
            if name in lease.data:
                buffer.data = lease.data[name]
        for name, owner, key in self.places:
            owner[key] = lease.buffers[name]

    def written_buffers(self, lease: "Lease", lent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the buffers after a forward: the lent tensors, or what the forward assigned in their place."""
        after = dict(lent)
        for name, owner, key in self.places:
            value = owner[key]
            if value is not None and value is not lease.buffers[name]:
                after[name] = value.detach().clone()
        return after


@attrs.frozen(eq=False)
class Lease:
    """What a module held before its slots were lent."""

    params: list[tuple[nn.Parameter, Tensor, Tensor | None]]
    buffers: dict[str, Tensor]
    data: dict[str, Tensor]


def _check_like(kind: str, here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    if missing := sorted(here.keys() - there.keys()):
        raise ValueError(f"state.{kind}: missing {missing}; the state is of another model")
    if unknown := sorted(there.keys() - here.keys()):
        raise ValueError(f"state.{kind}: the module has no {unknown}; the state is of another model")
    for name, tensor in here.items():
        if (tensor.shape, tensor.dtype) != (there[name].shape, there[name].dtype):
            raise ValueError(
                f"state.{kind}[{name!r}]: got {tuple(there[name].shape)} {there[name].dtype}, "
                f"the module has {tuple(tensor.shape)} {tensor.dtype}"
            )
