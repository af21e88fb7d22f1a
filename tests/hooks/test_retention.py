"""Which checkpoints stay: the rules, the best ones, and what no crash, restart or roll-back can take away."""

import importlib
import logging
import math
import os
import shutil
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fntrain as ft
from fntrain import TrainState
from fntrain.shell.checkpoints import saver
from fntrain.shell.checkpoints.commit import commit
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.checkpoints.store import committed, name_of, step_of

module = importlib.import_module("fntrain.hooks.checkpoint")  # the function has the same name
keep_best = ft.hooks.keep_best
NAN, INF = math.nan, math.inf


def fresh():
    return TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})


def step_fn(state, batch):
    return state.advance(params={"w": state.params["w"] + batch}, metrics={})


def scored(scores, name="score"):
    """A hook that reports the score of a step, as an evaluation does; None reports nothing."""

    def report(state):
        value = scores[state.step - 1]
        return None if value is None else state.replace(metrics={**state.metrics, name: value})

    return ft.hook(after_step=report)


def steps(root):
    """The steps in view, newest first."""
    return [step_of(path) for path in checkpoints(root)]


def run(root, max_steps, *, scores=None, losses=None, every=1, **options):
    """Resume and go on; returns the steps that are left, oldest first."""
    hooks = [scored(scores)] if scores else []
    hooks += [scored(losses, "loss")] if losses else []
    hooks.append(ft.hooks.checkpoint(root, every=every, asynchronous=False, **options))
    ft.fit(step_fn, hooks, state=ft.resume_or(fresh(), root), data=iter([1.0] * 99), max_steps=max_steps)
    return steps(root)[::-1]


# The rules.

SCORES = [0.1, 0.9, 0.3, 0.9, NAN, 0.5, INF, 0.2, -INF, 0.4]  # of steps 1 to 10
LOSSES = [9.0, 8.0, 1.0, 7.0, 6.0, 5.0, 4.0, 2.0, 3.0, 9.0]
best_score, best_loss = keep_best("score", mode="max", n=2), keep_best("loss", mode="min")
RULES = {
    "all": ({}, list(range(1, 11))),
    "last": ({"keep_last": 3}, [8, 9, 10]),
    "every": ({"keep_every": 4}, [4, 8, 10]),
    "last and every": ({"keep_last": 2, "keep_every": 4}, [4, 8, 9, 10]),
    "best": ({"keep_best": keep_best("score", mode="max")}, [2, 10]),  # of equal ones the earlier
    "best two": ({"keep_best": best_score}, [2, 4, 10]),
    "least two": ({"keep_best": keep_best("score", mode="min", n=2)}, [1, 8, 10]),
    "several best": ({"keep_best": [best_score, best_loss]}, [2, 3, 4, 10]),
    "union": ({"keep_last": 2, "keep_every": 5, "keep_best": (best_score, best_loss)}, [2, 3, 4, 5, 9, 10]),
    "no such score": ({"keep_best": keep_best("other", mode="max")}, [10]),
    "at every third step": ({"every": 3, "keep_best": best_score}, [6, 10]),
}


@pytest.mark.parametrize("name", RULES)
def test_what_any_rule_keeps_stays(tmp_path, name):
    """The union of the rules, and the newest; nan and inf are no scores; without a rule all stay."""
    options, left = RULES[name]
    assert run(tmp_path, 10, scores=SCORES, losses=LOSSES, **options) == left


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_run_keeps_the_same(tmp_path, name):
    """Scores are part of the state: whenever it is stopped, the same checkpoints stay, in the same bits."""
    options, left = RULES[name]
    if "every" in options:
        left = run(tmp_path / "whole", 10, scores=SCORES, losses=LOSSES, **options)
    else:
        for step in range(1, 11):
            run(tmp_path / "parts", step, scores=SCORES, losses=LOSSES, **options)
        assert steps(tmp_path / "parts")[::-1] == left
        run(tmp_path / "whole", 10, scores=SCORES, losses=LOSSES, **options)
        newest = [ft.load(ft.latest(tmp_path / root)) for root in ("parts", "whole")]
        assert newest[0] == newest[1]


