"""early_stopping and stop_when: they stop at the right step, say why, and resume as if they had never been stopped."""

import copy
import logging
import math
import pickle

import pytest
import torch
from cases import batches, make, square_loss
from hypothesis import given, settings
from hypothesis import strategies as st

import fntrain as ft
from fntrain.testing import assert_resume_exact

early_stopping, stop_when = ft.hooks.early_stopping, ft.hooks.stop_when


def report(state, batch):
    """A step that reports its batch as `score`, or nothing if it is None."""
    return state.advance(metrics={} if batch is None else {"score": batch})


class Scores:
    """Data that can start anywhere."""

    def __init__(self, values):
        self.values = values

    def at(self, position):
        return iter(self.values[position:])


def start(**fields):
    return ft.TrainState(**{"step": 0, "position": 0, "seed": 0, "params": {}} | fields)


def run(hooks, scores, state=None):
    return ft.fit(report, hooks, state=state or start(), data=Scores(scores), max_steps=len(scores))


def by_hand(scores, mode, patience, min_delta):
    """(step at which to stop, best, its step), written out."""
    best = at = None
    waited = 0
    for step, score in enumerate(scores, 1):
        if score is None:
            continue
        gain = None if best is None else (score - best if mode == "max" else best - score)
        if math.isfinite(score) and (gain is None or gain > min_delta):
            best, at, waited = score, step, 0
        else:
            waited += 1
        if waited == patience:
            return step, best, at
    return len(scores), best, at


SCORES = st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float), st.sampled_from([math.nan, math.inf, -math.inf])))


@settings(max_examples=150, deadline=None)
@given(SCORES, st.sampled_from(["max", "min"]), st.integers(1, 4), st.sampled_from([0.0, 1.0]), st.integers(0, 30))
def test_it_stops_where_the_rule_says_whatever_was_interrupted(scores, mode, patience, min_delta, cut):
    """Reports alone count, nan and inf are never best; a run cut in two anywhere ends with the same bits."""
    hook = early_stopping("score", mode=mode, patience=patience, min_delta=min_delta)
    final = run([hook], scores)
    step, best, at = by_hand(scores, mode, patience, min_delta)
    assert (final.step, final.hooks["early_stopping"]["best"], final.hooks["early_stopping"]["step"]) == (
        step,
        best,
        at,
    )
    half = ft.fit(report, [hook], state=start(), data=Scores(scores), max_steps=min(cut, len(scores)))
    again = run([hook], scores, half)
    assert again == final
    assert (again.run.stop == final.run.stop) or final.step == half.step


def test_the_reason_says_metric_best_and_step():
    """What stopped the run can be read from its end."""
    hook = early_stopping("score", mode="max", patience=2, min_delta=0.05)
    final = run([hook], [0.5, None, 0.9, 0.9, None, 0.94, 1.0])
    reason = "early_stopping: score has not got better in 2 reports than 0.9 at step 3"
    assert (final.step, final.run.stop) == (6, ft.Stop("requested", reason))
    never = run([early_stopping("score", mode="max", patience=2)], [math.nan, math.inf, 1.0])
    assert never.run.stop.reason.endswith("score has not got better in 2 reports: it was never a finite number")


def test_a_stopped_run_goes_on_with_more_patience(tmp_path):
    """Resumed as it was it stops at once and makes no step; with more patience it goes on counting."""
    scores = [1.0, 2.0, 2.0, 2.0, 2.0, 0.5]
    saving = ft.hooks.checkpoint(tmp_path, every=1)
    first = run([early_stopping("score", mode="min", patience=2), saving], scores)
    assert first.step == 3
    resumed = ft.resume_or(start(), tmp_path)
    same = run([early_stopping("score", mode="min", patience=2)], scores, resumed)
    assert same == first and same.run.stop == first.run.stop
    more = [early_stopping("score", mode="min", patience=4)]
    assert run(more, scores, resumed) == run(more, scores)
    assert run(more, scores).step == 5


def job(hook):
    def build():
        model, sgd = make("dropout"), ft.optimizer(torch.optim.SGD, lr=0.5)
        return {
            "step_fn": ft.supervised_step(model, square_loss, sgd),
            "hooks": [hook()],
            "state": ft.init_state(model, sgd),
            "data": ft.data.stream(torch.cat(batches("dropout", 3)), 4, seed=0),
        }

    return build


def test_resume_is_exact_and_the_law_refuses_a_count_outside_the_state():
    """A run resumed at any step stops at the same one; a hook that counts in itself stops later."""
    final = assert_resume_exact(job(lambda: early_stopping("loss", mode="min", patience=1)), num_steps=12)
    assert 2 <= final.step < 12

    def forgetful():
        losses = []

        def after_step(state):
            losses.append(state.metrics["loss"])
            return ft.stop(state, "enough") if len(losses) == 5 else None

        return ft.hook(after_step=after_step)

    with pytest.raises(AssertionError, match="resumed at step 1, the run ends differently"):
        assert_resume_exact(job(forgetful), num_steps=12, at=[1])


