"""Any torch.optim.Optimizer class as a pair of pure functions, `init` and `update`, on tensors by name."""

import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import attrs
import torch
from toolz import groupby, merge
from torch import Tensor

from fntrain.core import tree
from fntrain.core.check import function
from fntrain.core.tree import PyTree
from fntrain.steps.grads import own_layout
from fntrain.steps.rates import Option, Schedules
from fntrain.steps.update import BoundOptimizer, NewState, OptState, Tensors, is_low

Select = str | Callable[[str, Tensor], bool]


@attrs.frozen(repr=False)
class Group:
    """Options for the parameters that `select` picks; made by `group`."""

    select: Select
    frozen: bool
    lr_scale: float
    options: dict[str, Any]

    def picks(self, name: str, param: Tensor) -> bool:
        if callable(self.select):
            return bool(self.select(name, param))
        return fnmatchcase(name, self.select)

    def __repr__(self) -> str:
        select = getattr(self.select, "__qualname__", repr(self.select))
        usual = {"frozen": False, "lr_scale": 1.0}
        given = {key: getattr(self, key) for key in usual if getattr(self, key) != usual[key]} | self.options
        return f"group({', '.join([select, *(f'{key}={value!r}' for key, value in given.items())])})"


def group(select: Select, *, frozen: bool = False, lr_scale: float = 1.0, **options: Any) -> Group:
    """Give some parameters options of their own; where several groups match, all apply and the later wins.

    Args:
      select: a pattern on the parameter's name (`*` matches dots too), or a predicate (name, tensor) -> bool.
      frozen: do not train these: no gradient is computed, no state kept.
      lr_scale: factor on the learning rate; factors of several matching groups multiply.
      options: keyword arguments of the optimizer class, lr included.
    Raises:
      TypeError: `select` is neither a string nor a function.
    Example:
      >>> group("*.bias", weight_decay=0.0)
      group('*.bias', weight_decay=0.0)
    """
    if not isinstance(select, str):
        function("select", select, "a name pattern or a predicate (name, tensor)")
    return Group(select, frozen, float(lr_scale), options)


@attrs.frozen(repr=False)
class Optimizer:
    """A torch optimizer class and its options as a value; made by `optimizer`."""

    cls: type[torch.optim.Optimizer]
    lr: Any
    groups: tuple[Group, ...]
    options: dict[str, Any]
    master_weights: bool = False

    def init(self, params: Tensors) -> dict[str, dict[str, PyTree]]:
        """Return the state before the first update: empty for most classes, which create theirs on first use.

        Raises:
          ValueError: a group selects no parameter, or all parameters are frozen.
        """
        if self.master_weights:
            params = {name: param.float() if is_low(param) else param for name, param in params.items()}
        bound = self.bind(params)
        made = bound.template.state
        mine = {name: made[params[name]] for names in bound.names for name in names if params[name] in made}
        return {name: tree.clone(dict(kept)) for name, kept in mine.items()}

    def update(
        self, params: Tensors, grads: Tensors, opt_state: OptState, *, step: int
    ) -> tuple[dict[str, Tensor], NewState]:
        """Return new parameters and optimizer state; the arguments stay as they were.

        Args:
          params: by name.
          grads: by name; a name left out (or None) is not updated. Any strides, shared storage allowed: those are
            copied first, because torch's fused kernels assume the parameter's own layout.
          opt_state: what `init` or the last `update` returned.
          step: number of updates made before; schedules are evaluated there.
        Raises:
          ValueError: a gradient has a name or a shape that no parameter has.
        Example:
          >>> sgd = optimizer(torch.optim.SGD, lr=0.5)
          >>> sgd.update({"w": torch.ones(1)}, {"w": torch.ones(1)}, {}, step=0)[0]
          {'w': tensor([0.5000])}
        """
        if unknown := sorted(grads.keys() - params.keys()):
            raise ValueError(f"grads: got {unknown}, which are not among the parameters {sorted(params)}")
        bound = self.bind(params)
        leaves, fresh_state = tree.clone((dict(params), {name: dict(value) for name, value in opt_state.items()}))
        storages: set[int] = set()
        for name, leaf in leaves.items():
            grad = grads.get(name)
            if grad is not None and name not in bound.frozen:
                leaf.grad = own_layout(name, grad, leaf, storages)
        new_state = bound.apply_(leaves, fresh_state, bound.schedules.at(step))
        for leaf in leaves.values():
            leaf.grad = None
        return leaves, new_state

    def bind(self, params: Tensors) -> BoundOptimizer:
        """Resolve the groups for these parameters, once; what a step function keeps."""
        chosen = {n: tuple(i for i, one in enumerate(self.groups) if one.picks(n, params[n])) for n in params}
        for index, one in enumerate(self.groups):
            if not any(index in matches for matches in chosen.values()):
                all_names = ", ".join(params)
                raise ValueError(f"groups[{index}]: {one.select!r} selects no parameter; the model has {all_names}")
        frozen = {name for name, matches in chosen.items() if any(self.groups[i].frozen for i in matches)}
        members = groupby(chosen.__getitem__, (name for name in params if name not in frozen))
        if not members:
            raise ValueError("groups: every parameter is frozen, expected at least one to train")
        scheduled = [self._scheduled(matches) for matches in members]
        torch_groups = []
        for (matches, names), depending in zip(members.items(), scheduled, strict=True):
            options = self._options(matches) | {key: one.at(0, {}) for key, one in depending.items()}
            torch_groups.append({**options, "params": [params[name] for name in names]})
        template = self.cls(torch_groups, **{key: torch_groups[0][key] for key in ("lr", *self.options)})
        tensors = {key for one in template.param_groups for key, value in one.items() if isinstance(value, Tensor)}
        for made, depending in zip(template.param_groups, scheduled, strict=True):
            depending.setdefault("lr", Option(made["lr"]))  # as the class has it: it may have made a tensor of it
        names, schedules = tuple(map(tuple, members.values())), Schedules(Option(self.lr), tuple(scheduled))
        return BoundOptimizer(
            template, names, schedules, frozenset(frozen), tuple(sorted(tensors)), self.master_weights
        )

    def _options(self, matches: Sequence[int]) -> dict[str, Any]:
        options: dict[str, Any] = merge(
            {"lr": self.lr}, self.options, *(self.groups[index].options for index in matches)
        )
        return options

    def _scheduled(self, matches: Sequence[int]) -> dict[str, Option]:
        """The options of a group that depend on the step, and a learning rate with a factor."""
        factor = prod([self.groups[index].lr_scale for index in matches], start=1.0)
        options = self._options(matches)
        depending = {key: Option(value) for key, value in options.items() if callable(value)}
        if factor != 1.0:
            depending["lr"] = Option(options["lr"], factor)
        return depending

    def __repr__(self) -> str:
        options = [f"{key}={value!r}" for key, value in self.options.items()]
        groups = [f"groups={list(self.groups)!r}"] if self.groups else []
        master = ["master_weights=True"] if self.master_weights else []
        return f"optimizer({', '.join([self.cls.__name__, f'lr={self.lr!r}', *options, *groups, *master])})"


