"""Which checkpoints stay: the rules of hooks.checkpoint, and the scores that keep_best goes by."""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Literal

import attrs

from fntrain.core.check import whole
from fntrain.core.state import TrainState
from fntrain.metrics import metric_over_ranks

_log = logging.getLogger("fntrain")
Mode = Literal["max", "min"]


@attrs.frozen
class KeepBest:
    """Which checkpoints to keep for their score; made by `keep_best`."""

    metric: str
    mode: Mode
    n: int

    def best(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The n best of scores by step; of equal ones the earlier."""
        sign = -1 if self.mode == "max" else 1
        ranked = sorted(scores.items(), key=lambda item: (sign * item[1], int(item[0])))
        return dict(ranked[: self.n])

    def after(self, state: TrainState, scores: Mapping[str, float]) -> dict[str, float]:
        """The n best of the scores so far and that of a state, if it has one."""
        value = score(state, self.metric)
        return self.best(scores if value is None else {**scores, str(state.step): value})


def keep_best(metric: str, *, mode: Mode, n: int = 1) -> KeepBest:
    """Say which checkpoints `hooks.checkpoint` keeps for their score: those of the n best.

    Args:
      metric: name in `state.metrics` at the steps that are saved; a score that is nan or inf does not count.
      mode: "max" if more is better, "min" if less is.
      n: how many.
    Raises:
      ValueError: the mode is none of the two, or n is not positive.
    Example:
      >>> keep_best("eval/accuracy", mode="max")
      KeepBest(metric='eval/accuracy', mode='max', n=1)
    """
    if mode not in ("max", "min"):
        raise ValueError(f'mode: got {mode!r}, expected "max" or "min"')
    return KeepBest(metric, mode, whole("n", n, 1))


@attrs.frozen
class Retention:
    """The rules by which checkpoints are kept: what none of them keeps is deleted. Without rules all are kept."""

    keep_last: int | None
    keep_every: int | None
    keep_best: tuple[KeepBest, ...]

    def kept(self, steps: list[int], best: Collection[int]) -> set[int]:
        """The steps to keep, of those saved, newest first."""
        if self.keep_last is None and self.keep_every is None and not self.keep_best:
            return set(steps)
        every = {step for step in steps if self.keep_every is not None and step % self.keep_every == 0}
        return {*steps[: self.keep_last or 1], *every, *best}


def score(state: TrainState, metric: str) -> float | None:
    """Return a metric of the state as a number, None if it is not there or not finite.

    Example:
      >>> score(ft.TrainState(step=0, position=0, seed=0, params={}, metrics={"x": 2}), "x")
      2.0
    """
    value = metric_over_ranks(state, metric)
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def tell_unseen(state: TrainState, name: str, metric: str, advice: str) -> None:
    """Log at the end of a run that a metric never had a score: otherwise a misspelt name is never noticed."""
    failed = state.run.stop is not None and state.run.stop.kind == "error"
    if state.step > state.run.start_step and not failed:
        _log.warning("%s: saw no %r that is finite; %s", name, metric, advice)
