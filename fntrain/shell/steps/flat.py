"""What a traced step is a function of: flat tensors, and a key for everything else about a state and a batch."""

from array import array
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from types import MappingProxyType, NoneType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fntrain.core.containers import children
from fntrain.core.state import TrainState
from fntrain.steps.optim import BoundOptimizer, lr_scale
from fntrain.steps.supervised import SupervisedStep

Filler = Callable[[Iterator[Tensor]], Any]
_TRACED = {"foreach": False, "fused": None, "capturable": True}  # options of torch's optimizers, where they have them
_NO_RATE = 1e-30  # stands for a learning rate of 0: the capturable update of Adam and others divides by it


class Untraceable(Exception):  # noqa: N818  # caught here: a reason to stay eager
    """Why a step can't be one program; the message ends a sentence."""


class Unsettled(Exception):  # noqa: N818
    """The update creates state: this structure of the state occurs once."""


def flatten(value: Any, tensors: list[Tensor]) -> Hashable:
    """Append a tree's tensors; returns everything else about it: containers, layouts, numbers and strings."""
    kind = type(value)
    if kind is Tensor or isinstance(value, nn.Parameter):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if kind is dict or kind is MappingProxyType:
        return dict, tuple(value), tuple([flatten(item, tensors) for item in value.values()])
    if kind is tuple or kind is list:
        return kind, tuple([flatten(item, tensors) for item in value])
    if kind in (int, float, bool, str, NoneType):
        return kind, repr(value)
    if (found := children(value)) is not None:
        return kind, tuple(found.keys), tuple([flatten(item, tensors) for item in found.values])
    raise Untraceable(
        f"a {kind.__name__} in batch or state, where only dicts, lists, tuples, tensors, numbers and text are known"
    )


def filler(value: Any) -> Filler:
    """A function that builds a tree like this one from an iterator of tensors, in the order of `flatten`."""
    if isinstance(value, Tensor):
        return next
    if type(value) is dict or type(value) is MappingProxyType:
        keys = tuple(value)
        if all(isinstance(item, Tensor) for item in value.values()):
            return lambda tensors: dict(zip(keys, tensors, strict=False))
        fillers = [(key, filler(item)) for key, item in value.items()]
        return lambda tensors: {key: fill(tensors) for key, fill in fillers}
    found = children(value)
    if found is None:
        return lambda _: value
    rebuild, parts = found.rebuild, [filler(item) for item in found.values]
    return lambda tensors: rebuild([fill(tensors) for fill in parts])


@attrs.frozen(eq=False)
class Rates:
    """The options that depend on the step, and every learning rate: one vector of float64, an input of the program."""

    fns: list[Callable[[int], Any]]
    is_lr: list[bool]  # which of them the state's `lr_scale` multiplies
    places: list[dict[str, int]]  # for each group of the optimizer: option -> index into the vector
    divisors: list[int]  # where 0 would be divided by
    lr: int | None
    numbers: "array[float]"
    vector: Tensor  # shares memory with numbers

    @classmethod
    def of(cls, step_fn: SupervisedStep) -> "Rates":
        fns: list[tuple[bool, Callable[[int], Any]]] = []
        places: list[dict[str, int]] = []
        divisors = []
        for group, scheduled in zip(step_fn.bound.template.param_groups, step_fn.bound.scheduled, strict=True):
            places.append({})
            # A tensor is kept as it is: what is written to it later counts.
            functions: dict[str, Callable[[int], Any]] = {"lr": partial(_constant, value=group["lr"])}
            for key, fn in (functions | scheduled).items():
                one = (key == "lr", fn)
                if one not in fns:  # one schedule for all groups is evaluated once
                    fns.append(one)
                places[-1][key] = fns.index(one)
            if "capturable" in group:
                divisors.append(places[-1]["lr"])
        lr = step_fn.optimizer.lr
        if callable(lr) and (True, lr) not in fns:
            fns.append((True, lr))  # no group has it, but it is reported
        numbers = array("d", [0.0] * len(fns))
        return cls(
            [fn for _, fn in fns],
            [is_lr for is_lr, _ in fns],
            places,
            divisors,
            fns.index((True, lr)) if callable(lr) else None,
            numbers,
            torch.frombuffer(numbers, dtype=torch.float64),
        )

    def at(self, state: TrainState) -> list[Any]:
        """Write the vector for a state's step; returns the values as the functions gave them."""
        values, scale = [fn(state.step) for fn in self.fns], lr_scale(state)
        if scale != 1.0:
            values = [value * scale if is_lr else value for value, is_lr in zip(values, self.is_lr, strict=True)]
        for index, value in enumerate(values):
            try:
                self.numbers[index] = value
            except TypeError:
                raise Untraceable(f"a scheduled option is {value!r}, expected a number") from None
        for index in self.divisors:
            self.numbers[index] = self.numbers[index] or _NO_RATE
        return values

    def lent(self, bound: BoundOptimizer, vector: Tensor) -> BoundOptimizer:
        """The optimizer with its numbers taken from a traced vector, in the form that can be traced."""
        template = object.__new__(type(bound.template))
        template.__dict__.update(bound.template.__dict__)
        template.param_groups = [
            group | {key: value for key, value in _TRACED.items() if key in group}
            for group in bound.template.param_groups
        ]
        scheduled: tuple[dict[str, Callable[[int], Any]], ...] = tuple(
            {key: partial(_constant, value=vector[index]) for key, index in place.items()} for place in self.places
        )
        lent = attrs.evolve(bound, template=template, scheduled=scheduled)
        lent.seen.append(True)
        return lent


def _constant(_step: int, *, value: Any) -> Any:
    return value


def shapes(tensors: list[Tensor]) -> str:
    """Types and shapes, for a message."""
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors)
