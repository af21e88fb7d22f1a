"""Where a state meets a module: the tensors of a state are lent to the module's own slots and taken out again."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import attrs
import torch
from torch import Tensor, nn

from fntrain.core import tree
from fntrain.core.lease import Home, Leased
from fntrain.core.state import TrainState
from fntrain.core.tree import PyTree
from fntrain.steps.optim import Optimizer


def init_state(
    model: nn.Module, optimizer: Optimizer, *, seed: int = 0, extra: Mapping[str, PyTree] | None = None
) -> TrainState:
    """Make the state before the first step from a module and an optimizer.

    Copies nothing: the state shares memory with the module. The pure step never writes there, the module keeps these
    first values while training goes on. A step run in place does, and so does `load_into`: the state is consumed then
    and raises StateConsumedError; `ft.snapshot(state)` keeps a copy.

    Args:
      model: a module with parameters; tied ones are listed once, under their first name.
      optimizer: what `ft.optimizer` returned; its options are checked against the model here.
      seed: what every random draw of the run derives from.
      extra: your own pytree, saved with the rest.
    Raises:
      ValueError: the model has no parameters, or a group of the optimizer selects none of them.
      TypeError: `extra` holds something that can't be saved.
    Example:
      >>> import fntrain as ft
      >>> ft.init_state(nn.Linear(4, 2), ft.optimizer(torch.optim.SGD, lr=0.1))
      TrainState(step=0, position=0, seed=0)
        params    2 tensors, 10 numbers, 40 bytes
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {seed!r}, expected a whole number")
    list(tree.named_leaves(extra or {}, "extra"))  # what can't be saved is refused here, not at the first checkpoint
    slots = Slots.of(model)
    params = {name: param.detach() for name, param in slots.params.items()}
    buffers = {name: buffer.detach() for name, buffer in slots.buffers.items()}
    home = Home.of(slots.params)
    return TrainState(
        step=0,
        position=0,
        seed=seed,
        params=Leased(params, home, "params", step=0),
        buffers=Leased(buffers, home, "buffers", step=0),
        opt_state=optimizer.init(params),
        extra=extra or {},
    )


@contextmanager
def bound(model: nn.Module, state: TrainState) -> Iterator[nn.Module]:
    """Give the module with a state's tensors in its slots, and take them out again.

    In pure mode the module itself keeps its first weights, so code that evaluates must bind the state it is given.
    Copies are lent, so a forward that writes to buffers or weights cannot write to the state. Not for two threads on
    one module.

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
    binder = Home.of(slots.params).binder
    if binder is not None:
        with binder(state):
            yield model
        return
    if split := next((name for name, one in state.params.items() if tree.local(one) is not one), None):
        raise ValueError(
            f"state.params[{split!r}]: is split over ranks, and this module is not; give the model of the step that "
            "ft.shell.distribute made"
        )
    lease = slots.lend(*tree.clone((state.params, state.buffers)))
    try:
        yield model
    finally:
        slots.take_back(lease)


def load_into(model: nn.Module, state: TrainState) -> None:
    """Write a state's parameters and buffers into the module for good, by copy.

    Other states that share the module's memory (see `init_state`) are consumed. A state that a step run in place has
    made is the module's memory: nothing to copy.

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
    copy_in(slots, state, "ft.load_into")


def copy_in(slots: "Slots", state: TrainState, reason: str) -> None:
    """Copy parameters and buffers of a state from elsewhere into the module, ending the lease of what was there."""
    home = Home.of(slots.params)
    for field, own in (("params", slots.params), ("buffers", slots.buffers)):
        theirs = getattr(state, field)
        foreign = {name: theirs[name] for name in own if not same_memory(theirs[name], own[name])}
        if home.leased(theirs, field) and not foreign:
            continue  # by address: a lease does not tell whether the module has been moved since (`.to`)
        if storages(own) & storages(foreign):
            foreign = tree.clone(foreign)  # parts of the module under other names: copying would overwrite some
        written = None if field == "buffers" and foreign else [slots.params[name] for name in foreign]
        home.end(reason, field, written=written)
        with torch.no_grad():
            for name, tensor in foreign.items():
                tree.local(own[name]).copy_(tree.local(tree.split_like(own[name], tensor)))


class Place(NamedTuple):
    """Where a module keeps a buffer: `owner[key]`.

    A step notes the tensor that lies there before its forward (`before`) and the memory of that tensor (`memory`).
    """

    name: str | None  # of the buffer in a state; None: scratch memory of the module, no part of a state
    owner: dict[str, Tensor | None]
    key: str

    def assigned(self, before: Tensor | None, memory: Tensor | None) -> Tensor | None:
        """Return what the forward put in the place of the tensor from before, None if that one is still there.

        Raises:
          ValueError: the buffer is a tensor only before or only after the forward.
        """
        after = self.owner[self.key]
        if after is None and before is None:
            return None
        if after is None or before is None or memory is None:
            was, now = ["None" if one is None else "a tensor" for one in (before, after)]
            raise ValueError(
                f"model: buffer {self.name!r} went from {was} to {now} in a step; register it as a tensor from the "
                "start, or with persistent=False if it is scratch memory"
            )
        return after.detach() if after is not before or after.data_ptr() != memory.data_ptr() else None

    def put_back(self, before: Tensor | None, memory: Tensor | None) -> None:
        """Put the tensor from before into its place, in its own memory; the values there stay as they are."""
        self.owner[self.key] = before
        if before is not None and memory is not None:
            before.data = memory


