"""hooks.rollback_on_spike: when the loss jumps, go back to an earlier state and go on with other data.

The last values and the roll-backs so far are in `state.hooks` and in every checkpoint; the states to go back to are
in memory only.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import attrs
import torch

from fntrain.core import tree
from fntrain.core.check import number, whole
from fntrain.core.hook import AnyHook, Hook, Needs, hook, resource
from fntrain.core.state import TrainState, remember, stop
from fntrain.events import MetricName
from fntrain.hooks.series import to_host
from fntrain.metrics import metric_over_ranks

_log = logging.getLogger("fntrain")
ROLLBACKS = MetricName("rollbacks", reduce="max", smooth="each")
# These may come after this hook: memory that survives a roll-back, and saves, which are the same when done again.
_AFTER = ("lasting memory", "branch")
_MEMORY = Needs("memory", "may go back to an earlier step, and it would count that step twice", but=_AFTER)
_TREES = ("params", "buffers", "opt_state", "hooks", "extra", "metrics")
NUM_KEPT = 2  # a state from which a spike came twice was bad itself: then the run goes back to the one before it


def rollback_on_spike(
    metric: str = "loss",
    *,
    factor: float = 3.0,
    window: int = 50,
    nonfinite_steps: int = 3,
    snapshot_every: int = 100,
    look_every: int = 10,
    max_rollbacks: int = 3,
    within_steps: int = 1000,
    on_host: bool = True,
    name: str = "rollback_on_spike",
) -> AnyHook:
    """Go back to a kept state when a metric spikes, skipping the data since; list it after hooks with memory.

    A spike is a value above `factor` times the median of the last `window` ones (when there are so many and the median
    is positive), or the last of `nonfinite_steps` in a row that are nan or inf. The state kept last comes back with the
    `position` of now, and all that hooks remember with it; a second spike before the next is kept leads to the one
    before that. Each is a warning in the log and a metric `rollbacks`. Checkpoints of the branch left are deleted with
    the next save.

    States are kept at the start of the run and at steps divisible by `snapshot_every`, two of them, in memory only. So
    a run resumed at such a step goes on exactly, unless a spike would lead back beyond it; resumed at another one, it
    goes back to where it was resumed.

    Args:
      metric: name in `state.metrics`; steps without it do not count. Of several ranks it is the mean.
      factor: how many times the median is a spike, above 1.
      window: number of values that the median covers.
      nonfinite_steps: how many in a row; with on_nonfinite="skip" a single one did no harm.
      snapshot_every: number of steps between two kept states.
      look_every: number of steps between two looks; each waits for a GPU, and finds spikes that many steps late.
      max_rollbacks: how many there may be `within_steps`; the next one goes back and stops the run.
      within_steps: the span of `max_rollbacks`, in batches.
      on_host: keep states in host memory; False keeps them on their devices, which is faster and takes room there.
      name: unique in a run.
    Raises:
      ValueError: a number out of range, or `snapshot_every` is not divisible by `look_every`.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(params={"sum": state.params["sum"] + batch}, metrics={"loss": batch})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"sum": torch.zeros(())})
      >>> hook = rollback_on_spike(window=2, snapshot_every=2, look_every=1)
      >>> final = ft.fit(step_fn, [hook], state=state, data=iter([1.0, 1.0, 1.0, 9.0, 1.0, 1.0]), max_steps=4)
      >>> final.step, final.position, final.params["sum"]
      (4, 6, tensor(4.))

    Source: Chowdhery et al. 2022, PaLM, section 5.1, https://arxiv.org/abs/2204.02311
    """
    number("factor", factor, lambda factor: 1 < factor < math.inf, "> 1")
    window, nonfinite_steps = whole("window", window, 1), whole("nonfinite_steps", nonfinite_steps, 1)
    snapshot_every, look_every = whole("snapshot_every", snapshot_every, 1), whole("look_every", look_every, 1)
    limits = whole("max_rollbacks", max_rollbacks, 0), whole("within_steps", within_steps, 1)
    if snapshot_every % look_every:
        raise ValueError(f"snapshot_every: got {snapshot_every}, expected a multiple of look_every={look_every}")
    periods = snapshot_every, look_every
    record = RollBack(metric, factor, window, nonfinite_steps, *periods, *limits, on_host, name)
    # Another hook that goes back must not undo the count of these roll-backs, or they would never come to an end.
    declared: Any = {"makes": "metrics", "needs": [_MEMORY], "outlives": ("rollbacks",), "communicates": True}
    return resource(record, name=name, init=_start, stops=False, **declared)


@attrs.frozen
class RollBack:
    """The parameters of the hook; called, it gives the live one, which holds the kept states."""

    metric: str
    factor: float
    window: int
    nonfinite_steps: int
    snapshot_every: int
    look_every: int
    max_rollbacks: int
    within_steps: int
    on_host: bool
    name: str

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        watch = _SpikeWatch(self)
        yield hook(before_train=watch.start, after_step=watch.look)

    def judge(self, memory: Mapping[str, Any], values: list[float]) -> tuple[dict[str, Any], str | None]:
        """Return the memory after some values, and a text if one of them is a spike."""
        window, nonfinite, problem = memory["window"].tolist(), memory["nonfinite"], None
        for value in values:
            nonfinite = 0 if math.isfinite(value) else nonfinite + 1
            usual = sorted(window)[(len(window) - 1) // 2] if len(window) == self.window else 0.0
            if nonfinite >= self.nonfinite_steps:
                problem = f"{self.metric} was {value} and not finite in {nonfinite} steps in a row"
            elif not nonfinite and 0 < self.factor * usual < value:
                problem = f"{self.metric} was {value:.4g}, more than {self.factor:g} times the median {usual:.4g}"
            if problem is not None:
                break
            window = window if nonfinite else [*window, value][-self.window :]
        return {**memory, "window": _leaf(window), "nonfinite": nonfinite, "pending": []}, problem

    def recent(self, memory: Mapping[str, Any], position: int) -> list[int]:
        """Return the positions of the roll-backs that still count towards `max_rollbacks`."""
        return [at for at in memory["rollbacks"] if position - at < self.within_steps]

    def stopped(self, state: TrainState, problem: str) -> TrainState:
        """Return the state with a request to stop, as there were too many roll-backs."""
        often = f"after {self.max_rollbacks} roll-backs within {self.within_steps} batches"
        return stop(state, f"{self.name}: {problem}, {often}; this is the state of step {state.step}")


def _start(state: TrainState) -> dict[str, Any]:
    """Return the memory at the start."""
    return {"window": _leaf([]), "pending": [], "nonfinite": 0, "step": state.step, "rollbacks": []}


class _SpikeWatch:
    """What the hook holds during one run: the states to go back to."""

    def __init__(self, record: RollBack) -> None:
        self.record = record
        self.kept: list[Kept] = []

    def start(self, state: TrainState) -> TrainState | None:
        """Keep the first state; a run that was stopped for its roll-backs stops again."""
        self.keep(state)
        recent = self.record.recent(state.hooks[self.record.name], state.position)
        return self.record.stopped(state, "stopped before") if len(recent) > self.record.max_rollbacks else None

    def look(self, state: TrainState) -> TrainState | None:
        record, memory, problem = self.record, dict(state.hooks[self.record.name]), None
        if state.step <= memory["step"]:
            return None  # this step was looked at already: another hook went back
        memory["step"] = state.step
        value = metric_over_ranks(state, record.metric)
        memory["pending"] = [*memory["pending"], *([] if value is None else [value])]
        if state.step % record.look_every == 0 and memory["pending"]:
            memory, problem = record.judge(memory, to_host(memory["pending"]))
        if problem is not None:
            return self.back(state, [*record.recent(memory, state.position), state.position], problem)
        new = remember(state, record.name, memory)
        if state.step % record.snapshot_every == 0 and not memory["nonfinite"]:
            self.keep(new)
        return new

    def keep(self, state: TrainState) -> None:
        # A state of this step or a later one belongs to a branch that the run has left.
        self.kept = [one for one in self.kept if one.state.step < state.step][1 - NUM_KEPT :]
        self.kept.append(Kept.of(state, on_host=self.record.on_host))

    def back(self, state: TrainState, rollbacks: list[int], problem: str) -> TrainState:
        record = self.record
        self.kept = [one for one in self.kept if one.state.step < state.step]
        if len(self.kept) > 1 and self.kept[-1].used:
            self.kept.pop()
        if not self.kept:  # another hook went back to a step before all kept states
            return stop(state, f"{record.name}: {problem}, and there is no earlier state to go back to")
        old = self.kept[-1].restored()
        self.kept[-1].used = True
        text = "%s: %s; going back from step %d to %d, and on with batch %d"
        _log.warning(text, record.name, problem, state.step, old.step, state.position)
        metrics = {**old.metrics, ROLLBACKS: float(len(rollbacks))}
        new = state.go_back(old.replace(position=state.position, metrics=metrics))
        new = remember(new, record.name, {**new.hooks[record.name], "rollbacks": rollbacks})
        return record.stopped(new, problem) if len(rollbacks) > record.max_rollbacks else new


@attrs.define(eq=False)
class Kept:
    """A copy of a state, and the devices of its tensors before."""

    state: TrainState
    devices: list[torch.device]
    used: bool = False  # whether a roll-back led here

    @classmethod
    def of(cls, state: TrainState, *, on_host: bool) -> "Kept":
        devices = [tensor.device for tensor in tree.tensors({name: getattr(state, name) for name in _TREES})]
        return cls(_copied(state, repeat(torch.device("cpu")) if on_host else devices), devices)

    def restored(self) -> TrainState:
        """Return a copy with each tensor on its device from before."""
        return _copied(self.state, self.devices)


def _copied(state: TrainState, devices: Iterable[torch.device]) -> TrainState:
    """Copy a state, each of its tensors to a device of its own."""
    following = iter(devices)
    trees = {name: getattr(state, name) for name in _TREES}
    return state.replace(**tree.map_tensors(lambda tensor: tensor.detach().to(next(following), copy=True), trees))


def _leaf(values: list[float]) -> torch.Tensor:
    """Keep many numbers in one leaf: a step in place walks over all leaves that hooks remember."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")
