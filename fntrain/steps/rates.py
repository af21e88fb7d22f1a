"""Rates: what the options of an optimizer that depend on the step come to, worked out once a step, here.

Schedules, the factors of groups and the `lr_scale` of a state are applied nowhere else. Whoever updates (the class's
own step, a fused kernel, a graph, a compiled program) is handed the result.
"""

from typing import Any

import attrs
from torch import Tensor

from fntrain.core.state import TrainState

LR_SCALE = "lr_scale"  # key of `state.extra`: a number that learning rates are multiplied by


@attrs.frozen(eq=False)
class Rates:
    """The options that depend on the step, at one step.

    Args:
      lr: the learning rate that a step reports: the optimizer's own, before the factors of groups.
      groups: for each group of the optimizer, option -> value; the learning rate is always among them.
    """

    lr: Any
    groups: tuple[dict[str, Any], ...]


@attrs.frozen
class Option:
    """One option of one group: a number, tensor or function of the step, and a factor on it."""

    value: Any
    factor: float = 1.0

    @property
    def changes(self) -> bool:
        """Whether `at` has to be asked at every step; a tensor may be written to between two steps."""
        return callable(self.value) or (isinstance(self.value, Tensor) and self.factor != 1.0)

    def at(self, step: int, asked: dict[int, Any]) -> Any:
        """Return the value at a step; `asked` holds what functions gave, so that each is asked once a step."""
        value = self.value
        if callable(value):
            if id(value) not in asked:
                asked[id(value)] = value(step)
            value = asked[id(value)]
        return value if self.factor == 1.0 else value * self.factor


@attrs.frozen(eq=False)
class Schedules:
    """The options of an optimizer that depend on the step, and every learning rate."""

    lr: Option
    groups: tuple[dict[str, Option], ...]
    constant: Rates | None = attrs.field(init=False)  # the rates at every step, where no option depends on it

    @constant.default
    def _constant(self) -> Rates | None:
        every = [self.lr, *(one for group in self.groups for one in group.values())]
        return None if any(one.changes for one in every) else self._at(0, 1.0)

    def at(self, step: int, scale: float = 1.0) -> Rates:
        """Return the rates at a step, learning rates multiplied by `scale`.

        Example:
          >>> Schedules(Option(lambda step: 0.5**step), ({"lr": Option(0.1, factor=2.0)},)).at(1).groups
          ({'lr': 0.2},)
        """
        if self.constant is not None and scale == 1.0:
            return self.constant
        return self._at(step, scale)

    def of(self, state: TrainState) -> Rates:
        """Return the rates of the step that starts at a state."""
        return self.at(state.step, lr_scale(state))

    def _at(self, step: int, scale: float) -> Rates:
        asked: dict[int, Any] = {}
        lr = self.lr.at(step, asked)
        groups = tuple([{key: one.at(step, asked) for key, one in group.items()} for group in self.groups])
        if scale != 1.0:
            lr = lr * scale
            for group in groups:
                group["lr"] = group["lr"] * scale
        return Rates(lr, groups)


def lr_scale(state: TrainState) -> float:
    """Return the number that a state multiplies learning rates by, `extra["lr_scale"]`; 1.0 where it has none.

    Example:
      >>> lr_scale(ft.TrainState(step=0, position=0, seed=0, params={}, extra={"lr_scale": 0.1}))
      0.1
    """
    return state.extra.get(LR_SCALE, 1.0)  # type: ignore[no-any-return]
