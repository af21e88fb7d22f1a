"""hooks.reduce_lr_on_plateau: a smaller learning rate when a metric no longer improves."""

import logging
import math
from typing import Literal

import attrs

from fntrain.core.check import number, one_of, whole
from fntrain.core.hook import AnyHook, stateful
from fntrain.core.state import TrainState, remember
from fntrain.hooks.retention import tell_unseen
from fntrain.metrics import metric_over_ranks
from fntrain.steps.rates import LR_SCALE, lr_scale

_log = logging.getLogger("fntrain")


@attrs.frozen
class _WarnUnseen:
    """The callback at the end: warns if no step reported the metric, whose name may be misspelt."""

    rule: "ReduceLROnPlateau"

    def __call__(self, state: TrainState) -> None:
        if state.hooks[self.rule.name]["step"] < 0:
            tell_unseen(state, self.rule.name, self.rule.metric, "list it after the hook that reports it")


@attrs.frozen
class ReduceLROnPlateau:
    """The callback: remembers the best value and how many reports ago it was."""

    metric: str
    mode: Literal["max", "min"]
    factor: float
    patience: int
    threshold: float
    cooldown: int
    min_scale: float
    name: str

    def __call__(self, state: TrainState) -> TrainState | None:
        memory = state.hooks[self.name]
        found = metric_over_ranks(state, self.metric)
        if found is None or memory["step"] == state.step:  # another hook went back to this step
            return None
        value = float(found)
        best = memory["best"]
        resting = max(memory["resting"] - 1, 0)
        if self.improves(value, best):
            best, bad = value, 0
        else:
            bad = 0 if memory["resting"] else memory["bad"] + 1
        if bad > self.patience:
            old = lr_scale(state)
            new = max(old * self.factor, self.min_scale)
            bad, resting = 0, self.cooldown
            if new < old:
                _log.info("step %s: %s is on a plateau; learning rates x %g from now on", state.step, self.metric, new)
                state = state.replace(extra={**state.extra, LR_SCALE: new})
        return remember(state, self.name, {"best": best, "bad": bad, "resting": resting, "step": state.step})

    def improves(self, value: float, best: float) -> bool:
        """Whether a value is better than the best by more than the threshold; nan is not."""
        part = math.copysign(self.threshold, best) if math.isfinite(best) else 0.0
        return value > best * (1 + part) if self.mode == "max" else value < best * (1 - part)


def reduce_lr_on_plateau(
    metric: str,
    *,
    mode: Literal["max", "min"],
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
    min_scale: float = 0.0,
    name: str = "reduce_lr_on_plateau",
) -> AnyHook:
    """Multiply all learning rates by `factor` when a metric has not improved for more than `patience` reports.

    It writes `state.extra["lr_scale"]`, by which a step multiplies the learning rate of every group, schedules too; the
    metric `lr` shows the product. List it after the hook that reports the metric and before `hooks.checkpoint`.

    Steps without the metric do not count, nor does an evaluation that runs only because the run ends: resumed, it goes
    on as if it had not been stopped.

    Args:
      metric: name in `state.metrics`. nan is no improvement.
      mode: "max" if more is better, "min" if less is.
      factor: between 0 and 1.
      patience: number of reports without improvement that are borne.
      threshold: an improvement is more than this part of the best value, whatever its sign.
      cooldown: number of reports after a reduction that are not counted.
      min_scale: the product of the factors does not get below.
      name: unique in a run; the best value is in `state.hooks[name]`.
    Raises:
      ValueError: an argument out of range.
    Example:
      >>> reduce_lr_on_plateau("eval/loss", mode="min", patience=3).name
      'reduce_lr_on_plateau'

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau, for which a value below 0 is better than itself
    """
    one_of("mode", mode, ("max", "min"))
    number("factor", factor, lambda factor: 0 < factor < 1, "between 0 and 1")
    number("threshold", threshold, lambda part: 0 <= part <= math.inf, "between 0 and inf")
    number("min_scale", min_scale, lambda scale: 0 <= scale <= 1, "between 0 and 1")
    record = ReduceLROnPlateau(
        metric, mode, factor, whole("patience", patience, 0), threshold, whole("cooldown", cooldown, 0), min_scale, name
    )
    worst = -math.inf if mode == "max" else math.inf
    return stateful(
        name,
        {"best": worst, "bad": 0, "resting": 0, "step": -1},
        after_step=record,
        after_train=_WarnUnseen(record),
        communicates=True,
        stops=False,
    )
