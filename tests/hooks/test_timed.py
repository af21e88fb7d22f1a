"""iteration_timer's last line and hooks.timed: what a run and its hooks took, told by a clock that the test moves."""

import logging
import pickle
import re
import signal
import sys
from contextlib import contextmanager

import attrs
import pytest
import torch
from hypothesis import assume, given, settings
from strategies import HOOKS, A, B

import fntrain as ft
from fntrain import TrainState
from fntrain.core.hook import UNGATED, Hook, flatten


class Clock:
    """Stands in for `time`: it moves only when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for name in ("timer", "timed"):
        monkeypatch.setattr(sys.modules[f"fntrain.hooks.{name}"], "time", made)
    return made


@pytest.fixture
def lines(caplog):
    """What the library has logged so far."""
    caplog.set_level(logging.INFO, "fntrain")
    return lambda: [record.getMessage() for record in caplog.records]


def fresh(step=0, **fields):
    return TrainState(step=step, position=step, seed=0, params={}, **fields)


class Slow:
    """Data that takes its time, and ends if told to."""

    def __init__(self, clock, seconds, end=None):
        self.clock, self.seconds, self.end = clock, seconds, end

    def at(self, position):
        while self.end is None or position < self.end:
            self.clock.sleep(self.seconds)
            yield position
            position += 1


def slow_step(clock, seconds, fails_at=None):
    def step_fn(state, batch):
        clock.sleep(seconds(state.step + 1) if callable(seconds) else seconds)
        if state.step + 1 == fails_at:
            raise ArithmeticError
        return state.advance(metrics={})

    return step_fn


def slow_hook(clock, seconds, after=0.0):
    return ft.hook(
        after_step=lambda state: clock.sleep(seconds), after_train=lambda state: clock.sleep(after), name="slow"
    )


# iteration_timer.


def law_summary(timer, clock, lines):
    """Of 53 steps the first three, 10 s each, are left out; a step takes 0.2 s, its data 0.04 s, hooks 0.04 s."""
    step_fn = slow_step(clock, lambda step: 10.0 if step <= 3 else 0.2)
    ft.fit(
        step_fn, [timer(warmup_steps=3), slow_hook(clock, 0.04)], state=fresh(), data=Slow(clock, 0.04), max_steps=53
    )
    assert lines() == ["50 steps in 0:00:12 (0.24 s / step); total 0:00:14, 0:00:02 in hooks"]


def test_one_line_sums_up_the_steps_after_the_warm_up(clock, lines):
    """IterationTimer: time per step without hooks and in all, the first steps not counted."""
    law_summary(ft.hooks.iteration_timer, clock, lines)


def test_law_summary_can_fail(clock, lines):
    """Counting the warm-up too is refused."""
    with pytest.raises(AssertionError):
        law_summary(lambda warmup_steps: ft.hooks.iteration_timer(warmup_steps=0), clock, lines)


@pytest.mark.parametrize(("num_steps", "warmup_steps", "told"), [(3, 3, 0), (2, 3, 0), (0, 0, 0), (1, 0, 1), (4, 3, 1)])
def test_a_run_of_warm_up_steps_alone_has_no_line(clock, lines, num_steps, warmup_steps, told):
    """There is nothing to sum up."""
    timer = ft.hooks.iteration_timer(warmup_steps=warmup_steps)
    ft.fit(slow_step(clock, 2.0), [timer], state=fresh(), data=Slow(clock, 0), max_steps=num_steps)
    assert lines() == ["1 steps in 0:00:02 (2 s / step); total 0:00:02, 0:00:00 in hooks"] * told


def test_a_resumed_run_counts_its_own_steps(clock, lines):
    """Resumed at step 100, ten steps are ten steps."""
    hooks = [ft.hooks.iteration_timer(warmup_steps=2), slow_hook(clock, 1.0)]
    ft.fit(slow_step(clock, 3.0), hooks, state=fresh(100), data=Slow(clock, 0), max_steps=112)
    assert lines() == ["10 steps in 0:00:30 (3 s / step); total 0:00:40, 0:00:10 in hooks"]


def test_what_hooks_do_at_the_end_is_in_the_line(clock, lines):
    """The last evaluation, the last save and the closing of files belong to the hooks' time."""

    @contextmanager
    def opened():
        yield ft.hook()
        clock.sleep(7.0)

    hooks = [
        ft.hooks.iteration_timer(warmup_steps=0),
        slow_hook(clock, 0.0, after=5.0),
        ft.resource(opened, name="file"),
    ]
    ft.fit(slow_step(clock, 3.0), hooks, state=fresh(), data=Slow(clock, 0), max_steps=10)
    assert lines() == ["10 steps in 0:00:30 (3 s / step); total 0:00:42, 0:00:12 in hooks"]