@attrs.frozen(eq=False)
class Slots:
    """Where a module keeps its parameters and buffers, found once.

    Lending writes `param.data`, 0.15 us a tensor: parameter objects stay who they are, so tied weights, shared
    sub-modules, LSTM weight lists and closures over parameters all see the lent tensor. Non-persistent buffers are
    the module's scratch memory, as for torch's state_dict: copies are lent and thrown away.
    """

    params: dict[str, nn.Parameter]
    buffer_names: frozenset[str]
    places: tuple[Place, ...]  # of the buffers

    @classmethod
    def of(cls, model: nn.Module) -> "Slots":
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        params = {_plain(name): param for name, param in model.named_parameters()}
        if not params:
            raise ValueError(f"model: {type(model).__name__} has no parameters, expected at least one")
        first_name: dict[int, str] = {}
        places: list[Place] = []
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                name = _plain(f"{prefix}.{key}" if prefix else key)
                if buffer is not None:
                    name = first_name.setdefault(id(buffer), name)
                scratch = key in module._non_persistent_buffers_set
                places.append(Place(None if scratch else name, module._buffers, key))
        buffer_names = frozenset(name for name, owner, key in places if name and owner[key] is not None)
        return cls(params, buffer_names, tuple(places))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers as they are now, by name; one in several places once."""
        found: dict[str, Tensor] = {}
        for name, owner, key in self.places:
            buffer = owner[key]
            if name is not None and buffer is not None:
                found.setdefault(name, buffer)
        return found

    def check(self, state: TrainState) -> None:
        """Raise ValueError unless the state has exactly the module's names, shapes and dtypes."""
        _check_like("params", self.params, state.params)
        _check_like("buffers", self.buffers, state.buffers)

    def check_memory(self) -> None:
        """Refuse sparse tensors, and a parameter that shares memory with another tensor: a state would hold two."""
        for name, tensor in {**self.params, **self.buffers}.items():
            if tensor.layout is not torch.strided:
                raise TypeError(
                    f"model: {name!r} is sparse, which a state can't hold; register a buffer with persistent=False, or "
                    "make it dense with .to_dense()"
                )
        spans = [
            (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), kind, name)
            for kind, tensors in (("parameter", self.params), ("buffer", self.buffers))
            for name, tensor in tensors.items()
            if tensor.data_ptr() and is_dense(tensor)
        ]
        for (_, end, *one), (start, _, *other) in pairwise(sorted(spans)):
            if start < end and "parameter" in (one[0], other[0]):
                raise ValueError(
                    f"model: {one[0]} {one[1]!r} and {other[0]} {other[1]!r} share memory, and would be trained apart; "
                    "tie parameters by assigning the same nn.Parameter to both, or give one a .clone()"
                )

    def lend(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], frozen: Iterable[str] = ()) -> "Lent":
        """Put tensors into the slots, gradients set to None, `frozen` ones asking for none; `take_back` undoes it."""
        torch.clear_autocast_cache()  # a caller's autocast would go on with casts of what the slots held before
        lease = Lent([(param, param.data, param.grad) for param in self.params.values()], [], [])
        try:
            for name, param in self.params.items():
                param.data = params[name]
                param.grad = None
            for name in frozen:
                if self.params[name].requires_grad:
                    lease.frozen.append(self.params[name])
                    self.params[name].requires_grad_(False)
            for place in self.places:
                buffer = place.owner[place.key]
                lease.buffers.append((place, buffer, None if buffer is None else buffer.data))
                if buffer is not None:
                    buffer.data = buffer.data.clone() if place.name is None else buffers[place.name]
        except BaseException:
            self.take_back(lease)
            raise
        return lease

    def take_back(self, lease: "Lent") -> None:
        """Put the module's own tensors back into its slots."""
        torch.clear_autocast_cache()
        for param, data, grad in lease.params:
            param.data = data
            param.grad = grad
        for param in lease.frozen:
            param.requires_grad_(True)
        for place, buffer, memory in reversed(lease.buffers):  # a buffer in two places ends with what it held first
            place.put_back(buffer, memory)

    def written(
        self, lease: "Lent", params: dict[str, Tensor], buffers: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what the slots hold after a step: the lent tensors, or what was assigned in their place."""
        for name, param in self.params.items():
            if param.data_ptr() != params[name].data_ptr():
                params[name] = param.detach().clone()
        lent = dict(buffers)  # of a buffer in two places, assigned in one, the other place must not undo that
        for place, before, _ in lease.buffers:
            if place.name is not None and (after := place.assigned(before, lent.get(place.name))) is not None:
                buffers[place.name] = after.clone()
        return params, buffers


@attrs.frozen(eq=False)
class Lent:
    """What a module held before its slots were lent."""

    params: list[tuple[nn.Parameter, Tensor, Tensor | None]]
    frozen: list[nn.Parameter]
    buffers: list[tuple[Place, Tensor | None, Tensor | None]]  # with the tensor that lay there and its memory


def _plain(name: str) -> str:
    """The name without the prefix of torch.compile, so that checkpoints load into plain modules too."""
    return name.replace("_orig_mod.", "")


def storages(tensors: PyTree) -> set[int]:
    """Return the addresses of the memory in which the tensors of a tree lie."""
    return {tree.local(tensor).untyped_storage().data_ptr() for tensor in tree.tensors(tensors)}


def same_memory(a: Tensor, b: Tensor) -> bool:
    a, b = tree.local(a), tree.local(b)
    return a.data_ptr() == b.data_ptr() and a.device == b.device and a.shape == b.shape and a.stride() == b.stride()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory, each at a place of its own; kernels that run over it assume so."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


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
