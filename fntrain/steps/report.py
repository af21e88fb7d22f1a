"""What a step reports: losses, what was reported inside of it, and numbers of the update."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from fntrain import events
from fntrain.events import Collector, MetricName, Reduce
from fntrain.metrics import WEIGHT
from fntrain.steps.exchange import Totals, total
from fntrain.steps.loss import Objective

LR = MetricName("lr", reduce="same", smooth="latest")
LOSS, GRAD_NORM = MetricName("loss", reduce="same"), MetricName("grad_norm", reduce="same")
SKIPPED = MetricName("skipped_steps", reduce="same", smooth="sum")
SCALE = MetricName("loss_scale", reduce="same", smooth="latest")
_RESERVED = frozenset({LOSS, LR, GRAD_NORM, SKIPPED, SCALE, WEIGHT, "step"})


def metrics(
    parts: Sequence[Objective], collected: Sequence[Collector], totals: Totals, *, alone: bool
) -> dict[str, Any]:
    """Return the metrics of a step: what was reported inside, then the losses, divided like the gradients.

    Of several ranks the loss is that of all; the rest is this rank's, to be combined when it is written.

    Raises:
      ValueError: a report or a term of the loss has a name that the step itself uses.
    """
    reported = events.merge([(one, part.weight) for one, part in zip(collected, parts, strict=True)])
    terms = parts[0].terms
    if alone and len(parts) == 1 and not parts[0].divide and not reported and len(terms) == 1:
        return {"loss": totals.loss, **terms}  # the usual case
    _check_names(reported, terms)
    weight = total(parts, "weight")
    losses = {name: reduce(add, [part.terms[name] for part in parts]) for name in terms}
    if parts[0].divide:
        losses = {name: value / weight for name, value in losses.items()}
    if alone:
        return {**reported, "loss": totals.loss, **losses}
    kind: Reduce = "mean" if parts[0].divide else "sum"  # terms with denominators of all ranks are parts of sums
    of_this_rank: dict[str, Any] = {MetricName(name, kind): value for name, value in losses.items() if name != LOSS}
    loss = torch.as_tensor(totals.loss, dtype=parts[0].total.dtype, device=parts[0].total.device)
    on_device = parts[0].divide and isinstance(weight, Tensor)
    return {LOSS: loss, **reported, **of_this_rank, WEIGHT: weight if on_device else float(weight)}


def add_update(metrics: dict[str, Any], lr: Any, norm: Any, healthy: bool | Tensor | None) -> None:
    """Add what a step reports of its update: learning rate, norm of the gradients, and whether it was skipped.

    `healthy` is None where nobody looks whether loss and gradients are finite.
    """
    metrics[LR] = lr
    if norm is not None:
        metrics[GRAD_NORM] = norm
    if healthy is not None:
        metrics[SKIPPED] = (~healthy).float() if isinstance(healthy, Tensor) else float(not healthy)


def _check_names(metrics: dict[str, Any], terms: dict[str, Tensor]) -> None:
    """Refuse names that the step itself uses; a single term may be called "loss", as it is the loss."""
    if not metrics and len(terms) == 1:
        return
    if taken := (_RESERVED | terms.keys()) & metrics.keys() | (_RESERVED - {"loss"}) & terms.keys():
        raise ValueError(f"metrics: {sorted(taken)} are reported by the step or the loss; rename put_scalar or term")
