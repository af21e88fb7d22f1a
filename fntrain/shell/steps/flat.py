"""What a traced step is a function of: flat tensors, and a key for everything else about a state and a batch."""

from array import array
from collections.abc import Callable, Hashable, Iterator
from types import MappingProxyType, NoneType
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fntrain.steps.containers import children
from fntrain.steps.rates import Rates
from fntrain.steps.update import BoundOptimizer

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
class RateVector:
    """The rates of a step as one vector of float64, an input of the program: no value of theirs compiles anew."""

    names: list[list[str]]  # the options of each group of the optimizer, in the order of the vector
    divides: list[bool]  # for each number, whether the update divides by it
    numbers: "array[float]"
    tensor: Tensor  # shares memory with numbers

    @classmethod
    def of(cls, bound: BoundOptimizer) -> "RateVector":
        """Make the vector for the rates of an optimizer."""
        groups = list(zip(bound.template.param_groups, bound.schedules.groups, strict=True))
        divides = ["capturable" in group and name == "lr" for group, depending in groups for name in depending]
        numbers = array("d", [0.0] * len(divides))
        return cls([list(one) for _, one in groups], divides, numbers, torch.frombuffer(numbers, dtype=torch.float64))

    def write(self, rates: Rates) -> None:
        """Write the numbers of a step.

        Raises:
          Untraceable: an option is no number.
        """
        values = (value for group in rates.groups for value in group.values())
        for index, (value, divides) in enumerate(zip(values, self.divides, strict=True)):
            try:
                self.numbers[index] = (value or _NO_RATE) if divides else value
            except TypeError:
                raise Untraceable(f"a scheduled option is {value!r}, expected a number") from None

    def read(self, vector: Tensor) -> Rates:
        """Return the rates as the elements of a traced vector."""
        elements = iter([vector[index] for index in range(len(self.divides))])
        return Rates(None, tuple({name: next(elements) for name in names} for names in self.names))


def traceable(bound: BoundOptimizer) -> BoundOptimizer:
    """Return the optimizer in the form that can be traced: torch's update on single tensors, which reads no number."""
    template = object.__new__(type(bound.template))
    template.__dict__.update(bound.template.__dict__)
    template.param_groups = [
        group | {key: value for key, value in _TRACED.items() if key in group} for group in bound.template.param_groups
    ]
    changed = attrs.evolve(bound, template=template)
    changed.seen.append(True)
    return changed


def shapes(tensors: list[Tensor]) -> str:
    """Types and shapes, for a message."""
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors)
