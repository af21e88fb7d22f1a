"""The settings of a supervised step, as a plain record, and which of them go together."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import attrs
from torch import Tensor, nn

from fntrain.core.check import whole
from fntrain.steps.batch import Batch
from fntrain.steps.loss import Loss, Weighted, WeightsFn
from fntrain.steps.optim import Optimizer
from fntrain.steps.precision import PRECISIONS, Precision

LossFn = Callable[[nn.Module, Batch], Loss | Weighted]
TransformGrads = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@attrs.frozen(eq=False)
class Settings:
    """What a step is told to do; `ft.supervised_step` says what each means.

    A record of its own, so that the body can hold it without holding the step, which holds the body: in a circle, a
    model's memory would be free only after a pass of the garbage collector.
    """

    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    loss_fn: LossFn = attrs.field(repr=lambda fn: getattr(fn, "__qualname__", repr(fn)))
    optimizer: Optimizer
    accumulate: int = attrs.field(default=1, kw_only=True)
    clip_grad_norm: float | None = attrs.field(default=None, kw_only=True)
    clip_grad_value: float | None = attrs.field(default=None, kw_only=True)
    precision: Precision = attrs.field(default="fp32", kw_only=True)
    on_nonfinite: Literal["skip", "raise", "allow"] = attrs.field(default="skip", kw_only=True)
    transform_grads: TransformGrads | None = attrs.field(default=None, kw_only=True)
    weights: WeightsFn | None = attrs.field(default=None, kw_only=True)
    split: Callable[[Batch, int], Iterable[Batch]] | None = attrs.field(default=None, kw_only=True)
    seeds: Literal["torch", "all"] = attrs.field(default="torch", kw_only=True)


def check(step: Settings) -> None:
    """Raise ValueError or TypeError for a setting that can't be, or does not go with another one."""
    optimizer: Any = step.optimizer
    if not isinstance(optimizer, Optimizer):
        got = type(optimizer).__name__
        raise TypeError(f"optimizer: got {got}, expected ft.optimizer(torch.optim.AdamW, lr=...)")
    whole("accumulate", step.accumulate, 1)
    for name in ("loss_fn", "transform_grads", "weights", "split"):
        fn = getattr(step, name)
        if not callable(fn) and (fn is not None or name == "loss_fn"):
            raise TypeError(f"{name}: got {type(fn).__name__}, expected a function")
    for name in ("clip_grad_norm", "clip_grad_value"):
        value = getattr(step, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: got {value!r}, expected a number > 0 or None")
    if step.clip_grad_norm is not None and step.clip_grad_value is not None:
        raise ValueError("clip_grad_norm and clip_grad_value: got both, expected at most one")
    if step.precision not in PRECISIONS:
        raise ValueError(f"precision: got {step.precision!r}, expected one of {PRECISIONS}")
    if step.on_nonfinite not in ("skip", "raise", "allow"):
        raise ValueError(f"on_nonfinite: got {step.on_nonfinite!r}, expected 'skip', 'raise' or 'allow'")
    if step.seeds not in ("torch", "all"):
        raise ValueError(f"seeds: got {step.seeds!r}, expected 'torch' or 'all'")
    if step.precision == "fp16" and step.on_nonfinite != "skip":
        raise ValueError(
            f"on_nonfinite: got {step.on_nonfinite!r} with precision 'fp16', expected 'skip': gradients that "
            "overflow are how the loss scale is found"
        )