def test_it_stops_on_what_evaluate_reports():
    """Listed after evaluate it counts evaluations; the one at the end alone is not counted."""
    values = iter([1.0, 2.0, 3.0, 9.0])
    evaluate = ft.hooks.evaluate(lambda state: {"x": next(values)}, every=4)
    final = run([evaluate, early_stopping("eval/x", mode="min", patience=2)], [None] * 14)
    assert (final.step, next(values)) == (12, 9.0)  # the stop came with a regular evaluation: no second one
    once = ft.hooks.evaluate(lambda state: {"x": 1.0}, every=4)
    final = run([once, early_stopping("eval/x", mode="min", patience=1)], [None] * 6)
    assert final.metrics["eval/x"] == 1.0
    assert final.hooks["early_stopping"] == {"best": 1.0, "step": 4, "waited": 0}


def test_a_metric_that_never_came_is_told(caplog):
    """Misspelt, or reported by a hook listed later: without a word the run would never stop early."""
    hook = early_stopping("scroe", mode="min", patience=1)
    with caplog.at_level(logging.WARNING, "fntrain"):
        run([hook], [1.0])
    assert [record.getMessage() for record in caplog.records] == [
        "early_stopping: saw no 'scroe'; list it after the hook that reports it"
    ]
    caplog.clear()
    run([early_stopping("score", mode="min", patience=1)], [1.0])
    run([hook], [])
    with pytest.raises(ZeroDivisionError):
        ft.fit(lambda s, b: 1 / 0, [hook], state=start(), data=[1], max_steps=1)
    assert caplog.records == []


def test_a_gate_says_when_to_look():
    """Under every(n) only those steps are looked at."""
    final = run([ft.every(3, early_stopping("score", mode="min", patience=1))], [1.0, 9.0, 5.0, 0.0, 0.0, 6.0, 1.0])
    assert final.step == 6


def test_stop_when_stops_once_and_the_step_is_finished():
    """The first step at which it holds is the last; hooks after it still run; tensors will do."""
    log = []
    hooks = [stop_when(lambda s: s.metrics["score"] > 2, "found"), ft.hook(after_step=lambda s: log.append(s.step))]
    final = run(hooks, [torch.tensor(1.0), torch.tensor(3.0), torch.tensor(4.0)])
    assert (final.step, final.run.stop, log) == (2, ft.Stop("requested", "found"), [1, 2])


@pytest.mark.parametrize("early", [0, 1])
def test_a_later_hook_neither_clears_nor_replaces_a_stop(early):
    """Two that stop at one step: the reason is the first one's, whichever it is; a hook that resets `run` is ignored."""
    hooks = [early_stopping("score", mode="min", patience=1), stop_when(lambda state: state.step == 2, "two")]
    reset = ft.hook(after_step=lambda state: state.replace(run=ft.Run(max_steps=99)))
    final = run([*(reversed(hooks) if early else hooks), reset], [1.0, 2.0, 0.0])
    assert final.step == 2
    assert final.run.stop.reason == (
        "two" if early else "early_stopping: score has not got better in 1 reports than 1 at step 1"
    )


def test_two_of_a_kind_keep_their_own_memory():
    """Each name has its best; one name twice is refused."""
    hooks = [
        early_stopping("score", mode="min", patience=9),
        early_stopping("score", mode="max", patience=9, name="highest"),
    ]
    final = run(hooks, [2.0, 1.0, 3.0])
    assert (final.hooks["early_stopping"]["best"], final.hooks["highest"]["best"]) == (1.0, 3.0)
    with pytest.raises(ValueError, match="two hooks are named stop_when"):
        run([stop_when(bool, "a"), stop_when(bool, "b")], [])
    with pytest.raises(ValueError, match="'early_stopping' has memory and is listed after 'checkpoint'"):
        run([ft.hooks.checkpoint("unused", every=1), hooks[0]], [])


def test_hooks_are_values():
    """Equal, printable, and alike after pickle and copy."""
    for make_hook in (
        lambda: early_stopping("eval/x", mode="max", patience=3, min_delta=0.1),
        lambda: stop_when(bool, "now"),
    ):
        assert pickle.loads(pickle.dumps(make_hook())) == copy.deepcopy(make_hook()) == make_hook()
    assert repr(stop_when(bool, "now")) == (
        "hook('stop_when', after_step=StopWhen(predicate=<class 'bool'>, reason='now'))"
    )
    assert early_stopping("x", mode="max", patience=3) != early_stopping("x", mode="min", patience=3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: early_stopping("x", mode="best", patience=1), ValueError, "mode: got 'best'"),
        (lambda: early_stopping("x", mode="max", patience=0), ValueError, "patience: got 0"),
        (lambda: early_stopping("x", mode="max", patience=1, min_delta=-1), ValueError, "min_delta: got -1"),
        (lambda: early_stopping("x", mode="max", patience=1, min_delta=math.nan), ValueError, "min_delta: got nan"),
        (lambda: stop_when(True, "x"), TypeError, "predicate: got bool"),
        (lambda: stop_when(bool, 3), TypeError, "reason: got int"),
        (lambda: ft.on_main(early_stopping("x", mode="max", patience=1)), ValueError, "communicates between ranks"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(call, kind, message):
    """Every wrong argument is an error that says where, what and what is expected."""
    with pytest.raises(kind, match=message):
        call()