def test_the_scores_are_in_the_state(tmp_path):
    """By metric and step, those that count only."""
    run(tmp_path, 10, scores=SCORES, losses=LOSSES, keep_best=(best_score, best_loss))
    assert ft.load(ft.latest(tmp_path)).hooks == {"checkpoint": {"score": {"2": 0.9, "4": 0.9}, "loss": {"3": 1.0}}}


def test_rules_may_change_at_a_restart(tmp_path):
    """Another rule holds from the next save on; scores of a rule that was not there are not made up."""
    run(tmp_path, 4, scores=SCORES, keep_best=best_score)
    with pytest.warns(UserWarning, match="dropped the memory of"):
        assert run(tmp_path, 6, scores=SCORES, keep_last=2) == [5, 6]
    assert run(tmp_path, 8, scores=SCORES, keep_best=best_score) == [8]
    with pytest.warns(UserWarning, match="dropped the memory of"):
        assert run(tmp_path, 10, scores=SCORES) == [8, 9, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_every": 0}, "keep_every"),
        ({"keep_every": 1.5}, "keep_every"),
        ({"keep_last": -1}, "keep_last"),
        ({"keep_best": [best_score, keep_best("score", mode="min")]}, "one for each metric"),
    ],
)
def test_rules_that_mean_nothing_are_refused(tmp_path, options, message):
    """When the hook is built."""
    with pytest.raises(ValueError, match=message):
        ft.hooks.checkpoint(tmp_path, every=1, **options)


@pytest.mark.parametrize(("mode", "n"), [("best", 1), ("max", 0), ("min", 1.5), (None, 1)])
def test_a_best_that_means_nothing_is_refused(mode, n):
    """A mode is "max" or "min", a number of checkpoints is positive."""
    with pytest.raises(ValueError, match="mode|n"):
        keep_best("score", mode=mode, n=n)
    if n == 1:
        with pytest.raises(ValueError, match="mode"):
            ft.hooks.best_checkpoint("runs", "score", mode=mode)


# No history takes the newest away.


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


class History:
    """Runs with crashes, damage and roll-backs on one directory, and what must be there after each."""

    def __init__(self, root, options):
        self.root, self.options = root, options
        self.whole = {}  # by step: what was committed last and is not damaged

    def run(self, num_steps, every, kill_at, back):
        """Resume, train, die at the kill_at-th begin or end of a deletion; at its end roll back once by `back` steps."""
        start = ft.resume_or(fresh(), self.root)
        newest = max((step for step in self.whole if self.is_there(step)), default=0)
        assert start.step == newest
        assert not newest or ft.digest(start) == self.whole[newest]
        past = {}

        def roll_back(state):
            past.setdefault(state.step, state)
            target = state.step - back
            if back and state.position == start.position + num_steps and target in past:
                return past[target].replace(position=state.position, metrics=state.metrics)
            return None

        left = [kill_at]

        def die_at_zero():
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        def removing(store, path):
            die_at_zero()
            remove(store, path)
            die_at_zero()

        def committing(store, contents, tensors):
            path = commit(store, contents, tensors)
            self.last = contents.step
            self.whole[contents.step] = ft.digest(ft.load(path))
            return path

        remove, commit = LocalStore.remove, saver.commit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalStore, "remove", removing)
            patch.setattr(saver, "commit", committing)
            hook = ft.hooks.checkpoint(self.root, every=every, asynchronous=False, **self.options)
            hooks = [scored(SCORES * 99), ft.hook(after_step=roll_back), hook]
            states = ft.states(step_fn, hooks, state=start, data=iter([1.0] * 99), max_steps=start.step + num_steps + 1)
            self.last = start.step or None
            try:
                for state in states:
                    assert self.last is None or self.is_there(self.last), f"step {self.last} is gone"
                    if state.position > start.position + num_steps + 1:
                        break
            except Killed:
                pass
            finally:
                with suppress(Killed):
                    states.close()
        self.check()

    def is_there(self, step):
        return (self.root / name_of(step)).exists()

    def check(self):
        """The last one committed, or the one begun from, is there, whole, and a run can be resumed from the newest."""
        if self.last is not None:
            assert self.is_there(self.last), f"step {self.last} is gone"
            assert ft.digest(ft.load(self.root / name_of(self.last))) == self.whole[self.last]
        if self.whole:
            resumed = ft.resume_or(fresh(), self.root)
            assert ft.digest(resumed) == self.whole[resumed.step]

    def change(self, options):
        """Other rules from now on."""
        self.options = options

    def damage(self, nth):
        """A bit flips in the n-th newest, unless it is the only whole one."""
        whole = [step for step in steps(self.root) if step in self.whole]
        if len(whole) > max(nth, 1):
            step = whole[nth]
            file = self.root / name_of(step) / "model.safetensors"
            raw = file.read_bytes()
            file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            del self.whole[step]


