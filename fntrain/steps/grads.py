"""Norm, clipping and layout of gradients; norm and clipping are bitwise those of torch.nn.utils, without its set-up.

On the CPU norm and decision are the host's (a few us against 35 for clip_grad_norm_ on a small MLP); on a GPU both stay
on the device and nothing waits for them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward


def backward(loss: Tensor) -> None:
    """Add the gradients of a scalar loss to the leaves' `.grad`: `loss.backward()` without 12 us of checks.

    Example:
      >>> weight = torch.ones(2, requires_grad=True)
      >>> backward(weight.sum())
      >>> weight.grad
      tensor([1., 1.])
    """
    if type(loss) is not Tensor:  # a subclass, such as the one of a traced step, has a backward of its own
        loss.backward()  # type: ignore[no-untyped-call]
        return
    one = _one(loss.dtype, loss.device)
    _engine_run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def global_norm(grads: list[Tensor]) -> float | Tensor:
    """Return the 2-norm of all gradients together: a number on the CPU, a 0-d tensor on a GPU, where nobody waits.

    Example:
      >>> global_norm([torch.tensor([3.0]), torch.tensor([4.0])])
      5.0
    """
    norms = torch._foreach_norm(grads, 2.0)
    if stalls(norms[0]):
        return _total(norms)
    total = math.hypot(*[norm.item() for norm in norms])
    if not math.isfinite(total):
        # Finite float32 gradients above 1e19 overflow the squares: float64 tells them from inf and nan.
        total = math.hypot(*[grad.double().norm().item() for grad in grads])
    return total


def clip_by_norm_(grads: list[Tensor], norm: float | Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`, bitwise as torch does.

    Example:
      >>> grads = [torch.tensor([3.0, 4.0])]
      >>> clip_by_norm_(grads, global_norm(grads), 1.0)
      >>> grads
      [tensor([0.6000, 0.8000])]
    """
    if isinstance(norm, Tensor):
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    elif not norm < 0.9 * max_norm:  # clear without torch's own sum, whose last bit decides only near 1
        total = _total(torch._foreach_norm(grads, 2.0))
        if math.isinf(total.item()) and math.isfinite(norm):
            total = torch.tensor(norm, dtype=torch.float64)
        factor = (max_norm / (total + 1e-6)).item()
        if not factor >= 1.0:  # nan too, as torch does
            torch._foreach_mul_(grads, factor)


def stalls(tensor: Tensor) -> bool:
    """Tell whether reading a value makes the host wait for a device; a value that is traced can't be read at all."""
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


@lru_cache(maxsize=8)
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _total(norms: Sequence[Tensor]) -> Tensor:
    """One norm of several, with the operations of torch.nn.utils.get_total_norm."""
    first = norms[0]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms]))
    return total


def clip_by_value_(grads: list[Tensor], max_value: float) -> None:
    """Clamp every gradient element in place to [-max_value, max_value].

    Example:
      >>> grads = [torch.tensor([3.0, -4.0])]
      >>> clip_by_value_(grads, 1.0)
      >>> grads
      [tensor([ 1., -1.])]
    """
    torch._foreach_clamp_min_(grads, -max_value)
    torch._foreach_clamp_max_(grads, max_value)


def of(leaves: Mapping[str, Tensor]) -> list[Any]:
    """Return the gradients of leaves that have one."""
    return [leaf.grad for leaf in leaves.values()]


def transformed(
    transform: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the leaves whose gradients a function of all gradients by name returned, with these gradients.

    Raises:
      ValueError: it returned no mapping of some of them.
    """
    before = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    after = transform(MappingProxyType(before))
    if not isinstance(after, Mapping) or (after.keys() - before.keys()) or None in after.values():
        raise ValueError(f"transform_grads: got {after!r:.80}, expected a mapping of some of {sorted(before)}")
    for name, leaf in leaves.items():
        if name not in after or after[name] is not before[name]:
            # A copy: what the function returned may be anyone's memory, and clipping writes in place.
            leaf.grad = own_layout(name, after[name], leaf, None) if name in after else None
    return {name: leaf for name, leaf in leaves.items() if name in after}


def own_layout(name: str, grad: Tensor, param: Tensor, storages: set[int] | None) -> Tensor:
    """Return the gradient in the parameter's layout and in storage of its own, copied only where it is not.

    `torch.autograd.grad` and `torch.func.grad` may return one storage for two gradients, stride 0, or a foreign
    stride; in-place clipping and fused kernels then update silently wrong. `storages` collects what was seen; with None
    it always copies.
    """
    if grad.shape != param.shape:
        raise ValueError(f"grads[{name!r}]: got shape {tuple(grad.shape)}, the parameter has {tuple(param.shape)}")
    check_dense(name, grad)
    same_layout = grad.stride() == param.stride() and grad.dtype == param.dtype
    if storages is not None and same_layout and (storage := grad.untyped_storage().data_ptr()) not in storages:
        storages.add(storage)
        return grad.detach()
    with torch.no_grad():
        return torch.empty_like(param).copy_(grad)


def check_dense(name: str, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise TypeError(
            f"grads[{name!r}]: got a sparse gradient, expected a dense one; make the embedding with sparse=False"
        )
