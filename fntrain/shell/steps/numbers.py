"""How an optimizer's step is traced with scheduled numbers, and its step counter, as tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fntrain.shell.steps.flat import Untraceable


class TensorsForNumbers(TorchFunctionMode):
    """Let an optimizer's step compute with the scheduled numbers, and with its step counter, as tensors.

    `param.add_(grad, alpha=-lr)` and its like multiply; `if weight_decay != 0` takes the branch, which is right for 0
    too (other numbers can't be asked); and `1 - beta ** step` is taken in float64, as by the host: float32 would lose 4
    of its digits.
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