RUN = st.tuples(st.just("run"), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9), st.integers(0, 3))
HISTORIES = st.lists(st.one_of(RUN, RUN, st.tuples(st.just("damage"), st.integers(0, 2))), min_size=1, max_size=6)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "keep_last": st.integers(1, 3),
        "keep_every": st.integers(1, 4),
        "keep_best": st.builds(
            lambda mode, n: keep_best("score", mode=mode, n=n), st.sampled_from(["max", "min"]), st.integers(1, 2)
        ),
    },
)


def law_history(root, options, history):
    shutil.rmtree(root, ignore_errors=True)
    one = History(root, options)
    for name, *arguments in history:
        getattr(one, name)(*arguments)


@settings(max_examples=30, deadline=None)
@given(options=OPTIONS, history=HISTORIES)
def test_no_history_takes_the_newest_away(tmp_path_factory, options, history):
    """After any saves, crashes before or amid deletion, damage, restarts and roll-backs a run can be resumed."""
    law_history(tmp_path_factory.getbasetemp() / "history", options, history)


def by_number(store, newest, keep, left=()):
    """Keeps the highest numbers, as if the one just saved were one of them."""
    found = {step_of(path): path for path in committed(store)}
    for step in found.keys() - set(keep(list(found))):
        store.remove(found[step])


def delete_first(store, contents, tensors):
    """Makes room before it writes."""
    for path in committed(store):
        store.remove(path)
    return commit(store, contents, tensors)


def test_law_history_can_fail(tmp_path, monkeypatch):
    """Retention by numbers alone, one that counts a damaged one, and deleting before the commit are refused."""
    back = [("run", 4, 1, 0, 3)]  # at position 4 back to step 1: what is saved then has a lower number
    dies = [("run", 2, 1, 0, 0), ("run", 2, 1, 2, 0)]
    spoilt = [("run", 5, 2, 0, 0), ("damage", 0), ("change", {"keep_last": 1}), ("run", 1, 1, 0, 0)]
    for history in (back, dies, spoilt):
        law_history(tmp_path / "runs", {"keep_last": 2}, history)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "retain", by_number)
        with pytest.raises(AssertionError, match="step 1 is gone"):
            law_history(tmp_path / "runs", {"keep_last": 2}, back)
        patch.setattr(module, "refuse_later", lambda store, state: None)
        with pytest.raises(AssertionError, match="step 5 is gone"):
            law_history(tmp_path / "runs", {"keep_last": 2}, spoilt)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "commit", delete_first)
        with pytest.raises(AssertionError, match="step 3 is gone"):
            law_history(tmp_path / "runs", {"keep_last": 2}, dies)


# best_checkpoint.


@pytest.fixture
def saved(monkeypatch):
    """The steps that were committed, by the name of their directory."""
    commit, saved = saver.commit, []

    def noted(store, contents, tensors):
        saved.append((store.root.name, contents.step))
        return commit(store, contents, tensors)

    monkeypatch.setattr(saver, "commit", noted)
    return saved


