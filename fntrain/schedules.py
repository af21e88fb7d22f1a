"""Schedules: pure functions `step -> value`, as frozen values that compare, print and pickle.

The value at step 812 is a function of 812 alone, so a schedule has nothing to save and a resumed run can't get it
wrong. `step` is the number of updates made before (0 for the first). Multiply with `*`, join in time with `join`.
Each closed form is that of the torch.optim.lr_scheduler of the same kind, which computes most of them by recursion.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch

from fntrain.core.check import whole


@attrs.frozen(repr=False)
class Schedule:
    """A named function of the step and its arguments; made by the functions below.

    Example:
      >>> half = cosine(1.0, total_steps=10) * 0.5
      >>> half, half(0), half(10)
      (cosine(start=1.0, total_steps=10, end=0.0) * 0.5, 0.5, 0.0)
    """

    fn: Callable[..., float]
    args: tuple[tuple[str, Any], ...]

    def __call__(self, step: int) -> float:
        return self.fn(step, **dict(self.args))

    def __mul__(self, factor: "float | Schedule") -> "Schedule":
        return Schedule(_product, (("left", self), ("right", factor)))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        args = dict(self.args)
        if self.fn is _join:
            return f"join({', '.join(map(repr, (*args['firsts'], args['last'])))})"
        if self.fn is _product:
            return f"{args['left']!r} * {args['right']!r}"
        if self.fn is _table:
            return f"from_torch({args['name']}, {len(args['values'])} values)"
        return f"{self.fn.__name__[1:]}({', '.join(f'{key}={value!r}' for key, value in self.args)})"


def constant(value: float) -> Schedule:
    """Return `value` at every step.

    Example:
      >>> constant(0.1)(7)
      0.1
    """
    return _make(_constant, value=value)


def linear(start: float, end: float, *, total_steps: int) -> Schedule:
    """Go from `start` to `end` in a straight line over `total_steps`, then stay.

    Example:
      >>> [linear(0.0, 1.0, total_steps=2)(step) for step in range(4)]
      [0.0, 0.5, 1.0, 1.0]
    """
    return _make(_linear, start=start, end=end, total_steps=total_steps)


def cosine(start: float, *, total_steps: int, end: float = 0.0) -> Schedule:
    """Go from `start` to `end` along half a cosine over `total_steps`, then stay.

    Example:
      >>> cosine(1.0, total_steps=2)(1)
      0.5

    Source: Loshchilov and Hutter 2017, SGDR, https://arxiv.org/abs/1608.03983
    """
    return _make(_cosine, start=start, total_steps=total_steps, end=end)


def exponential(start: float, *, gamma: float) -> Schedule:
    """Multiply by `gamma` every step.

    Example:
      >>> exponential(1.0, gamma=0.5)(3)
      0.125
    """
    return _make(_exponential, start=start, gamma=gamma)


def multistep(start: float, *, milestones: Iterable[int], gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` at each milestone (a step count).

    Raises:
      ValueError: milestones out of order.
    Example:
      >>> [multistep(1.0, milestones=(2, 3), gamma=0.5)(step) for step in range(4)]
      [1.0, 1.0, 0.5, 0.25]
    """
    marks = tuple(milestones)
    if list(marks) != sorted(marks):
        raise ValueError(f"milestones: got {marks}, expected them in increasing order")
    return _make(_multistep, start=start, milestones=marks, gamma=gamma)


