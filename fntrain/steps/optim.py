"""Any torch.optim.Optimizer class as a pair of pure functions, `init` and `update`, on tensors by name.

The class is lent the tensors for one call, and its own step does the arithmetic (fused and foreach kernels too), so
the result is bitwise that of using the class directly. No optimizer object lives between two calls.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fntrain.core import tree
from fntrain.core.state import TrainState
from fntrain.core.tree import PyTree
from fntrain.steps.grads import check_dense, own_layout

OptState = Mapping[str, Mapping[str, PyTree]]
Select = str | Callable[[str, Tensor], bool]
MASTER = "master_weight"  # the float32 copy of a parameter, beside what the optimizer keeps for it
LR_SCALE = "lr_scale"  # key of `state.extra`: a number that learning rates are multiplied by
_GROUP_PREFIX = "group."  # marks what an optimizer keeps per group, stored with the group's first parameter


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
        given = {"frozen": self.frozen} if self.frozen else {}
        given |= ({"lr_scale": self.lr_scale} if self.lr_scale != 1.0 else {}) | self.options
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
    if not (isinstance(select, str) or callable(select)):
        raise TypeError(f"select: got {type(select).__name__}, expected a name pattern or a predicate (name, tensor)")
    return Group(select, frozen, float(lr_scale), options)


@attrs.frozen(repr=False)
class Optimizer:
    """A torch optimizer class and its options as a value; made by `optimizer`."""

    cls: type[torch.optim.Optimizer]
    lr: Any
    groups: tuple[Group, ...]
    options: dict[str, Any]
    master_weights: bool = False

    def init(self, params: Mapping[str, Tensor]) -> dict[str, dict[str, PyTree]]:
        """Return the state before the first update: empty for most classes, which create theirs on first use.

        Raises:
          ValueError: a group selects no parameter, or all parameters are frozen.
        """
        if self.master_weights:
            params = {name: param.float() if _is_low(param) else param for name, param in params.items()}
        bound = self.bind(params)
        return {
            name: tree.clone(dict(bound.template.state[params[name]]))
            for names in bound.names
            for name in names
            if params[name] in bound.template.state
        }

    def update(
        self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], opt_state: OptState, *, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Mapping[str, PyTree]]]:
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
        new_state = bound.apply_(leaves, fresh_state, step)
        for leaf in leaves.values():
            leaf.grad = None
        return leaves, new_state

    def bind(self, params: Mapping[str, Tensor]) -> "BoundOptimizer":
        """Resolve the groups for these parameters, once; what a step function keeps."""
        chosen = {n: tuple(i for i, one in enumerate(self.groups) if one.picks(n, params[n])) for n in params}
        for index, one in enumerate(self.groups):
            if not any(index in matches for matches in chosen.values()):
                raise ValueError(
                    f"groups[{index}]: {one.select!r} selects no parameter; the model has {', '.join(params)}"
                )
        frozen = {name for name, matches in chosen.items() if any(self.groups[i].frozen for i in matches)}
        from toolz import groupby  # 4 ms to import: only where it is used

        members = groupby(chosen.__getitem__, (name for name in params if name not in frozen))
        if not members:
            raise ValueError("groups: every parameter is frozen, expected at least one to train")
        scheduled = [self._scheduled(matches) for matches in members]
        torch_groups = []
        for (matches, names), hyper in zip(members.items(), scheduled, strict=True):
            options = self._options(matches) | {key: fn(0) for key, fn in hyper.items()}
            torch_groups.append({**options, "params": [params[name] for name in names]})
        template = self.cls(torch_groups, **{key: torch_groups[0][key] for key in ("lr", *self.options)})
        tensors = {key for one in template.param_groups for key, value in one.items() if isinstance(value, Tensor)}
        names = tuple(map(tuple, members.values()))
        return BoundOptimizer(
            template, names, tuple(scheduled), frozenset(frozen), tuple(sorted(tensors)), self.master_weights
        )

    def _options(self, matches: Sequence[int]) -> dict[str, Any]:
        merged = {"lr": self.lr, **self.options}
        for index in matches:
            merged |= self.groups[index].options
        return merged

    def _scheduled(self, matches: Sequence[int]) -> dict[str, Callable[[int], Any]]:
        """The options of a group that depend on the step, and a scaled learning rate, as functions of it."""
        options = self._options(matches)
        scale = 1.0
        for index in matches:
            scale *= self.groups[index].lr_scale
        hyper = {key: value for key, value in options.items() if callable(value)}
        if scale != 1.0:
            lr = options["lr"]
            hyper["lr"] = lambda step: (lr(step) if callable(lr) else lr) * scale
        return hyper

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


@attrs.frozen(eq=False)
class BoundOptimizer:
    """An optimizer whose groups are resolved for one set of parameters. The template is never stepped."""

    template: torch.optim.Optimizer
    names: tuple[tuple[str, ...], ...]
    scheduled: tuple[dict[str, Callable[[int], Any]], ...]
    frozen: frozenset[str]
    tensors: tuple[str, ...]  # options of the groups that are tensors
    master_weights: bool = False
    seen: list[bool] = attrs.field(factory=list, init=False)  # holds something once the class has been looked at

    def apply_(
        self,
        leaves: Mapping[str, Tensor],
        opt_state: Mapping[str, dict[str, PyTree]],
        step: int,
        found_inf: Tensor | None = None,
        lr_scale: float = 1.0,
    ) -> dict[str, Mapping[str, PyTree]]:
        """Run the class's step in place on leaves with a `.grad` and on the tensors of `opt_state`.

        A shallow copy of the template holds the tensors for this one call (3 us; building one costs 6 or more).
        `found_inf`, a float tensor, makes a fused class leave everything as it was where it is 1. Learning rates are
        multiplied by `lr_scale`.

        Returns:
          the new optimizer state, made of the tensors given and those the class created.
        """
        if self.master_weights and (
            low := [n for n, leaf in leaves.items() if _is_low(leaf) and leaf.grad is not None]
        ):
            return self._apply_to_masters(low, leaves, opt_state, step, found_inf, lr_scale)
        lent = self._lend(leaves, opt_state, step, lr_scale)
        if found_inf is not None:
            lent.found_inf = found_inf  # type: ignore[attr-defined]
        before = [dict(group) for group in lent.param_groups]
        for name, leaf in leaves.items():
            if name not in opt_state and leaf.grad is not None:
                check_dense(name, leaf.grad)
        marks = None if self.seen else _marks(lent)  # the first update shows where the class keeps its memory
        try:
            _unwrapped_step(type(lent))(lent)
        except KeyError as error:
            kept = sorted({key for own in opt_state.values() for key in own})
            error.add_note(f"in {type(lent).__name__}: opt_state has {kept}; a resumed run keeps its optimizer")
            raise
        if marks is not None:
            if changed := sorted(_marks(lent) ^ marks):
                raise TypeError(
                    f"{type(lent).__name__}: its step changes {changed[0][0]}, outside of the state of a parameter and "
                    "of numbers and tensors in `param_groups`; it can't be used as a pure function"
                )
            self.seen.append(True)
        return self._collect(leaves, opt_state, lent, before)

    def placed(self, opt_state: OptState, params: Mapping[str, Tensor]) -> OptState:
        """The optimizer state on its parameters' devices; counters stay on the host unless fused or capturable."""
        counts_there = {
            name: bool(group.get("fused") or group.get("capturable"))
            for names, group in zip(self.names, self.template.param_groups, strict=True)
            for name in names
        }

        def place(name: str, leaf: Tensor) -> Tensor:
            moves = leaf.dim() > 0 or counts_there.get(name, False)
            return leaf.to(params[name].device) if moves and leaf.device != params[name].device else leaf

        return {
            name: tree.map_tensors(partial(place, name), kept) if name in params else kept
            for name, kept in opt_state.items()
        }

    def _apply_to_masters(
        self,
        low: list[str],
        leaves: Mapping[str, Tensor],
        opt_state: Mapping[str, dict[str, PyTree]],
        step: int,
        found_inf: Tensor | None,
        lr_scale: float,
    ) -> dict[str, Mapping[str, PyTree]]:
        """Update float32 copies of the parameters in half precision, and round the result into them."""
        masters = {}
        for name in low:
            kept = opt_state.get(name, {}).get(MASTER)
            masters[name] = leaves[name].detach().float() if kept is None else kept
            masters[name].grad = None if leaves[name].grad is None else leaves[name].grad.float()  # type: ignore[union-attr]
        own = {name: {k: v for k, v in kept.items() if k != MASTER} for name, kept in opt_state.items()}
        rest = attrs.evolve(self, master_weights=False)
        after = rest.apply_({**leaves, **masters}, own, step, found_inf, lr_scale)
        self.seen.extend(rest.seen)
        for master in masters.values():
            master.grad = None
        with torch.no_grad():
            torch._foreach_copy_([leaves[name] for name in low], list(masters.values()))
        idle = {n: opt_state[n][MASTER] for n in opt_state.keys() - masters.keys() if MASTER in opt_state[n]}
        return {**after, **{n: {**after.get(n, {}), MASTER: master} for n, master in {**idle, **masters}.items()}}

    def _lend(
        self, leaves: Mapping[str, Tensor], opt_state: Mapping[str, dict[str, PyTree]], step: int, lr_scale: float
    ) -> torch.optim.Optimizer:
        """A shallow copy of the template that holds these tensors, schedules evaluated, memory of groups put back."""
        lent = object.__new__(type(self.template))
        lent.__dict__.update(self.template.__dict__)
        lent.state = defaultdict(dict)
        lent.param_groups = []
        for names, group, hyper in zip(self.names, self.template.param_groups, self.scheduled, strict=True):
            mine = {**group, "params": [leaves[name] for name in names]}
            for key, fn in hyper.items():
                mine[key] = fn(step)
            if lr_scale != 1.0:
                mine["lr"] = mine["lr"] * lr_scale
            for key in self.tensors:  # the template's own, and a schedule's, must not be written to
                mine[key] = tree.map_tensors(torch.clone, mine[key])
            for name in names:
                if own := opt_state.get(name):
                    lent.state[leaves[name]] = own
            if memory := _group_memory(opt_state, names):
                mine |= memory
                # The class asks whether a parameter's state is empty: what is the group's does not count.
                own = {key: value for key, value in opt_state[names[0]].items() if not key.startswith(_GROUP_PREFIX)}
                lent.state[leaves[names[0]]] = own
            lent.param_groups.append(mine)
        return lent

    def _collect(
        self,
        leaves: Mapping[str, Tensor],
        opt_state: Mapping[str, dict[str, PyTree]],
        lent: torch.optim.Optimizer,
        before: list[dict[str, Any]],
    ) -> dict[str, Mapping[str, PyTree]]:
        """The optimizer's state by name, and what it changed in a group under the group's first parameter."""
        after: dict[str, Mapping[str, PyTree]] = {n: opt_state[n] for n in self.frozen if n in opt_state}
        for names, group, old in zip(self.names, lent.param_groups, before, strict=True):
            for name in names:
                if own := lent.state.get(leaves[name]):
                    after[name] = own
            changed = {key for key, value in group.items() if value is not old.get(key)}
            changed |= {key for key in self.tensors if getattr(group[key], "_version", 0)}  # a clone starts at 0
            kept = changed | _group_memory(opt_state, names).keys()
            if kept := kept - {"params"}:
                memory = {_GROUP_PREFIX + key: group[key] for key in kept}
                after[names[0]] = {**after.get(names[0], {}), **memory}
        return after


