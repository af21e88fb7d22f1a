"""The update of a bound optimizer: the class's own step, run once on tensors that are lent to it.

The class does the arithmetic (fused and foreach kernels too), so the result is bitwise that of using it directly. No
optimizer object lives between two calls.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fntrain.core import tree
from fntrain.core.tree import PyTree
from fntrain.steps.grads import check_dense
from fntrain.steps.rates import Rates, Schedules

Tensors = Mapping[str, Tensor]  # by the names of parameters
OptState = Mapping[str, Mapping[str, PyTree]]
OwnState = Mapping[str, dict[str, PyTree]]  # optimizer state that an update may write to
NewState = dict[str, Mapping[str, PyTree]]
MASTER = "master_weight"  # the float32 copy of a parameter, beside what the optimizer keeps for it
_GROUP_PREFIX = "group."  # marks what an optimizer keeps per group, stored with the group's first parameter


@attrs.frozen(eq=False)
class BoundOptimizer:
    """An optimizer whose groups are resolved for one set of parameters. The template is never stepped."""

    template: torch.optim.Optimizer
    names: tuple[tuple[str, ...], ...]
    schedules: Schedules
    frozen: frozenset[str]
    tensors: tuple[str, ...]  # options of the groups that are tensors
    master_weights: bool = False
    seen: list[bool] = attrs.field(factory=list, init=False)  # holds something once the class has been looked at

    def apply_(self, leaves: Tensors, opt_state: OwnState, rates: Rates, found_inf: Tensor | None = None) -> NewState:
        """Run the class's step in place on leaves with a `.grad` and on the tensors of `opt_state`.

        A shallow copy of the template holds the tensors for this one call (3 us; building one costs 6 or more).
        `found_inf`, a float tensor, makes a fused class leave everything as it was where it is 1.

        Returns:
          the new optimizer state, made of the tensors given and those the class created.
        """
        if self.master_weights and (low := [n for n, leaf in leaves.items() if is_low(leaf) and leaf.grad is not None]):
            return self._apply_to_masters(low, leaves, opt_state, rates, found_inf)
        lent = self._lend(leaves, opt_state, rates)
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

    def placed(self, opt_state: OptState, params: Tensors) -> OptState:
        """The optimizer state on its parameters' devices; counters stay on the host unless fused or capturable."""
        groups = zip(self.names, self.template.param_groups, strict=True)
        on_device = {name for names, group in groups if group.get("fused") or group.get("capturable") for name in names}

        def place(name: str, leaf: Tensor) -> Tensor:
            return leaf.to(params[name].device) if leaf.dim() > 0 or name in on_device else leaf

        mine = {
            name: tree.map_tensors(partial(place, name), opt_state[name]) for name in opt_state.keys() & params.keys()
        }
        return {**opt_state, **mine}

    def _apply_to_masters(
        self, low: list[str], leaves: Tensors, opt_state: OwnState, rates: Rates, found_inf: Tensor | None
    ) -> NewState:
        """Update float32 copies of the parameters in half precision, and round the result into them."""
        masters = {}
        for name in low:
            leaf, kept = leaves[name], opt_state.get(name, {}).get(MASTER)
            masters[name] = leaf.detach().float() if kept is None else kept
            masters[name].grad = None if leaf.grad is None else leaf.grad.float()
        own = {name: {k: v for k, v in kept.items() if k != MASTER} for name, kept in opt_state.items()}
        rest = attrs.evolve(self, master_weights=False)
        after = rest.apply_({**leaves, **masters}, own, rates, found_inf)
        self.seen.extend(rest.seen)
        for master in masters.values():
            master.grad = None
        with torch.no_grad():
            torch._foreach_copy_([leaves[name] for name in low], list(masters.values()))
        idle = {n: opt_state[n][MASTER] for n in opt_state.keys() - masters.keys() if MASTER in opt_state[n]}
        return {**after, **{n: {**after.get(n, {}), MASTER: master} for n, master in {**idle, **masters}.items()}}

    def _lend(self, leaves: Tensors, opt_state: OwnState, rates: Rates) -> torch.optim.Optimizer:
        """A shallow copy of the template that holds these tensors, at these rates, memory of groups put back."""
        lent = object.__new__(type(self.template))
        lent.__dict__.update(self.template.__dict__)
        lent.state = defaultdict(dict)
        lent.param_groups = []
        for names, group, now in zip(self.names, self.template.param_groups, rates.groups, strict=True):
            mine = {**group, **now, "params": [leaves[name] for name in names]}
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
        self, leaves: Tensors, opt_state: OwnState, lent: torch.optim.Optimizer, before: list[dict[str, Any]]
    ) -> NewState:
        """The optimizer's state by name, and what it changed in a group under the group's first parameter."""
        after: NewState = {n: opt_state[n] for n in self.frozen if n in opt_state}
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


def is_low(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _marks(instance: torch.optim.Optimizer) -> set[tuple[str, str]]:
    """What tells whether a step kept something where it would be lost: in attributes, or in containers of a group."""
    keys: list[Any] = list(instance.state)
    marks = {("state of something that is no parameter", str(key)) for key in keys if not isinstance(key, Tensor)}
    for key, value in instance.__dict__.items():
        if key not in ("state", "param_groups") and not isinstance(value, bool):
            marks.add((f"the attribute {key!r}", _mark(value)))
    for index, group in enumerate(instance.param_groups):
        for key, value in group.items():
            if key != "params" and isinstance(value, list | dict | set):
                marks.add((f"param_groups[{index}][{key!r}]", _mark(value)))
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