def step_decay(start: float, *, every: int, gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` every `every` steps.

    Example:
      >>> [step_decay(1.0, every=2, gamma=0.5)(step) for step in range(4)]
      [1.0, 1.0, 0.5, 0.5]
    """
    return _make(_step_decay, start=start, every=every, gamma=gamma)


def inverse_sqrt(peak: float, *, warmup_steps: int) -> Schedule:
    """Rise linearly to `peak` at `warmup_steps`, then fall as 1 / sqrt(step).

    Example:
      >>> [inverse_sqrt(1.0, warmup_steps=4)(step) for step in (2, 4, 16)]
      [0.5, 1.0, 0.5]

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """
    return _make(_inverse_sqrt, peak=peak, warmup_steps=warmup_steps)


def join(*pieces: "tuple[int, Schedule] | Schedule") -> Schedule:
    """Put schedules one after another: each (num_steps, schedule) runs from its own step 0, the last one for ever.

    Raises:
      TypeError: not pairs with a schedule at the end.
      ValueError: a number of steps that is not positive.
    Example:
      >>> warm_stable = join((2, linear(0.0, 1.0, total_steps=2)), constant(1.0))
      >>> [warm_stable(step) for step in range(4)]
      [0.0, 0.5, 1.0, 1.0]
    """
    *firsts, last = pieces
    if not callable(last) or any(not isinstance(piece, tuple) for piece in firsts):
        raise TypeError(f"join: got {pieces!r}, expected (num_steps, schedule) pairs and a schedule at the end")
    for num_steps, _ in firsts:  # type: ignore[misc]
        whole("join: num_steps", num_steps, 1)
    return Schedule(_join, (("firsts", tuple(firsts)), ("last", last)))


def warmup(schedule: Schedule, *, steps: int, start_factor: float = 0.0) -> Schedule:
    """Multiply a schedule's first `steps` values by a factor that rises linearly from `start_factor` to 1.

    Example:
      >>> [warmup(constant(1.0), steps=2)(step) for step in range(3)]
      [0.0, 0.5, 1.0]

    Source: Goyal et al. 2017, https://arxiv.org/abs/1706.02677
    """
    return schedule * linear(start_factor, 1.0, total_steps=steps)


def warmup_cosine(peak: float, *, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """Rise linearly from 0 to `peak` over `warmup_steps`, then follow a cosine down to `end` at `total_steps`.

    Step 0 has value peak / (warmup_steps + 1) rather than 0, so that the first update is not lost.

    Raises:
      ValueError: warmup_steps is not less than total_steps.
    Example:
      >>> [round(warmup_cosine(1.0, warmup_steps=3, total_steps=7)(step), 3) for step in (0, 2, 3, 5, 7)]
      [0.25, 0.75, 1.0, 0.5, 0.0]
    """
    whole("total_steps", total_steps, 1)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps: got {warmup_steps}, expected 0 <= warmup_steps < total_steps={total_steps}")
    args = {"peak": peak, "warmup_steps": warmup_steps, "total_steps": total_steps, "end": end}
    return Schedule(_warmup_cosine, tuple(args.items()))


def from_torch(scheduler: Callable[..., Any], *, lr: float, num_steps: int, **options: Any) -> Schedule:
    """Turn any torch.optim.lr_scheduler class into a schedule, by running it once and keeping its values.

    Args:
      scheduler: a scheduler class, or a function of an optimizer that returns a scheduler (for chains).
      lr: the optimizer's base learning rate.
      num_steps: how many updates the schedule is asked for; later steps raise.
      options: passed to `scheduler`.
    Raises:
      TypeError: the scheduler needs more than the step (ReduceLROnPlateau needs a metric).
    Example:
      >>> from_torch(torch.optim.lr_scheduler.StepLR, lr=1.0, num_steps=4, step_size=2)(3)
      0.1
    """
    whole("num_steps", num_steps, 1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)
    instance = scheduler(optimizer, **options)
    if isinstance(instance, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "from_torch: ReduceLROnPlateau depends on a metric, not on the step alone; it can't be a schedule"
        )
    optimizer.step()  # the order torch insists on; without gradients it changes nothing
    values = []
    for step in range(num_steps + 1):
        values.append(float(optimizer.param_groups[0]["lr"]))
        if step < num_steps:
            instance.step()
    name = getattr(scheduler, "__name__", type(scheduler).__name__)
    return Schedule(_table, (("name", name), ("values", tuple(values))))


def table(schedule: Callable[[int], float], steps: Iterable[int] | int, *, width: int = 40) -> str:
    """Return a schedule's values at some steps as text, a bar beside each.

    Args:
      schedule: any function of the step.
      steps: the steps to show, or a number of steps from which 11 are picked evenly.
    Example:
      >>> print(table(linear(0.0, 1.0, total_steps=2), range(3), width=4))
      step       value
         0           0
         1         0.5  ##
         2           1  ####
    """
    shown = sorted({round(steps * i / 10) for i in range(11)}) if isinstance(steps, int) else list(steps)
    values = [float(schedule(step)) for step in shown]
    top = max((abs(value) for value in values), default=0.0) or 1.0
    rows = [f"{'step':>4}  {'value':>10}"]
    for step, value in zip(shown, values, strict=True):
        rows.append(f"{step:>4}  {value:>10.4g}  {'#' * round(width * abs(value) / top)}".rstrip())
    return "\n".join(rows)


def _make(fn: Callable[..., float], **args: Any) -> Schedule:
    for name in args.keys() & {"total_steps", "every", "warmup_steps"}:
        whole(name, args[name], 1)
    return Schedule(fn, tuple(args.items()))


def _product(step: int, *, left: Schedule, right: "float | Schedule") -> float:
    return left(step) * (right(step) if callable(right) else right)


def _constant(step: int, *, value: float) -> float:
    del step
    return value


def _linear(step: int, *, start: float, end: float, total_steps: int) -> float:
    return start + (end - start) * min(step / total_steps, 1.0)


def _cosine(step: int, *, start: float, total_steps: int, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(step / total_steps, 1.0))) / 2


def _exponential(step: int, *, start: float, gamma: float) -> float:
    return float(start * gamma**step)


def _multistep(step: int, *, start: float, milestones: tuple[int, ...], gamma: float) -> float:
    return float(start * gamma ** sum(step >= mark for mark in milestones))


def _step_decay(step: int, *, start: float, every: int, gamma: float) -> float:
    return float(start * gamma ** (step // every))


def _inverse_sqrt(step: int, *, peak: float, warmup_steps: int) -> float:
    return peak * min(step / warmup_steps, math.sqrt(warmup_steps / max(step, 1)))


def _join(step: int, *, firsts: tuple[tuple[int, Schedule], ...], last: Schedule) -> float:
    for num_steps, schedule in firsts:
        if step < num_steps:
            return schedule(step)
        step -= num_steps
    return last(step)


def _warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int, end: float) -> float:
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return _cosine(step - warmup_steps, start=peak, total_steps=total_steps - warmup_steps, end=end)


def _table(step: int, *, name: str, values: tuple[float, ...]) -> float:
    if step >= len(values):
        raise ValueError(f"schedule {name}: got step {step}, it was made for num_steps={len(values) - 1}")
    return values[step]