def lr_scale(state: TrainState) -> float:
    """Return the number that a state multiplies learning rates by, `extra["lr_scale"]`; 1.0 where it has none.

    Example:
      >>> lr_scale(ft.TrainState(step=0, position=0, seed=0, params={}, extra={"lr_scale": 0.1}))
      0.1
    """
    return state.extra.get(LR_SCALE, 1.0)  # type: ignore[no-any-return]


def _is_low(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _marks(instance: torch.optim.Optimizer) -> set[tuple[str, str]]:
    """What tells whether a step kept something where it would be lost: in attributes, or in containers of a group."""
    keys: list[Any] = list(instance.state)
    marks = {("state of something that is no parameter", str(key)) for key in keys if not isinstance(key, Tensor)}
    for key, value in instance.__dict__.items():
        if key not in ("state", "param_groups") and not isinstance(value, bool):
            marks.add((f"the attribute {key!r}", _mark(value)))
    for index, one in enumerate(instance.param_groups):
        containers = {
            key: value for key, value in one.items() if key != "params" and isinstance(value, list | dict | set)
        }
        marks |= {(f"param_groups[{index}][{key!r}]", _mark(value)) for key, value in containers.items()}
    return marks


def _mark(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{id(value)} {value._version}"
    return repr(value) if isinstance(value, int | float | str | list | dict | set) else ""


def _group_memory(opt_state: Mapping[str, Mapping[str, PyTree]], names: Sequence[str]) -> dict[str, PyTree]:
    """What an optimizer keeps in a group, stored with the group's first parameter."""
    entries = opt_state.get(names[0], {})
    return {k.removeprefix(_GROUP_PREFIX): v for k, v in entries.items() if k.startswith(_GROUP_PREFIX)}


def _unwrapped_step(cls: type[torch.optim.Optimizer]) -> Callable[[torch.optim.Optimizer], Any]:
    """The class's step without the profiling wrapper torch puts around it (8 us a call).

    Only that one wrapper is taken off, and not while step hooks for all optimizers are registered: it runs those.
    """
    if getattr(cls.step, "hooked", False) and not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks):
        return cls.step.__wrapped__  # type: ignore[attr-defined,no-any-return]
    return cls.step
