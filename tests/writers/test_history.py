"""History, the memory writer and smoothing: what is kept of a metric, and which number stands for a period."""

import math
import pickle
from statistics import fmean, median

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fntrain as ft
from fntrain import TrainState
from fntrain.events import MetricName
from fntrain.writers.history import History
from fntrain.writers.memory import Memory

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def fresh(step=0):
    return TrainState(step=step, position=step, seed=0, params={})


class Endless:
    def at(self, position):
        while True:
            yield position
            position += 1


def fit(metrics, hooks, max_steps, start=0):
    """A run whose step n reports metrics(n)."""
    step_fn = lambda state, batch: state.advance(metrics=metrics(state.step + 1))  # noqa: E731
    return ft.fit(step_fn, hooks, state=fresh(start), data=Endless(), max_steps=max_steps)


# History.


@given(NUMBERS, st.integers(1, 40))
def test_a_history_is_read_as_detectron2s(numbers, window):
    """latest, median and average of the last values, the average of all, and the values with their steps."""
    steps = tuple(range(5, 5 + len(numbers)))
    history = History(steps, tuple(numbers))
    assert history.latest() == numbers[-1]
    assert history.median(window) == pytest.approx(median(numbers[-window:]))
    assert history.average(window) == pytest.approx(fmean(numbers[-window:]), abs=1e-6)
    assert history.global_average() == history.average() == pytest.approx(fmean(numbers), abs=1e-6)
    assert history.values() == list(zip(steps, numbers, strict=True))
    assert pickle.loads(pickle.dumps(history)) == history


@pytest.mark.parametrize("numbers", [(math.nan, 1.0, 2.0), (1.0, math.nan, 2.0), (1.0, 2.0, math.nan)])
def test_nan_shows(numbers):
    """A nan anywhere in the window makes its median and average nan."""
    history = History((1, 2, 3), numbers)
    assert math.isnan(history.median())
    assert math.isnan(history.average(3))


def test_misuse_of_a_history_is_named():
    """No values, not one for each step, and an empty window are errors."""
    with pytest.raises(ValueError, match="got 0 steps and 0 values"):
        History((), ())
    with pytest.raises(ValueError, match="got 2 steps and 1 values"):
        History((1, 2), (0.5,))
    with pytest.raises(ValueError, match="window: got 0"):
        History((1,), (0.5,)).median(0)


# The memory writer.


@attrs.frozen(eq=False, repr=False)
class Unforgetting(Memory):
    """The broken twin: what was rolled back, or is done again after a resume, stays."""

    def _forget(self, step):
        pass


def law_exact(make, every, window, back_at, back_to, rolls_last):
    """A history has the values of the run as it went in the end: nothing of abandoned steps, no step twice."""
    kept, timeline, saved, taken = make(), {}, {}, iter(range(10**6))

    def follow(state):
        saved.setdefault(state.step, state)
        for step in [step for step in timeline if step >= state.step]:
            del timeline[step]
        timeline[state.step] = state.metrics["n"]

    def roll_back(state):
        rolls = state.step == back_at and state.position == back_at
        return saved[back_to].replace(position=state.position) if rolls else None

    back, write = ft.hook(after_step=roll_back), ft.hooks.write_metrics(kept, every=every, window=window)
    hooks = [ft.hook(after_step=follow), *([write, back] if rolls_last else [back, ft.hook(after_step=follow), write])]

    def metrics(step):
        count = next(taken)
        return {"n": float(count)} | ({"rare": 1.0} if count == back_at - 2 else {})  # in the first attempt only

    fit(metrics, hooks, 50)
    got = dict(kept["n"].values())
    assert list(got) == sorted(got)
    assert got.items() <= timeline.items()
    if window >= every:
        assert got == timeline
    assert ("rare" in kept) == (back_to >= back_at - 1)


ROLLS = [(20, 20, 27, 24), (20, 20, 27, 13), (7, 20, 22, 2), (1, 1, 9, 4), (20, 5, 45, 18), (5, 30, 41, 40), (20, 20, 21, 19)]  # fmt: skip