def best_run(parent, max_steps, scores, mode, *, every=1, state=None, **options):
    hooks = [
        scored(scores),
        ft.hooks.best_checkpoint(parent / "best", "score", mode=mode, **options),
        ft.hooks.checkpoint(parent / "runs", every=every),
    ]
    state = state or ft.resume_or(fresh(), parent / "runs")
    return ft.fit(step_fn, hooks, state=state, data=iter([1.0] * 99), max_steps=max_steps)


BEST = {
    "nan first, min": ([NAN, 0.8, 0.9, 0.9], "min", [2]),
    "nan first, max": ([NAN, 0.8, 0.9, 0.9], "max", [2, 3]),
    "inf": ([INF, -INF, 0.5, INF], "max", [3]),
    "minus inf": ([-INF, INF, 0.5, -INF], "min", [3]),
    "now and then": ([None, 0.5, None, 0.7], "max", [2, 4]),
    "a tensor": ([torch.tensor(0.5), torch.tensor(NAN), torch.tensor(0.4), torch.tensor(0.5)], "max", [1]),
    "never": ([None, NAN, None, None], "max", []),
    "zero": ([0.0, -0.0, 0, -1], "max", [1]),
}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("name", BEST)
def test_the_best_is_saved_when_it_is_better(tmp_path, saved, name, asynchronous):
    """Once for each new best; nan and inf never count, a score as good as the best does not either."""
    scores, mode, best = BEST[name]
    best_run(tmp_path, 4, scores, mode, asynchronous=asynchronous)
    assert [step for root, step in saved if root == "best"] == best
    assert steps(tmp_path / "best") == best[-1:]
    assert (ft.latest(tmp_path / "best") is None) == (not best)
    if best:
        state = ft.load(ft.latest(tmp_path / "best"))
        assert (state.step, state.params["w"].tolist()) == (best[-1], [float(best[-1])] * 2)
        assert state.hooks["best_checkpoint"] == {str(best[-1]): float(scores[best[-1] - 1])}


@pytest.mark.parametrize("name", BEST)
def test_the_best_survives_a_resume(tmp_path, saved, name):
    """Stopped after every step, it saves at the same steps as in one run."""
    scores, mode, best = BEST[name]
    for step in range(1, 5):
        best_run(tmp_path, step, scores, mode)
    assert [step for root, step in saved if root == "best"] == best
    assert steps(tmp_path / "best") == best[-1:]


def test_a_kill_before_the_best_was_committed(tmp_path, saved):
    """The periodic checkpoint knows of a best that is not on the disk: its own state, which is saved again."""
    best_run(tmp_path, 3, [0.1, 0.2, 0.3], "max")
    shutil.rmtree(tmp_path / "best" / "step_00000003")
    del saved[:]
    best_run(tmp_path, 5, [0.1, 0.2, 0.3, 0.2, 0.1], "max")
    assert [step for root, step in saved if root == "best"] == [3]
    assert ft.load(ft.latest(tmp_path / "best")).params["w"].tolist() == [3.0, 3.0]


def test_a_kill_before_the_best_was_committed_and_some_steps_later(tmp_path, caplog):
    """When the state of the best is gone for good, the log says so, and the next score is the best."""
    best_run(tmp_path, 3, [0.1, 0.3, 0.2], "max")
    shutil.rmtree(tmp_path / "best" / "step_00000002")
    with caplog.at_level(logging.WARNING, logger="fntrain"):
        best_run(tmp_path, 4, [0.1, 0.3, 0.2, 0.1], "max")
    assert "the best checkpoint (step 2) is not there" in caplog.text
    assert steps(tmp_path / "best") == [4]


