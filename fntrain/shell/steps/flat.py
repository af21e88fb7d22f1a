"""What a traced step is a function of: flat tensors, numbers as tensors, and a key for everything else."""

from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import MappingProxyType, NoneType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fntrain.steps.containers import children
from fntrain.steps.rates import Rates
from fntrain.steps.update import BoundOptimizer

Filler = Callable[[Iterator[Tensor]], Any]
_TRACED = {"foreach": False, "fused": None, "capturable": True}  # options of torch's optimizers, where they have them
_NO_RATE = 1e-30  # stands for a learning rate of 0: the capturable update of Adam and others divides by it


class Untraceable(Exception):  # noqa: N818  # caught in this package: a reason to stay eager
    """Why a step can't be one program; the message is a clause."""


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


class TensorsForNumbers(TorchFunctionMode):
    """Let an optimizer's step compute with the scheduled numbers, and with its step counter, as tensors.

    `param.add_(grad, alpha=-lr)` and its like multiply. `if weight_decay != 0` takes the branch, which is right for 0
    too; for other numbers this is not known: they are refused. `1 - beta ** step` is taken in float64, as by the host:
    float32 would lose 4 of its digits.
    """

    def __init__(self, rates: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.rates = {id(rate): name for name, rate in rates}
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if name == "ne" and id(args[0]) in self.rates and not isinstance(args[1], Tensor) and args[1] == 0:
            if self.rates[id(args[0])] != "weight_decay":
                raise Untraceable(f"the update takes another way where {self.rates[id(args[0])]} is 0")
            return True
        if name == "__rpow__" and args[0].dim() == 0:
            args = (args[0].double(), *args[1:])
        if any(isinstance(arg, Tensor) and arg.dim() for arg in args):
            args = tuple([self._stored(arg) for arg in args])
        key, rewrite = _SCALED.get(name.removesuffix("_"), ("", None))
        if rewrite is None or not isinstance(kwargs.get(key), Tensor):
            return func(*args, **kwargs)
        number = self._stored(kwargs.pop(key))
        method = "sub" if name.startswith("sub") else "add"
        return getattr(Tensor, method + "_" * name.endswith("_"))(args[0], rewrite(number, *args[1:]), **kwargs)

    def _stored(self, arg: Any) -> Any:
        """A number on its way into a large tensor, kept in memory: it would be computed anew for each element."""
        if not isinstance(arg, Tensor) or arg.dim():
            return arg
        return self.stored.setdefault(id(arg), (arg, torch.as_strided(arg, (1,), (1,)).reshape(())))[1]


_SCALED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "add": ("alpha", torch.mul),
    "sub": ("alpha", torch.mul),
    "addcmul": ("value", lambda number, a, b: number * a * b),
    "addcdiv": ("value", lambda number, a, b: number * a / b),
}


def _vector_norms(tensors: list[Tensor], order: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors]


DECOMPOSED = {torch.ops.aten._foreach_norm.Scalar: _vector_norms}  # AOTInductor has it as a slow call-back only
