"""What a loss function may return, and how the losses of micro-batches add up.

Every form becomes a sum of terms to backpropagate and a divisor for the gradients (None: no rescaling at all, so one
micro-batch with a plain loss is bitwise the raw loop; `(mean * n) / n` is not `mean`).
"""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.steps.batch import Batch, num_samples

Loss = Tensor | Mapping[str, Tensor]


@attrs.frozen(eq=False)
class Weighted:
    """A loss sum and the weight it is to be divided by; made by `weighted`."""

    loss_sum: Loss
    weight: Tensor | float


def weighted(loss_sum: Loss, weight: Tensor | float) -> Weighted:
    """Return from a loss function a sum and its denominator, such as the number of unmasked tokens.

    Sums and weights of micro-batches (and ranks) are added and divided once, so ragged or masked batches give
    exactly the gradient of the whole. A total weight of 0 is a skipped step.

    Args:
      loss_sum: scalar tensor, or a dict of them that share the weight. Terms with denominators of their own need
        `supervised_step(weights=...)`.
      weight: number or 0-d tensor >= 0, not part of the gradient.
    Example:
      >>> weighted(torch.tensor(6.0), 3).weight
      3
    """
    if isinstance(weight, Tensor):
        weight = weight.detach()
    elif not weight >= 0:
        raise ValueError(f"weight: got {weight!r}, expected a number >= 0")
    return Weighted(loss_sum, weight)


@attrs.frozen(eq=False)
class Objective:
    """One micro-batch's part: terms to add up (the objective is their sum), and its weight."""

    terms: dict[str, Tensor]
    total: Tensor
    weight: Tensor | float  # in means of what was reported
    divide: bool  # whether gradients and terms are divided by the sum of weights
    counts: Tensor | float  # the step is skipped if these add up to 0

    def detached(self) -> "Objective":
        """The same values without their graph, for the metrics."""
        total = _copied(self.total)
        terms = {name: total if term is self.total else _copied(term) for name, term in self.terms.items()}
        return Objective(terms, total, self.weight, self.divide, self.counts)


def objective(output: Any, batch: Batch, *, alone: bool, denominators: Mapping[str, Any] | None) -> Objective:
    """Read what a loss function returned for one micro-batch.

    Args:
      output: the loss function's result.
      batch: the micro-batch.
      alone: whether it is the only micro-batch of the step.
      denominators: what `weights(batch)` returned for the whole batch, if the step has `weights`.
    Raises:
      TypeError, ValueError: not a scalar tensor with a gradient, a dict of them, or `weighted`.
    """
    if alone and denominators is None and isinstance(output, Tensor) and output.dim() == 0 and output.requires_grad:
        return Objective({"loss": output}, output, 1.0, False, 1)  # the usual case
    if denominators is not None:
        terms = _over(_terms(output), denominators)
        weight = 1.0 if alone else num_samples(batch)
        return Objective(terms, _sum(terms), weight, divide=False, counts=reduce(add, denominators.values()))
    if isinstance(output, Weighted):
        terms = _terms(output.loss_sum)
        return Objective(terms, _sum(terms), output.weight, divide=True, counts=output.weight)
    terms = _terms(output)
    if alone:
        return Objective(terms, _sum(terms), 1.0, divide=False, counts=1)
    size = num_samples(batch)
    scaled = {name: term * size for name, term in terms.items()}
    return Objective(scaled, _sum(scaled), size, divide=True, counts=size)


def _copied(term: Tensor) -> Tensor:
    """A term for the metrics; one that is a parameter, or a view of one, is copied: the update writes to it."""
    return term.detach().clone() if term.is_leaf or term._base is not None else term.detach()


def _terms(loss: Any) -> dict[str, Tensor]:
    terms = dict(loss) if isinstance(loss, Mapping) else {"loss": loss}
    if not terms:
        raise ValueError("loss_fn: returned an empty dict, expected at least one loss")
    if "loss" in terms and len(terms) > 1:
        raise ValueError(f"loss_fn: a term named 'loss' among {sorted(terms)} would hide their sum; rename it")
    for name, term in terms.items():
        _check_term(name, term)
    return terms


def _check_term(name: str, term: Any) -> None:
    if isinstance(term, Weighted):
        raise TypeError(
            f"loss_fn: term {name!r} is weighted on its own; return ft.weighted(dict, weight) for one shared weight, "
            "or plain sums and pass weights=fn(batch) -> {term: denominator} to the step"
        )
    if not isinstance(term, Tensor):
        raise TypeError(f"loss_fn: {name!r} is {type(term).__name__}, expected a scalar tensor (do not call .item())")
    if term.dim() != 0:
        raise ValueError(f"loss_fn: {name!r} has shape {tuple(term.shape)}, expected a scalar; reduce it, .mean() say")


def _over(terms: dict[str, Tensor], denominators: Mapping[str, Any]) -> dict[str, Tensor]:
    if terms.keys() != denominators.keys():
        raise ValueError(f"loss_fn: returned terms {sorted(terms)}, weights(batch) gave {sorted(denominators)}")
    divided = {}
    for name, term in terms.items():
        denominator = torch.as_tensor(denominators[name], dtype=term.dtype, device=term.device)
        # A term nobody has samples for is 0 / 0: divide by 1 instead, its sum is 0.
        divided[name] = term / torch.where(denominator == 0, 1.0, denominator)
    return divided


def _sum(terms: dict[str, Tensor]) -> Tensor:
    total = reduce(add, terms.values())
    if not total.requires_grad:
        raise ValueError(
            "loss_fn: the loss has no gradient (requires_grad is False); compute it from the model's output, "
            "without .detach(), .item() or torch.no_grad()"
        )
    return total


WeightsFn = Callable[[Batch], Mapping[str, Any]]
