"""The algebra of hooks: laws by == and by what runs."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import COUNTS, GATES, HOOKS, A, B, even, note_a
from torch import nn

import fntrain as ft
from fntrain.core.hook import flatten


def log_of(hook, steps=12):
    """Which callbacks ran at which step."""
    singles = ft.compose(hook)
    start = ft.TrainState(step=0, position=0, seed=0, params={}, extra={"log": ()})
    final = ft.fit(lambda s, b: s.advance(metrics={}), [singles], state=start, data=range(steps), max_steps=steps)
    return final.extra["log"]


@given(HOOKS, HOOKS, HOOKS)
def test_compose_is_a_monoid(a, b, c):
    """compose is associative with identity as neutral element, by ==."""
    assert ft.compose(a, ft.compose(b, c)) == ft.compose(ft.compose(a, b), c)
    assert ft.compose(a, ft.identity) == ft.compose(ft.identity, a) == ft.compose(a)
    assert ft.compose() == ft.identity


@given(COUNTS, COUNTS, HOOKS)
def test_every_of_every_is_every_lcm(a, b, hook):
    """Nested periods merge to their least common multiple."""
    import math

    assert ft.every(a, ft.every(b, hook)) == ft.every(math.lcm(a, b), hook)
    assert ft.every(1, hook) == ft.compose(hook)


@given(GATES, HOOKS, HOOKS)
def test_gates_distribute_over_compose(gate, a, b):
    """Gating a composition is composing the gated."""
    assert gate(ft.compose(a, b)) == ft.compose(gate(a), gate(b))
    assert gate(ft.identity) == ft.identity


@given(GATES, GATES, st.sampled_from([A, B]))
def test_gates_commute(f, g, hook):
    """The order in which different gates are put around a hook does not matter."""
    assert f(g(hook)) == g(f(hook))


@given(GATES, HOOKS)
def test_gates_are_idempotent_but_for_when(gate, hook):
    """Gating twice with the same gate is gating once (a predicate is asked twice, with the same answer)."""
    once, twice = gate(hook), gate(gate(hook))
    if not any(getattr(single, "predicates", ()) for single in flatten(once)):
        assert once == twice


@given(HOOKS)
def test_hooks_print_compare_and_pickle(hook):
    """Every hook made of plain functions survives repr, equality and pickle."""
    assert pickle.loads(pickle.dumps(hook)) == hook
    assert repr(hook) == repr(pickle.loads(pickle.dumps(hook)))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 6))
def test_gates_run_at_the_steps_they_say(n, a, length):
    """every, between and at_end fire exactly where arithmetic says."""
    fired = log_of(ft.every(n, ft.between(a, a + length, A)))
    assert fired == tuple(f"a{s}" for s in range(1, 13) if s % n == 0 and a <= s <= a + length)
    ended = log_of(ft.at_end(ft.every(n, A)))
    assert ended == tuple(f"a{s}" for s in range(1, 13) if s % n == 0 or s == 12)


def test_before_step_sees_the_number_of_the_coming_step():
    """A gate compares step + 1 before a step and step after it, so both callbacks run for the same step."""
    assert log_of(ft.every(5, B)) == ("b4", "b5", "b9", "b10")


def test_when_is_asked_for_each_hook_on_its_own():
    """The second hook of a composition sees what the first returned."""
    flip = ft.hook(after_step=lambda s: s.replace(extra={"log": s.extra["log"], "on": False}))
    look = ft.hook(after_step=note_a)
    state = ft.TrainState(step=0, position=0, seed=0, params={}, extra={"log": (), "on": True})
    hooks = ft.when(lambda s: s.extra["on"], ft.compose(flip, look))
    final = ft.fit(lambda s, b: s.advance(), [hooks], state=state, data=range(3), max_steps=3)
    assert final.extra["log"] == ()


def test_at_end_does_not_run_after_an_error_or_an_empty_run():
    """A broken state is not evaluated, and a run that had nothing to do has nothing to finish."""
    log = []
    hook = ft.at_end(ft.every(100, ft.hook(after_step=lambda s: log.append(s.step))))
    start = ft.TrainState(step=2, position=2, seed=0, params={})
    ft.fit(lambda s, b: s.advance(), [hook], state=start, data=iter(()), max_steps=2)
    with pytest.raises(ZeroDivisionError):
        ft.fit(lambda s, b: s.advance(metrics={"x": 1 / 0}), [hook], state=start, data=iter("a"), max_steps=3)
    assert log == []


def test_hooks_that_communicate_may_be_gated_by_the_step_only():
    """on_main or when around a collective would leave ranks waiting: refused when built."""
    collective = ft.hook(after_step=note_a, name="early_stopping", communicates=True)
    ft.every(2, ft.first(9, collective))
    with pytest.raises(ValueError, match="on_main: .*early_stopping.* communicates between ranks"):
        ft.on_main(ft.compose(A, collective))
    with pytest.raises(ValueError, match="when: .*early_stopping.* communicates between ranks"):
        ft.when(even, collective)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ft.every(0, A), ValueError, "every: got 0"),
        (lambda: ft.every(2.0, A), ValueError, "every: got 2.0"),
        (lambda: ft.first(-1, A), ValueError, "first: got -1"),
        (lambda: ft.between(5, 2, A), ValueError, "between: got 5 to 2"),
        (lambda: ft.when(True, A), TypeError, "predicate: got bool"),
        (lambda: ft.hook(after_step=3), TypeError, "after_step: got int"),
        (lambda: ft.every(2, print), TypeError, "hooks: got builtin_function_or_method"),
        (lambda: ft.stateful("", 0), ValueError, "name: got ''"),
        (lambda: ft.hooks.checkpoint("x", every=0), ValueError, "every: got 0"),
        (lambda: ft.hooks.checkpoint("x", every=1, keep_last=0), ValueError, "keep_last: got 0"),
        (lambda: ft.hooks.evaluate(3, every=1), TypeError, "fn: got int"),
        (lambda: ft.hooks.write_metrics((), every=0), ValueError, "every: got 0"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(call, error, message):
    """Every wrong argument is an error when the hook is built."""
    with pytest.raises(error, match=message):
        call()


def test_of_the_standard_hooks_only_two_may_stop_one_rank_alone():
    """The others never ask to stop, or decide on what all ranks have: these spare a message after each step."""
    never = [
        ft.hooks.best_checkpoint("runs", "x", mode="max"),
        ft.hooks.check_replicas(every=1),
        ft.hooks.checkpoint("runs", every=1),
        ft.hooks.early_stopping("x", mode="max", patience=1),
        ft.hooks.ema(0.9),
        ft.hooks.evaluate(dict, every=1),
        ft.hooks.iteration_timer(),
        ft.hooks.memory_stats(every=1),
        ft.hooks.precise_bn(nn.BatchNorm1d(1), [], every=1),
        ft.hooks.reduce_lr_on_plateau("x", mode="max", patience=1),
        ft.hooks.rollback_on_spike("x"),
        ft.hooks.timed(ft.hooks.iteration_timer()),
        ft.hooks.write_metrics(ft.writers.memory()),
    ]
    on_main = [ft.hooks.profile("runs", when=bool), ft.hooks.progress_bar()]
    assert [one for one in flatten(never) if one.stops] == []
    assert all(one.main for one in flatten(on_main))
    may = [ft.hooks.on_signal(), ft.hooks.stop_when(bool, "it"), ft.hook(after_step=print)]
    assert all(one.stops for one in flatten(may))
    known = {*ft.hooks.__all__} - {"averaged", "keep_best", "stop_when", "on_signal", "profile", "progress_bar"}
    assert len(never) == len(known)
