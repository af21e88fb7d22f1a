"""Precision of a step: autocast, the tf32 switch, and fp16's loss scale, which is part of the state.

Nothing here waits for a device: the scale and its counter are tensors, and what they become is computed where they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LOSS_SCALE = "loss_scale"  # its place in `state.extra`
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps without overflow after which the scale is doubled
_SMALLEST, _LARGEST = 2.0**-16, 2.0**24
# The switches for how float32 products on a GPU round; torch's older switches must not be mixed with these.
FLOAT32: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for one forward; nothing to enter for fp32 and tf32.

    Example:
      >>> with autocast("bf16", torch.device("cpu")):
      ...     print((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
      torch.bfloat16
    """
    dtype = _AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let float32 matrix products and convolutions on an NVIDIA GPU round their factors to TensorFloat-32.

    Raises:
      ValueError: the device is not a GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"precision: 'tf32' is a mode of NVIDIA GPUs, the model is on {device}; use 'fp32' or 'bf16'")
    before = [switch.fp32_precision for switch in FLOAT32]
    try:
        for switch in FLOAT32:
            switch.fp32_precision = "tf32"
        yield
    finally:
        for switch, was in zip(FLOAT32, before, strict=True):
            switch.fp32_precision = was


def loss_scale(extra: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return the loss scale that a state holds, or the first one.

    Example:
      >>> loss_scale({}, torch.device("cpu"))["scale"]
      tensor(65536.)
    """
    if LOSS_SCALE in extra:
        return {name: value.to(device) for name, value in extra[LOSS_SCALE].items()}
    return {
        "scale": torch.full((), INITIAL_SCALE, dtype=torch.float32, device=device),
        "good_steps": torch.zeros((), dtype=torch.int32, device=device),
    }


def unscale_(grads: list[Tensor], scale: Tensor) -> None:
    """Divide gradients by the scale in place; scales are powers of two, so only what overflowed is lost.

    Example:
      >>> grads = [torch.tensor([8.0])]
      >>> unscale_(grads, torch.tensor(4.0))
      >>> grads
      [tensor([2.])]
    """
    inverse = scale.double().reciprocal().float()
    for dtype in {grad.dtype for grad in grads}:
        same = [grad for grad in grads if grad.dtype == dtype]
        torch._foreach_mul_(same, inverse.to(same[0].device))


def next_loss_scale(now: Mapping[str, Tensor], healthy: bool | Tensor) -> dict[str, Tensor]:
    """Halve the scale after an overflow, double it after 2000 steps without one; as torch.amp.GradScaler does.

    Example:
      >>> after = next_loss_scale(loss_scale({}, torch.device("cpu")), healthy=False)
      >>> after["scale"].item(), after["good_steps"].item()
      (32768.0, 0)

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.2
    """
    scale, good = now["scale"], now["good_steps"]
    ok = healthy if isinstance(healthy, Tensor) else torch.full((), healthy, device=scale.device)
    counted = good + 1
    grows = counted >= GROWTH_INTERVAL
    grown = torch.where(grows, scale * 2, scale).clamp(max=_LARGEST)
    return {
        "scale": torch.where(ok, grown, (scale / 2).clamp(min=_SMALLEST)),
        "good_steps": torch.where(ok & ~grows, counted, torch.zeros_like(good)),
    }
