"""Adam and AdamW by torch's fused kernel, called on lists made once instead of through the class's step.

The arithmetic is the kernel's, so the result is bitwise the class's; what is saved is finding the same tensors again
at every step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fntrain.steps.grads import stalls
from fntrain.steps.rates import Rates
from fntrain.steps.update import BoundOptimizer

_CLASSES = (torch.optim.Adam, torch.optim.AdamW)
_MEMORY = {"step", "exp_avg", "exp_avg_sq"}
_OPTIONS = ("lr", "betas", "weight_decay", "eps", "amsgrad", "maximize")


@attrs.frozen(eq=False)
class FusedAdam:
    """The update of one module, on the tensors its parameters and optimizer state are kept in."""

    groups: list["_Group"]
    names: frozenset[str]

    @classmethod
    def of(
        cls, bound: BoundOptimizer, params: Mapping[str, Tensor], opt_state: Mapping[str, dict[str, Any]]
    ) -> "FusedAdam | None":
        """Return the update if the class, its options and its state are the plain fused ones, else None."""
        optimizer = bound.template
        if type(optimizer) not in _CLASSES or bound.tensors:
            return None
        groups = []
        for names, group, depending in zip(bound.names, optimizer.param_groups, bound.schedules.groups, strict=True):
            memory = _MEMORY | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
            kept = [opt_state.get(name, {}) for name in names]
            kinds = {(params[name].dtype, params[name].device) for name in names}
            known = group["fused"] and len(kinds) == 1 and depending.keys() <= set(_OPTIONS)
            if not known or any(one.keys() != memory for one in kept):
                return None
            lists = [[one[key] for one in kept if key in one] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
            counts = torch.stack([one["step"] for one in kept])  # counted in one operation, seen one by one
            for one, count in zip(kept, counts.unbind(), strict=True):
                one["step"] = count
            options = {key: group[key] for key in _OPTIONS}
            lists = [*lists, [one["step"] for one in kept]]
            leaves = [params[name] for name in names]
            counted = None if stalls(counts) else counts.numpy()
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            groups.append(_Group(kernel, names, leaves, lists, counts, counted, options, frozenset(depending)))
        return cls(groups, frozenset(name for names in bound.names for name in names))

    @property
    def only_lr(self) -> bool:
        """Whether no option but the learning rate depends on the step."""
        return not any(group.scheduled - {"lr"} for group in self.groups)

    def takes(self, leaves: Mapping[str, Tensor]) -> bool:
        """Whether every parameter has a gradient, and nobody wants to see the class's step."""
        return leaves.keys() == self.names and not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def __call__(self, leaves: Mapping[str, Tensor], rates: Rates, found_inf: Tensor | None = None) -> None:
        """Update in place by the gradients of the leaves; where `found_inf` is 1 everything stays as it was."""
        for group, depending in zip(self.groups, rates.groups, strict=True):
            now = group.options | depending
            beta1, beta2 = now.pop("betas")
            grads = [leaves[name].grad for name in group.names]
            if group.counted is None:
                group.counts.add_(1)
            else:
                group.counted += 1
            now |= {"beta1": beta1, "beta2": beta2, "grad_scale": None, "found_inf": found_inf}
            group.kernel(group.params, grads, *group.memory, **now)
            if found_inf is not None:
                group.counts.sub_(found_inf)


@attrs.define(eq=False)
class _Group:
    """Parameters with the same options, as lists in the order the kernel takes them."""

    kernel: Callable[..., None]
    names: tuple[str, ...]
    params: list[Tensor]
    memory: list[list[Tensor]]  # first and second moment, largest second moment or nothing, steps
    counts: Tensor  # the steps, which are views of it
    counted: Any  # the same memory as a NumPy array, to count without an operation of torch; None on a GPU
    options: dict[str, Any]
    scheduled: frozenset[str]  # options that depend on the step, and the learning rate