def test_a_kill_before_the_former_best_was_deleted(tmp_path):
    """Two are there, and the state knows which is the better: the other goes."""
    best_run(tmp_path, 1, [0.1, 0.3], "max")
    shutil.copytree(tmp_path / "best", tmp_path / "kept")
    best_run(tmp_path, 2, [0.1, 0.3], "max")
    shutil.copytree(tmp_path / "kept" / "step_00000001", tmp_path / "best" / "step_00000001")
    best_run(tmp_path, 3, [0.1, 0.3, 0.2], "max")
    assert steps(tmp_path / "best") == [2]


def test_a_kill_after_the_best_and_before_the_periodic_one(tmp_path, saved):
    """The run goes on from before the best, with the best of then, comes by the later one again and ends with it."""
    best_run(tmp_path, 4, [0.1, 0.2, 0.1, 0.3], "max", every=2)
    shutil.rmtree(tmp_path / "runs" / "step_00000004")
    del saved[:]
    best_run(tmp_path, 4, [0.1, 0.2, 0.1, 0.3], "max", every=2)
    assert [step for root, step in saved if root == "best"] == [2, 4]  # 2 was deleted when 4 was there
    assert steps(tmp_path / "best") == [4]


def test_the_best_of_another_run_is_put_aside(tmp_path, caplog):
    """It is of no past of this run, and not this run's to delete."""
    ft.save(fresh().replace(step=9), tmp_path / "best")
    with caplog.at_level(logging.WARNING, logger="fntrain"):
        best_run(tmp_path, 2, [0.1, 0.2], "max")
    assert steps(tmp_path / "best") == [2]
    [aside] = (tmp_path / "best").glob("former_step_00000009-*")
    assert ft.load(aside).step == 9
    assert str(aside) in caplog.text


def test_the_last_evaluation_counts(tmp_path, saved):
    """A score that is reported at the end only is seen, and the periodic checkpoint remembers it."""
    evaluate = ft.hooks.evaluate(lambda state: {"score": float(state.step)}, every=10)
    best = ft.hooks.best_checkpoint(tmp_path / "best", "eval/score", mode="max")
    periodic = ft.hooks.checkpoint(tmp_path / "runs", every=10)
    final = ft.fit(step_fn, [evaluate, best, periodic], state=fresh(), data=iter([1.0] * 9), max_steps=3)
    assert steps(tmp_path / "best") == [3]
    assert ft.load(ft.latest(tmp_path / "runs")) == final
    assert final.hooks["best_checkpoint"] == {"3": 3.0}


def test_after_an_error_the_score_of_the_step_before_is_not_saved_again(tmp_path, saved):
    """A run that ends by an error saves nothing more."""

    def fails(state, batch):
        if state.step == 2:
            raise ZeroDivisionError
        return step_fn(state, batch)

    hooks = [scored([0.1, 0.2, 0.3]), ft.hooks.best_checkpoint(tmp_path / "best", "score", mode="max")]
    with pytest.raises(ZeroDivisionError):
        ft.fit(fails, hooks, state=fresh(), data=iter([1.0] * 9), max_steps=3)
    assert saved == [("best", 1), ("best", 2)]


def test_the_best_is_listed_before_the_periodic_one():
    """Otherwise its memory would be saved one step old."""
    hooks = [ft.hooks.checkpoint("runs", every=1), ft.hooks.best_checkpoint("best", "score", mode="max")]
    with pytest.raises(ValueError, match="list 'best_checkpoint' before it"):
        ft.fit(step_fn, hooks, state=fresh(), data=iter([1.0]), max_steps=1)


def test_several_best_ones_beside_a_periodic_one_with_scores(tmp_path):
    """For two metrics there are two hooks, and the periodic one may keep by score too."""
    hooks = [
        scored(SCORES),
        scored(LOSSES, "loss"),
        ft.hooks.best_checkpoint(tmp_path / "score", "score", mode="max", name="best_score"),
        ft.hooks.best_checkpoint(tmp_path / "loss", "loss", mode="min", name="best_loss"),
        ft.hooks.checkpoint(tmp_path / "runs", every=1, keep_best=best_score),
    ]
    ft.fit(step_fn, hooks, state=fresh(), data=iter([1.0] * 99), max_steps=10)
    assert [steps(tmp_path / name) for name in ("score", "loss", "runs")] == [[2], [3], [10, 4, 2]]