@pytest.mark.parametrize("how", ["stop", "raise", "hook raises", "leave", "data ends", "data raises"])
def test_the_line_is_there_however_the_run_ends(clock, lines, how):
    """Stopped, raised or left, the completed steps are summed up; a step that raised is nobody's time."""
    stopping = ft.hook(after_step=lambda state: ft.stop(state, "enough") if state.step == 10 else None)
    failing = ft.hook(after_step=lambda state: [][state.step == 10] if state.step == 10 else None)
    hooks = [ft.hooks.iteration_timer(warmup_steps=0), slow_hook(clock, 1.0, after=2.0)]
    hooks += [stopping] if how == "stop" else [failing] if how == "hook raises" else []
    step_fn = slow_step(clock, 3.0, fails_at=11 if how == "raise" else None)
    data = Slow(clock, 0.0, end=10 if how.startswith("data") else None)
    run = ft.states(step_fn, hooks, state=fresh(), data=data, max_steps=None if how == "data ends" else 50)
    try:
        for state in run:
            if how == "leave" and state.step == 10:
                break
    except (ArithmeticError, IndexError, ft.DataExhaustedError):
        assert how in ("raise", "hook raises", "data raises")
    run.close()
    in_hooks = 10 if how == "raise" else 12
    assert lines() == [f"10 steps in 0:00:30 (3 s / step); total 0:00:{30 + in_hooks}, 0:00:{in_hooks} in hooks"]


def test_a_timer_is_a_value_and_checks_its_warm_up():
    """It compares, prints and pickles; a negative warm-up is refused."""
    timer = ft.hooks.iteration_timer(warmup_steps=5)
    assert pickle.loads(pickle.dumps(timer)) == timer != ft.hooks.iteration_timer()
    assert repr(timer) == "IterationTimer(warmup_steps=5)"
    with pytest.raises(ValueError, match="warmup_steps: got -1"):
        ft.hooks.iteration_timer(warmup_steps=-1)


# timed.


def run(hooks, steps=12):
    start = fresh(extra={"log": ()})
    return ft.fit(lambda s, b: s.advance(metrics={"n": 1.0}), hooks, state=start, data=range(steps), max_steps=steps)


def law_same_run(timed, hook):
    """The same callbacks in the same order: the final states, which have the log of them, are bitwise equal."""
    plain, with_times = run([hook]), run([timed(hook)])
    assert plain == with_times
    assert plain.metrics == with_times.metrics
    names = lambda hooks: [single.name for single in flatten(hooks)]  # noqa: E731
    assert names(timed(hook))[1:] == names(hook)


@settings(max_examples=60)
@given(HOOKS)
def test_timing_changes_nothing(hook):
    """Gated, composed or plain: a run with times is bitwise the run without."""
    names = [single.name for single in flatten(hook)]
    assume(len(set(names)) == len(names) and not any(getattr(single, "main", False) for single in flatten(hook)))
    law_same_run(ft.hooks.timed, hook)


def test_law_same_run_can_fail():
    """One that turns the order around, and one that runs hooks outside of their gates, are refused."""
    with pytest.raises(AssertionError):
        law_same_run(lambda hook: ft.hooks.timed(ft.compose(*reversed(flatten(hook)))), ft.compose(A, B))
    ungated = lambda hook: ft.hooks.timed([attrs.evolve(single, **UNGATED) for single in flatten(hook)])  # noqa: E731
    with pytest.raises(AssertionError):
        law_same_run(ungated, ft.every(2, A))