def optimizer(
    cls: type[torch.optim.Optimizer],
    *,
    lr: Any,
    groups: Sequence[Group] | None = None,
    master_weights: bool = False,
    **options: Any,
) -> Optimizer:
    """Make any torch.optim.Optimizer class (also a third party's) a value with pure `init` and `update`.

    Args:
      cls: the class; its `step` must not need a closure.
      lr: a float, a 0-d tensor, or a schedule (any function step -> float).
      groups: options for some of the parameters, see `group`.
      master_weights: update parameters in bfloat16 or float16 through float32 copies, kept in `opt_state` under
        "master_weight" (4 bytes a number) and made from the parameters at their first update; small updates would
        round away otherwise. The copies lead: who replaces such parameters replaces these too, or drops them.
      options: keyword arguments of the class; one that is a schedule is evaluated at every step too.
    Raises:
      TypeError: `cls` is no optimizer class, needs a closure (LBFGS) or sparse gradients (SparseAdam); `lr` is no
        number, tensor or schedule.
      ValueError: a group has an option that the class has not.
    Example:
      >>> optimizer(torch.optim.AdamW, lr=1e-3, groups=[group("*bias", lr_scale=2.0)], weight_decay=0.1)
      optimizer(AdamW, lr=0.001, weight_decay=0.1, groups=[group('*bias', lr_scale=2.0)])
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"cls: got {cls!r}, expected a class derived from torch.optim.Optimizer (not an instance)")
    if issubclass(cls, torch.optim.SparseAdam):
        raise TypeError("cls: SparseAdam works on sparse gradients, which are not supported; use Adam or AdamW")
    if not (callable(lr) or isinstance(lr, int | float | Tensor)):
        raise TypeError(f"lr: got {lr!r}, expected a number, a 0-d tensor or a schedule")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"cls: {cls.__name__} evaluates the loss several times by a closure; use one that does not")
    for index, one in enumerate(groups or ()):
        if not isinstance(one, Group):
            raise TypeError(f"groups[{index}]: got {type(one).__name__}, expected ft.group(...)")
        accepted = inspect.signature(cls).parameters
        if unknown := sorted(one.options.keys() - accepted.keys() - {"lr"}):
            raise ValueError(f"groups[{index}]: {cls.__name__} has no option {unknown}; it has {sorted(accepted)}")
    return Optimizer(cls, lr, tuple(groups or ()), options, bool(master_weights))