def test_the_best_stays_when_the_run_goes_back(tmp_path):
    """A roll-back to step 2 keeps the best of step 4 and its score: a lesser one later is not saved in its place."""
    scores = {2: 0.5, 4: 0.9, 5: 0.7}
    kept = {}

    def report(state):
        return state.replace(metrics={"score": scores[state.step]}) if state.step in scores else None

    def back(state):
        if state.step == 2 and not kept:
            kept["state"] = state
        if state.step == 4 and "gone" not in kept:
            kept["gone"] = True
            return state.go_back(kept["state"].replace(position=state.position))
        return None

    def step_fn(state, batch):
        return state.advance(metrics={})

    def hooks():
        best = ft.hooks.best_checkpoint(tmp_path / "best", "score", mode="max")
        rewinding = ft.hook(after_step=back, name="back")
        return [ft.hook(after_step=report), best, rewinding, ft.hooks.checkpoint(tmp_path / "run", every=1)]

    start = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(1)})
    final = ft.fit(step_fn, hooks(), state=start, data=iter(range(20)), max_steps=3)
    final = ft.fit(step_fn, hooks(), state=ft.resume_or(start, tmp_path / "run"), data=iter(range(20)), max_steps=6)
    assert kept["gone"]
    assert dict(final.hooks["best_checkpoint"]) == {"4": 0.9}
    assert ft.latest(tmp_path / "best").name == "step_00000004"
    again = ft.fit(step_fn, hooks(), state=ft.resume_or(start, tmp_path / "run"), data=iter(range(20)), max_steps=7)
    assert dict(again.hooks["best_checkpoint"]) == {"4": 0.9}
    assert ft.latest(tmp_path / "best").name == "step_00000004"


def test_a_score_that_never_came_is_told(tmp_path, caplog):
    """A misspelt metric would otherwise never be noticed."""
    hooks = [
        ft.hooks.best_checkpoint(tmp_path / "best", "scroe", mode="max"),
        ft.hooks.checkpoint(tmp_path, every=2, keep_best=keep_best("scroe", mode="max")),
    ]
    with caplog.at_level(logging.WARNING, "fntrain"):
        ft.fit(step_fn, hooks, state=fresh(), data=iter([1.0] * 4), max_steps=4)
    assert [record.getMessage() for record in caplog.records] == [
        "best_checkpoint: saw no 'scroe' that is finite; list it after the hook that reports it",
        "checkpoint: saw no 'scroe' that is finite; it counts only at the steps that are saved",
    ]
    caplog.clear()
    run(tmp_path / "fine", 4, scores=SCORES, keep_best=best_score)
    assert caplog.records == []


@pytest.mark.parametrize("wrong", ["score", ["score"], ("score", "max")])
def test_keep_best_is_made_by_its_function(wrong):
    """A name alone does not say which way is better."""
    with pytest.raises(TypeError, match=r"keep_best: got .*'?score.*, expected ft\.hooks\.keep_best"):
        ft.hooks.checkpoint("runs", every=1, keep_best=wrong)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_another_working_directory_during_the_run_moves_nothing(tmp_path, monkeypatch, asynchronous):
    """A relative directory is the one it was when the run began."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    leave = ft.every(3, ft.hook(after_step=lambda state: os.chdir(tmp_path / "elsewhere")))
    hooks = [leave, ft.hooks.checkpoint("runs", every=2, asynchronous=asynchronous)]
    ft.fit(step_fn, hooks, state=fresh(), data=iter([1.0] * 6), max_steps=6)
    assert steps(tmp_path / "runs") == [6, 4, 2]
    assert list((tmp_path / "elsewhere").iterdir()) == []