def count(state):
    return ft.remember(state, "count", state.hooks["count"] + 1)


def stop_at_seven(state):
    return ft.stop(state, "seven") if state.step == 7 else None


def standard(directory):
    """Hooks of every kind: with memory, gated, with resources, with data to watch, that save and that stop."""
    return [
        ft.hooks.iteration_timer(),
        ft.hooks.evaluate(lambda state: {"n": float(state.step)}, every=3),
        ft.stateful("count", 0, after_step=count),
        ft.hooks.best_checkpoint(directory / "best", "eval/n", mode="max"),
        ft.hooks.write_metrics(ft.writers.jsonl(directory / "metrics.jsonl"), every=2),
        ft.hooks.checkpoint(directory / "last", every=2),
        ft.every(2, ft.hook(after_step=stop_at_seven, name="never")),
        ft.first(9, ft.hook(after_step=stop_at_seven)),
    ]


def test_standard_hooks_work_timed(tmp_path, lines):
    """States, files and the end of the run are those without times, and resume finds the memory of hooks."""
    plain, with_times = run(standard(tmp_path / "a")), run([ft.hooks.timed(standard(tmp_path / "b"))])
    assert plain == with_times
    assert with_times.run.stop == plain.run.stop
    assert with_times.hooks["count"] == 7
    for name in ("best", "last"):
        paths = [sorted(p.name for p in (tmp_path / where / name).glob("step_*")) for where in "ab"]
        assert paths[0] == paths[1] != []
    seen = [(tmp_path / where / "metrics.jsonl").read_text().count('"eval/n"') for where in "ab"]
    assert seen[0] == seen[1] == 3
    resumed = ft.resume_or(fresh(extra={"log": ()}), tmp_path / "b" / "last")
    assert resumed.hooks["count"] == 7
    told = lines()[-8:]
    assert [line.split(":")[0] for line in told if "evaluate" in line] == ["evaluate"]
    assert any(re.match(r"hook\(after_step=stop_at_seven\) \(7\): ", line) for line in told)


def test_every_hook_gets_a_line_the_dearest_first(clock, lines):
    """Calls, mean, max and total of every phase in seconds, sorted by what the hook took in all."""
    costs = iter([1.0, 4.0, 1.0, 2.0])
    hooks = [
        ft.hook(after_step=lambda state: clock.sleep(0.5), name="cheap"),
        ft.every(
            2,
            ft.hook(
                before_step=lambda s: clock.sleep(0.25), after_step=lambda s: clock.sleep(next(costs)), name="dear"
            ),
        ),
        ft.every(100, ft.hook(after_step=print, name="idle")),
    ]
    run([ft.hooks.timed(hooks)], steps=8)
    assert lines() == [
        "dear: 9 s in all; before_step 4 x, mean 0.25, max 0.25, total 1; after_step 4 x, mean 2, max 4, total 8",
        "cheap: 4 s in all; after_step 8 x, mean 0.5, max 0.5, total 4",
    ]


def test_resources_are_billed_for_opening_and_closing(clock, lines):
    """A hook that holds a file, or wraps the data, is timed inside and around."""

    @contextmanager
    def opened():
        clock.sleep(1.0)
        yield ft.hook(after_step=lambda state: clock.sleep(2.0), after_train=lambda state: clock.sleep(3.0))
        clock.sleep(4.0)

    run([ft.hooks.timed(ft.resource(opened, name="file"))], steps=2)
    expected = "open 1 x, mean 1, max 1, total 1; after_step 2 x, mean 2, max 2, total 4; "
    expected += "after_train 1 x, mean 3, max 3, total 3; close 1 x, mean 4, max 4, total 4"
    assert lines() == [f"file: 12 s in all; {expected}"]