@pytest.mark.parametrize("rolls_last", [True, False])
@pytest.mark.parametrize(("every", "window", "back_at", "back_to"), ROLLS)
def test_histories_hold_the_run_as_it_went(every, window, back_at, back_to, rolls_last):
    """Also after a roll-back: values of abandoned steps are gone, and every step that was read is there once."""
    law_exact(ft.writers.memory, every, window, back_at, back_to, rolls_last)


def test_law_exact_can_fail():
    """A memory that forgets nothing is refused."""
    with pytest.raises(AssertionError):
        law_exact(Unforgetting, 20, 20, 27, 13, True)


@settings(max_examples=25)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 60))
def test_gathered_are_the_windows_of_the_writes(every, window, max_steps):
    """A history has the last `window` steps of every write, those and no others."""
    kept = ft.writers.memory()
    fit(lambda step: {"loss": float(step)}, [ft.hooks.write_metrics(kept, every=every, window=window)], max_steps)
    writes = {*range(every, max_steps + 1, every), max_steps}
    gathered = sorted({step for write in writes for step in range(max(write - window, 0) + 1, write + 1)})
    assert kept["loss"].values() == [(step, float(step)) for step in gathered]


def law_resumed(make):
    kept = make()
    hooks = [ft.hooks.evaluate(lambda state: {"n": 1.0}, every=9), ft.hooks.write_metrics(kept, every=10)]
    first, second = (lambda step: {"loss": float(step)}), (lambda step: {"loss": -float(step)})
    fit(first, hooks, 25)
    fit(second, hooks, 40, start=15)
    assert kept["loss"].values() == [(s, float(s if s <= 15 else -s)) for s in range(1, 41)]
    assert kept["eval/n"].steps == (9, 18, 27, 36, 40)
    assert [row.step for row in kept.rows] == [9, 10, 18, 20, 27, 30, 36, 40]
    fit(second, hooks, 2)
    assert kept["loss"].values() == [(1, -1.0), (2, -2.0)]


def test_a_resumed_run_goes_on_in_its_histories():
    """Steps after the start are those of the new run; a run from step 0 begins with nothing."""
    law_resumed(ft.writers.memory)
    with pytest.raises(AssertionError):
        law_resumed(Unforgetting)


def test_memory_is_a_writer_that_can_be_looked_at():
    """It lists the names it has, says which there are when asked for another, and keeps rows as others get them."""
    kept = ft.writers.memory()
    assert list(kept) == []
    assert repr(kept) == "memory()"
    assert kept == kept
    assert kept != ft.writers.memory()
    fit(lambda step: {"loss": step, "lr": 0.1}, [ft.hooks.write_metrics([kept], every=4)], 8)
    assert list(kept) == ["loss", "lr"]
    assert "loss" in kept and "los" not in kept
    assert repr(kept) == "memory(loss, lr)"
    assert [(row.step, row.scalars["loss"]) for row in kept.rows] == [(4, 2.5), (8, 4.5)]
    with pytest.raises(KeyError, match=r"los: no such metric was written; there are loss, lr"):
        kept["los"]


def test_what_is_shown_is_read_off_the_history():
    """The number in a row is the median of the history's last `window` values, at every write."""
    kept = ft.writers.memory()
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    fit(lambda step: {"loss": values[step - 1]}, [ft.hooks.write_metrics(kept, every=7, window=12)], 60)
    for row in kept.rows:
        until = History(*zip(*[pair for pair in kept["loss"].values() if pair[0] <= row.step], strict=True))
        assert row.scalars["loss"] == until.median(12)


# Smoothing.


def shown(smoothing, metrics, *, every=4, window=3, max_steps=10, hooks=()):
    kept = ft.writers.memory()
    fit(metrics, [*hooks, ft.hooks.write_metrics(kept, every=every, window=window, smoothing=smoothing)], max_steps)
    return kept


