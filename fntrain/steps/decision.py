"""Whether a step updates: decided once, from the reduced gradients and the loss, before the optimizer's first write.

On the CPU the host decides. On a GPU the decision stays on the device, as a 0-d tensor of bool: the host updates
without waiting for it, and the device chooses between the values before and after the update.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fntrain.core.errors import NonFiniteError
from fntrain.steps import grads
from fntrain.steps.exchange import Exchange, Totals
from fntrain.steps.settings import Settings


def norm(settings: Settings, exchange: Exchange, leaves: Mapping[str, Tensor]) -> float | Tensor | None:
    """Return the global 2-norm of the gradients if the step needs it: to clip by it, or to see what is not finite."""
    wanted = settings.clip_grad_norm is not None or settings.on_nonfinite != "allow"
    return exchange.norm(grads.global_norm(grads.of(leaves))) if leaves and wanted else None


def healthy(settings: Settings, loss: Tensor, norm: float | Tensor | None, totals: Totals) -> bool | Tensor:
    """Tell whether to update: loss and gradients finite, weight not 0; a tensor where the host would have to wait."""
    # Of a loss that is being traced nothing can be read on the host, not even to raise.
    stalls = grads.stalls(loss) and (settings.on_nonfinite != "raise" or torch.compiler.is_compiling())
    weighs: bool | Tensor = totals.counts != 0
    if isinstance(weighs, Tensor) and not stalls:
        weighs = bool(weighs)
    if settings.on_nonfinite == "allow" or norm is None:
        return weighs
    if stalls:
        return torch.isfinite(torch.as_tensor(norm)) & torch.isfinite(loss) & weighs
    return bool(weighs) and math.isfinite(norm) and math.isfinite(loss.item())


def check(settings: Settings, step: int, loss: Tensor, totals: Totals, params: Mapping[str, Tensor]) -> None:
    """Raise what `on_nonfinite="raise"` asks for, of a step that does not update.

    Raises:
      NonFiniteError: loss or gradients are not finite; the message names them. A total weight of 0 is no such error.
    """
    if settings.on_nonfinite == "raise" and bool(totals.counts != 0):
        bad = [n for n, param in params.items() if param.grad is not None and not bool(param.grad.isfinite().all())]
        raise NonFiniteError(
            f"step {step}: loss is {loss.item()}, gradients are not finite in {bad or 'no parameter'}; "
            "the state before this step is unchanged"
        )


def clip(settings: Settings, leaves: Mapping[str, Tensor], norm: float | Tensor | None) -> None:
    """Clip the gradients of a step that updates, in place."""
    if settings.clip_grad_norm is not None and norm is not None:
        grads.clip_by_norm_(grads.of(leaves), norm, settings.clip_grad_norm)
    if settings.clip_grad_value is not None:
        grads.clip_by_value_(grads.of(leaves), settings.clip_grad_value)


def can_choose(new: Any, old: Any, device: torch.device) -> bool:
    """Whether a device can choose between two trees: of the same structure, all tensors, and all on that device.

    Example:
      >>> cpu = torch.device("cpu")
      >>> can_choose({"w": torch.ones(2)}, {"w": torch.zeros(2)}, cpu), can_choose({"n": 1}, {"n": 1}, cpu)
      (True, False)
    """
    if isinstance(new, Tensor):
        return isinstance(old, Tensor) and new.device == device and (new.shape, new.dtype) == (old.shape, old.dtype)
    if isinstance(new, Mapping):
        both = isinstance(old, Mapping) and new.keys() == old.keys()
        return both and all(can_choose(value, old[key], device) for key, value in new.items())
    return False


def choose(healthy: Tensor, new: Any, old: Any) -> Any:
    """Return the new tree where `healthy` (a 0-d tensor of bool) is true, and the old one where it is not.

    Where the device can't choose, the host waits for it, and one of the two trees is returned as it is: an update may
    have created state, or the optimizer keeps counters on the host.

    Example:
      >>> choose(torch.tensor(False), {"w": torch.ones(2)}, {"w": torch.zeros(2)})
      {'w': tensor([0., 0.])}
    """
    if can_choose(new, old, healthy.device):
        return _chosen(healthy, new, old)
    return new if bool(healthy) else old


def _chosen(healthy: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(healthy, new, old)
    return {key: _chosen(healthy, value, old[key]) for key, value in new.items()}
