"""hooks.reduce_lr_on_plateau: a smaller learning rate when a metric no longer improves."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from fntrain.core.check import number, one_of, whole
from fntrain.core.hook import AnyHook, Hook, hook, stateful
from fntrain.core.state import TrainState, remember
from fntrain.hooks.retention import Mode, tell_unseen
from fntrain.metrics import metric_over_ranks
from fntrain.steps.rates import LR_SCALE, lr_scale

_log = logging.getLogger("fntrain")


@attrs.frozen
class ReduceLROnPlateau:
    """The parameters of the hook; its memory is the best value and how many reports ago it was."""

    metric: str
    mode: Mode
    factor: float
    patience: int
    threshold: float
    cooldown: int
    min_scale: float
    name: str

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        yield hook(after_step=self.judge, after_train=self.warn_unseen)

    def judge(self, state: TrainState) -> TrainState | None:
        """Compare what the state reports with the best; after too many that are no better, reduce the rates."""
        memory = state.hooks[self.name]
        found = metric_over_ranks(state, self.metric)
        if found is None or memory["step"] == state.step:  # seen already: another hook went back to this step
            return None
        value, best = float(found), memory["best"]
        improved = self.improves(value, best)
        best = value if improved else best
        bad = 0 if improved or memory["resting"] else memory["bad"] + 1
        resting = max(memory["resting"] - 1, 0)
        if bad > self.patience:
            state, bad, resting = self.reduced(state), 0, self.cooldown
        return remember(state, self.name, {"best": best, "bad": bad, "resting": resting, "step": state.step})

    def improves(self, value: float, best: float) -> bool:
        """Whether a value is better than the best by more than the threshold; nan is not."""
        # By the sign of the best value: torch multiplies by 1 - threshold, by which -1 is better than -1.
        part = math.copysign(self.threshold, best) if math.isfinite(best) else 0.0
        return value > best * (1 + part) if self.mode == "max" else value < best * (1 - part)

    def reduced(self, state: TrainState) -> TrainState:
        """Return the state with smaller learning rates; as it is, if they are as small as they may get."""
        old = lr_scale(state)
        new = max(old * self.factor, self.min_scale)
        if new >= old:
            return state
        _log.info("step %s: %s is on a plateau; learning rates x %g from now on", state.step, self.metric, new)
        return state.replace(extra={**state.extra, LR_SCALE: new})

    def warn_unseen(self, state: TrainState) -> None:
        """Warn if no step reported the metric: otherwise a misspelt name is never noticed."""
        if state.hooks[self.name]["step"] < 0:
            tell_unseen(state, self.name, self.metric, "list it after the hook that reports it")


def reduce_lr_on_plateau(
    metric: str,
    *,
    mode: Mode,
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
      patience: number of reports without improvement after which the rates are not reduced yet.
      threshold: an improvement is more than this part of the best value, whatever its sign.
      cooldown: number of reports after a reduction that are not counted.
      min_scale: below this the product of the factors does not get.
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
    patience, cooldown = whole("patience", patience, 0), whole("cooldown", cooldown, 0)
    record = ReduceLROnPlateau(metric, mode, factor, patience, threshold, cooldown, min_scale, name)
    start = {"best": -math.inf if mode == "max" else math.inf, "bad": 0, "resting": 0, "step": -1}
    return stateful(name, start, open=record, communicates=True, stops=False)