SQUARES = {
    "median": [(4, 9.0), (8, 49.0), (10, 81.0)],
    "mean": [(4, (4 + 9 + 16) / 3), (8, (36 + 49 + 64) / 3), (10, (64 + 81 + 100) / 3)],
    "latest": [(4, 16.0), (8, 64.0), (10, 100.0)],
    "global_mean": [(4, 30 / 4), (8, 204 / 8), (10, 385 / 10)],
}


@pytest.mark.parametrize("as_tensor", [float, torch.tensor])
@pytest.mark.parametrize("kind", SQUARES)
def test_smoothing_says_which_number_stands_for_a_period(kind, as_tensor):
    """The median or mean of the window, the latest value, or the mean of all steps so far, wherever the window ends."""
    squares = lambda step: {"x": as_tensor(float(step**2))}  # noqa: E731
    for smoothing in (kind, {"x": kind}, {"y": "latest", "?": kind, "*": "median"}):
        kept = shown(smoothing, squares)
        assert [(row.step, row.scalars["x"]) for row in kept.rows] == [
            (step, pytest.approx(number)) for step, number in SQUARES[kind]
        ]
    assert [row.scalars["x"] for row in shown("median", squares).rows] == [9.0, 49.0, 81.0]


def test_what_a_metric_says_of_itself_stays():
    """smooth= of put_scalar, counts, and evaluations are as before; a dict by name overrides all but evaluations."""
    latest, total = MetricName("head/lr", smooth="latest"), MetricName("count", smooth="sum")
    metrics = lambda step: {"head/loss": float(step), latest: float(step), total: 1.0}  # noqa: E731
    evaluate = ft.hooks.evaluate(lambda state: {"n": float(state.step)}, every=3)
    [first, *_] = [row for row in shown("mean", metrics, hooks=[evaluate]).rows if row.step == 4]
    assert first.scalars == {"head/loss": 3.0, "head/lr": 4.0, "count": 4.0}
    kept = shown({"head/*": "mean", "*": "latest"}, metrics, hooks=[evaluate])
    [first, *_] = [row for row in kept.rows if row.step == 4]
    assert first.scalars == {"head/loss": 3.0, "head/lr": 3.0, "count": 1.0}
    assert kept["eval/n"].values() == [(3, 3.0), (6, 6.0), (9, 9.0), (10, 10.0)]


@pytest.mark.parametrize("back_to", [3, 5, 6])
def test_a_roll_back_takes_its_values_out_of_the_mean_of_all(back_to):
    """global_mean is the mean over the steps of the run as it went, also if a write came between."""
    saved = {}

    def back(state):
        saved.setdefault(state.step, state)
        return saved[back_to].replace(position=state.position) if state.position == 7 else None

    kept, bad = ft.writers.memory(), lambda state: 100.0 if back_to < state.position < 7 else float(state.step)
    step_fn = lambda state, batch: state.advance(metrics={"x": bad(state.advance())})  # noqa: E731
    write = ft.hooks.write_metrics(kept, every=5, smoothing="global_mean")
    ft.fit(step_fn, [write, ft.hook(after_step=back)], state=fresh(), data=Endless(), max_steps=10)
    assert kept.rows[-1].scalars["x"] == pytest.approx(5.5)
    assert kept["x"].values() == [(step, float(step)) for step in range(1, 11)]


@pytest.mark.parametrize("smoothing", ["average", {"loss": "max"}, None])
def test_an_unknown_smoothing_is_refused_when_built(smoothing):
    """The error lists those that there are."""
    with pytest.raises(ValueError, match="smoothing: got .* expected one of median, mean, latest, global_mean"):
        ft.hooks.write_metrics((), smoothing=smoothing)


def test_write_metrics_is_a_value():
    """The hook with a dict of smoothings compares, prints and pickles."""
    hook = ft.hooks.write_metrics(ft.writers.console(), smoothing={"lr": "latest"})
    assert (
        pickle.loads(pickle.dumps(hook))
        == hook
        == ft.hooks.write_metrics(ft.writers.console(), smoothing={"lr": "latest"})
    )
    assert hook != ft.hooks.write_metrics(ft.writers.console())
    assert "smoothing={'lr': 'latest'}" in repr(hook)
