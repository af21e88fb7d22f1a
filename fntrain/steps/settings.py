"""The settings of a supervised step, as a plain record, and which of them go together."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import attrs
from torch import Tensor, nn

from fntrain.core.check import function, number, one_of, whole
from fntrain.steps.batch import Batch
from fntrain.steps.loss import Loss, Weighted, WeightsFn
from fntrain.steps.optim import Optimizer
from fntrain.steps.precision import PRECISIONS, Precision

LossFn = Callable[[nn.Module, Batch], Loss | Weighted]
TransformGrads = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@attrs.frozen(eq=False)
class Settings:
    """The settings of a step; `ft.supervised_step` says what each means.

    The body holds this record and not the step, which holds the body: in such a circle the memory of a model would be
    free only after a pass of the garbage collector.
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
        function(name, getattr(step, name), optional=name != "loss_fn")
    for name in ("clip_grad_norm", "clip_grad_value"):
        number(name, getattr(step, name), lambda value: value > 0, "> 0", optional=True)
    if step.clip_grad_norm is not None and step.clip_grad_value is not None:
        raise ValueError("clip_grad_norm and clip_grad_value: got both, expected at most one")
    one_of("precision", step.precision, PRECISIONS, f"one of {PRECISIONS}")
    one_of("on_nonfinite", step.on_nonfinite, ("skip", "raise", "allow"))
    one_of("seeds", step.seeds, ("torch", "all"))
    if step.precision == "fp16" and step.on_nonfinite != "skip":
        raise ValueError(
            f"on_nonfinite: got {step.on_nonfinite!r} with precision 'fp16', expected 'skip': gradients that "
            "overflow are how the loss scale is found"
        )