@pytest.mark.parametrize("where", ["step", "hook", "open", "close"])
def test_errors_are_those_without_times(lines, where):
    """The same error reaches the caller, every resource learns of it once, and the lines are told."""
    learned = []

    @contextmanager
    def opened():
        if where == "open":
            raise ArithmeticError("open")
        try:
            yield ft.hook(after_step=lambda state: 1 / 0 if where == "hook" else None)
        except BaseException as error:
            learned.append(type(error).__name__)
            raise
        if where == "close":
            raise ArithmeticError("close")

    step_fn = slow_step(Clock(), 0.0, fails_at=3 if where == "step" else None)
    messages, file = [], ft.resource(opened, name="file")
    for hook in (file, ft.hooks.timed(file)):
        with pytest.raises(ArithmeticError) as caught:
            ft.fit(step_fn, [hook], state=fresh(), data=range(9), max_steps=4)
        messages.append(
            (str(caught.value), [note.split(", at")[-1] for note in getattr(caught.value, "__notes__", [])])
        )
    assert messages[0] == messages[1]
    assert learned == {"step": ["ArithmeticError"] * 2, "hook": ["ZeroDivisionError"] * 2}.get(where, [])
    assert [f" {where if where == 'open' else 'close'} 1 x" in line for line in lines()] == [True]


def test_the_memory_of_times_is_of_one_run(clock, lines):
    """Used in two runs, the hook tells of each; between them the value holds nothing."""
    hook = ft.hooks.timed(ft.hook(after_step=lambda state: clock.sleep(1.0), name="h"))
    for steps in (2, 3):
        run([hook], steps)
        assert not flatten(hook)[0].open.phases
    assert [line.partition(" x")[0] for line in lines()] == [
        "h: 2 s in all; after_step 2",
        "h: 3 s in all; after_step 3",
    ]


@given(HOOKS)
def test_timed_hooks_print_compare_and_pickle(hook):
    """A timed hook is a record as the hook in it is."""
    hook = ft.hooks.timed(hook)
    assert ft.hooks.timed(hook) == ft.hooks.timed(hook)
    again = pickle.loads(pickle.dumps(hook))
    assert again == hook
    assert repr(again) == repr(hook)
    shared = {id(s.open) for s in flatten(again) if isinstance(s, Hook) and s.name == "timed"}
    assert all(id(cb.spent) in shared for s in flatten(again) if isinstance(s, Hook) and (cb := s.after_step))


def test_timed_hooks_differ_and_nothing_stays_nothing():
    """Two timed hooks are equal when the hooks are; timing no hook gives no hook; two in one run need two names."""
    assert ft.hooks.timed(A) != ft.hooks.timed(B)
    assert ft.hooks.timed(A) != A
    assert ft.hooks.timed([]) == ft.identity == ft.hooks.timed(ft.identity)
    assert "timed(note_a)" in repr(ft.hooks.timed(A))
    with pytest.raises(ValueError, match="two hooks are named timed"):
        run([ft.hooks.timed(A), ft.hooks.timed(B)])
    run([ft.hooks.timed(A), ft.hooks.timed(B, name="others")])
    with pytest.raises(TypeError, match="hooks: got int"):
        ft.hooks.timed(3)


def test_order_is_checked_as_without_times():
    """What a hook declares (memory, saving, reporting, a place on rank 0) is still known."""
    late = ft.stateful("late", 0, after_step=lambda s: None)
    saver = ft.hook(name="saver", needs=[ft.Needs("memory", "would save that memory one step old")])
    with pytest.raises(ValueError, match="'late' has memory and is listed after 'saver'"):
        run([ft.hooks.timed([saver, late])])
    changing = ft.on_main(ft.hook(after_step=lambda s: s.replace(extra={})))
    with pytest.raises(ValueError, match="on one rank only metrics may change"):
        run([ft.hooks.timed(changing)])
    assert torch.is_tensor(run([ft.hooks.timed(ft.hooks.memory_stats())]).metrics["memory/peak_rss"]) is False


def test_a_signal_ends_a_timed_run_as_any_other():
    """on_signal exits from its closing; timed, it still does, with its status."""

    def step_fn(state, batch):
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return state.advance(metrics={})

    for hook in (ft.hooks.on_signal(), ft.hooks.timed(ft.hooks.on_signal())):
        with pytest.raises(SystemExit) as caught:
            ft.fit(step_fn, [hook], state=fresh(), data=range(9), max_steps=5)
        assert caught.value.code == 143
