"""rollback_on_spike: back to a kept state and on with other data; the same whatever was interrupted, pure or in place."""

import copy
import functools
import logging
import math
import pickle
import statistics
import time

import attrs
import pytest
import torch
from cases import batches, make, square_loss
from hypothesis import given, settings
from hypothesis import strategies as st

import fntrain as ft
from fntrain.shell.checkpoints import saver
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.testing import assert_resume_exact, assert_states_equal

NAME = "rollback_on_spike"
NAN = math.nan


def rollback(**options):
    return ft.hooks.rollback_on_spike(**{"window": 2, "snapshot_every": 2, "look_every": 1} | options)


def report(state, batch):
    """A step that remembers which batches it was trained on, and reports one as its loss."""
    seen = state.extra.get("seen", ())
    return state.advance(extra={"seen": (*seen, state.position)}, metrics={} if batch is None else {"loss": batch})


class Losses:
    """Data that can start anywhere; 1.0 after the end of the list."""

    def __init__(self, values):
        self.values = values

    def at(self, position):
        while True:
            yield self.values[position] if position < len(self.values) else 1.0
            position += 1


def start(**fields):
    return ft.TrainState(**{"step": 0, "position": 0, "seed": 0, "params": {}} | fields)


def run(hooks, losses, *, max_steps=8, state=None):
    return ft.fit(report, hooks, state=state or start(), data=Losses(losses), max_steps=max_steps)


def test_a_spike_leads_back_and_its_data_is_skipped(caplog):
    """Step 4's state comes back at step 6 with the position of then; the log says why, from where and to where."""
    with caplog.at_level(logging.WARNING, "fntrain"):
        final = run([rollback()], [1, 1, 1, 1, 1, 9])
    assert (final.step, final.position, final.extra["seen"]) == (8, 10, (0, 1, 2, 3, 6, 7, 8, 9))
    assert final.hooks[NAME]["rollbacks"] == [6]
    assert [record.getMessage() for record in caplog.records] == [
        "rollback_on_spike: loss was 9, more than 3 times the median 1; going back from step 6 to 4, and on with batch 6"
    ]


def test_without_a_spike_nothing_changes():
    """Up to the factor, before the window is full, without the metric, or around a median that says nothing."""
    for losses in (
        [1, 1, 3, 3, 9],
        [1, 99],
        [None, 1, None, 1, None, 3],
        [-1, -1, -2],
        [0, 0, 5],
        [NAN, NAN, 1, NAN, NAN],
    ):
        final = run([rollback()], losses)
        assert final.position == final.step == 8, losses


def test_values_that_are_not_finite_count_in_a_row():
    """The third in a row leads back; a state kept among them would be doubtful, so the one before is taken."""
    final = run([rollback()], [1, 1, 1, NAN, math.inf, NAN])
    assert final.extra["seen"] == (0, 1, 6, 7, 8, 9, 10, 11)
    assert run([rollback(nonfinite_steps=1)], [1, 1, 1, NAN]).extra["seen"][:3] == (0, 1, 4)


def test_a_state_that_leads_to_a_spike_twice_was_bad():
    """The second roll-back before another state is kept goes to the one before; then it begins again."""
    final = run([rollback()], [1, 1, 1, 1, 1, 9, 9, 1, 1])
    assert final.extra["seen"] == (0, 1, 7, 8, 9, 10, 11, 12)
    assert final.hooks[NAME]["rollbacks"] == [6, 7]


def test_too_many_roll_backs_stop_the_run_at_a_good_state():
    """One more than max_rollbacks within within_steps goes back and stops; resumed it stops at once, or goes on."""
    losses = [1, 1, 1, 1, 9, 1, 9, 1, 9, 1, 1, 1]
    final = run([rollback(max_rollbacks=2)], losses)
    assert (final.step, final.position) == (2, 9)
    assert final.run.stop == ft.Stop(
        "requested",
        "rollback_on_spike: loss was 9, more than 3 times the median 1, after 2 roll-backs within 1000 batches; "
        "this is the state of step 2",
    )
    again = run([rollback(max_rollbacks=2)], losses, state=final)
    assert again == final and "after 2 roll-backs" in again.run.stop.reason
    assert run([rollback(max_rollbacks=3)], losses, state=final) == run([rollback(max_rollbacks=3)], losses)
    assert run([rollback(max_rollbacks=2, within_steps=3)], losses).step == 8
    assert run([rollback(max_rollbacks=0)], losses).run.stop.reason.endswith("this is the state of step 4")


def by_hand(losses, num_steps, *, window, factor, patience, every, limit):
    """The rule written out: (batches trained on, roll-backs) until the end or one roll-back too many."""
    seen, values, nonfinite, position, rollbacks = [], [], 0, 0, []
    kept = [(0, [], [])]
    used = False
    while len(seen) < num_steps:
        loss = losses[position] if position < len(losses) else 1.0
        seen, position = [*seen, position], position + 1
        spike = math.isfinite(loss) and len(values) == window and loss > factor * statistics.median_low(values)
        nonfinite = 0 if math.isfinite(loss) else nonfinite + 1
        if spike or nonfinite == patience:
            if used and len(kept) > 1:
                kept.pop()
            _, seen, values = kept[-1]
            used, nonfinite = True, 0
            rollbacks.append(position)
            if len(rollbacks) > limit:
                break
            continue
        if math.isfinite(loss):
            values = [*values, loss][-window:]
        if len(seen) % every == 0 and not nonfinite:
            kept, used = [*[one for one in kept if one[0] < len(seen)], (len(seen), seen, values)][-2:], False
    return tuple(seen), rollbacks


@settings(max_examples=100, deadline=None)
@given(
    losses=st.lists(st.sampled_from([1.0, 1.5, 2.0, 7.0, 40.0, NAN, math.inf]), max_size=40),
    window=st.integers(1, 3),
    patience=st.integers(1, 3),
    every=st.integers(1, 4),
    limit=st.integers(0, 4),
)
def test_it_is_the_rule_by_hand(losses, window, patience, every, limit):
    """Whatever the losses: the same batches are trained on, the same roll-backs made."""
    hook = rollback(window=window, nonfinite_steps=patience, snapshot_every=every, max_rollbacks=limit)
    final = run([hook], losses, max_steps=12)
    seen, rollbacks = by_hand(losses, 12, window=window, factor=3.0, patience=patience, every=every, limit=limit)
    assert (final.extra.get("seen", ()), final.hooks[NAME]["rollbacks"]) == (seen, rollbacks)


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.sampled_from([1.0, 1.5, 7.0, NAN]), max_size=20),
    look=st.integers(1, 3),
    cut=st.integers(0, 30),
)
def test_a_run_cut_where_a_state_is_kept_goes_on_exactly(losses, look, cut):
    """Resumed at a multiple of snapshot_every, before any roll-back or after it, a run ends with the same bits."""
    hook = rollback(snapshot_every=look * 2, look_every=look, max_rollbacks=9, nonfinite_steps=2)
    scan = list(ft.states(report, [hook], state=start(), data=Losses(losses), max_steps=12))
    at = scan[min(cut, len(scan) - 1)]
    kept_here = at.step % (look * 2) == 0 and not at.hooks[NAME]["nonfinite"]
    back_beyond = min((state.step for state in scan[cut + 1 :]), default=99) < at.step
    if kept_here and not back_beyond:
        assert run([hook], losses, max_steps=12, state=at) == scan[-1]


def test_a_run_resumed_elsewhere_goes_back_to_where_it_was_resumed():
    """The state before it is not known: documented, and shown here."""
    losses = [1, 1, 1, 1, 1, 9]
    half = run([rollback()], losses, max_steps=5)
    assert run([rollback()], losses, state=half).extra["seen"] == (0, 1, 2, 3, 4, 6, 7, 8)
    assert run([rollback()], losses).extra["seen"] == (0, 1, 2, 3, 6, 7, 8, 9)


def spiky():
    """Batches, one of them far out."""
    data = batches("batchnorm", 12, 4)
    data[6] = data[6] * 100
    return Losses(data)


def job(form=lambda step_fn: step_fn, hooks=lambda: [rollback(window=3)], momentum=0.9):
    def build():
        model, sgd = make("batchnorm"), ft.optimizer(torch.optim.SGD, lr=0.01, momentum=momentum)
        step_fn = form(ft.supervised_step(model, lambda m, b: square_loss(m[0], b), sgd))
        return {"step_fn": step_fn, "hooks": hooks(), "state": ft.init_state(model, sgd), "data": spiky()}

    return build


def test_pure_and_in_place_agree_through_a_roll_back():
    """The kept state is copied in: same bits, optimizer state and averages too; the kept one is not written to."""
    finals = []
    for form in (lambda step_fn: step_fn, ft.shell.in_place):
        built = job(form, lambda: [ft.hooks.ema(0.9), rollback(window=3)])()
        scan = [ft.snapshot(state) for state in ft.states(**built, max_steps=9)]
        assert [state.step for state in scan] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
        back, before = scan[6], scan[5]
        assert_states_equal(back, before.replace(position=7, hooks=back.hooks))
        assert ft.hooks.averaged(back).params["0.weight"].equal(ft.hooks.averaged(before).params["0.weight"])
        finals.append(scan[-1])
    assert_states_equal(*finals)
    assert finals[0].position == 10


def test_resume_is_exact_and_the_law_refuses_a_window_outside_the_state():
    """Every step after the roll-back, and those at which states are kept; a hook with its own window fails."""
    law = assert_resume_exact(job(), num_steps=9, at=[2, 4, 6, 7, 8])
    assert law.hooks[NAME]["rollbacks"] == [7]

    class Forgetful(ft.hooks.rollback.RollBack):
        def judge(self, memory, values):
            before = {**memory, "window": self.__dict__.setdefault("window_", memory["window"])}
            after, problem = super().judge(before, values)
            self.__dict__["window_"] = after["window"]
            return {**after, "window": memory["window"]}, problem

    def hooks():
        hook = rollback(window=3)
        return [attrs.evolve(hook, open=Forgetful(**attrs.asdict(hook.open)))]

    with pytest.raises(AssertionError, match="resumed at step 4, the run ends differently"):
        assert_resume_exact(job(hooks=hooks), num_steps=9, at=[4])


def test_writers_and_checkpoints_follow(tmp_path):
    """Rows of the branch left give way, `rollbacks` is written; its checkpoints are deleted by the next save."""
    losses = [1, 1, 1, 1, 1, 1, 1, 9]
    hooks = [
        rollback(snapshot_every=4),
        ft.hooks.write_metrics(ft.writers.jsonl(tmp_path / "metrics.jsonl"), every=1, window=1),
        ft.hooks.checkpoint(tmp_path, every=3, asynchronous=False),
    ]
    steps = []
    for state in ft.states(report, hooks, state=start(), data=Losses(losses), max_steps=9):
        steps.append((state.step, [ft.load(path).position for path in checkpoints(tmp_path)]))
    assert steps[6] == (7, [6, 3])
    assert steps[7] == (4, [6, 3])  # back at 4: step 6 is of the branch left ...
    assert steps[9] == (6, [10, 3])  # ... until 6 is reached again
    assert steps[-1] == (9, [13, 10, 3])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"rollbacks": 1.0' in text and '"loss": 9' not in text


def test_a_save_still_under_way_is_of_the_branch_left_too(tmp_path, monkeypatch):
    """It comes into view after the roll-back, and the next save deletes it as those that were in view."""
    commit = saver.commit

    def slowly(root, contents, data):
        time.sleep(0.3 if contents.step == 4 else 0)
        return commit(root, contents, data)

    monkeypatch.setattr(saver, "commit", slowly)
    hooks = [rollback(snapshot_every=6), ft.hooks.checkpoint(tmp_path, every=2)]
    for state in ft.states(report, hooks, state=start(), data=Losses([1, 1, 1, 1, 9]), max_steps=9):
        if state.position == 7:  # step 2 again, after step 5 led back to 0
            break
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]


def test_a_look_every_few_steps_finds_the_same_spike_later():
    """What is not looked at yet waits in the state as it came, tensors too, and is in a checkpoint."""
    losses = [torch.tensor(float(x)) for x in (1, 1, 1, 1, 9, 1, 1, 1)]
    hook = rollback(look_every=4, snapshot_every=4)
    half = run([hook], losses, max_steps=6)
    assert [float(value) for value in half.hooks[NAME]["pending"]] == [9, 1]
    final = run([hook], losses)
    assert final.extra["seen"] == (0, 1, 2, 3, 8, 9, 10, 11)


def test_the_list_order_is_checked(tmp_path):
    """After hooks with memory, before writers and checkpoints; and checkpoint hooks with memory may follow it."""
    best = ft.hooks.keep_best("loss", mode="min")
    run([ft.hooks.ema(), rollback(), ft.hooks.checkpoint(tmp_path, every=2, keep_best=best)], [1], max_steps=2)
    with pytest.raises(ValueError, match="'ema' has memory and is listed after 'rollback_on_spike', which may go back"):
        run([rollback(), ft.hooks.ema()], [])
    with pytest.raises(ValueError, match="reports metrics and is listed after 'write_metrics'"):
        run([ft.hooks.write_metrics(()), rollback()], [])
    with pytest.raises(ValueError, match="has memory and is listed after 'checkpoint'"):
        run([ft.hooks.checkpoint(tmp_path, every=1), rollback()], [])


class Pairs(Losses):
    """Batches of a loss and a norm."""

    def at(self, position):
        return ((value, 1.0) if isinstance(value, float) else value for value in super().at(position))


def both(state, batch):
    return report(state, batch[0]).replace(metrics={"loss": batch[0], "norm": batch[1]})


BOTH = [rollback(), rollback(metric="norm", name="norm")]
HEALTHY = [(1, 1.0), (1, 1.1), (1, 1.2), (1, 1.3)]


def test_two_of_them_keep_their_own_memory():
    """One on the loss, one on a norm: each goes back on its own, and neither undoes the other's count."""
    for spikes in ([(9, 1), (1, 1), (1, 9)], [(1, 9), (9, 1)], [(1, 9), (9, 1), (9, 1)]):
        final = ft.fit(both, BOTH, state=start(), data=Pairs(HEALTHY + spikes), max_steps=9)
        expected = {
            NAME: [5 + n for n, (loss, _) in enumerate(spikes) if loss == 9],
            "norm": [5 + n for n, (_, norm) in enumerate(spikes) if norm == 9],
        }
        assert {name: memory["rollbacks"] for name, memory in final.hooks.items()} == expected
        assert final.position - final.step > len(spikes) - 1


def test_an_error_names_the_callback_that_went_back_or_would_have(tmp_path):
    """Not the wrapper that keeps what outlives a roll-back; nor a functools.partial."""
    best = ft.hooks.best_checkpoint(tmp_path, "loss", mode="min")
    with pytest.raises(ValueError, match="no number") as caught:
        run([rollback(), best], ["no number"])
    assert "in _SpikeWatch.look of hook 'rollback_on_spike', at step 1" in caught.value.__notes__

    def fails(_number, state):
        raise KeyError

    with pytest.raises(KeyError) as caught:
        run([ft.hook(after_step=functools.partial(fails, 1), name="own")], [1])
    [note] = caught.value.__notes__
    assert note.endswith("fails of hook 'own', at step 1") and "functools.partial" not in note


def test_two_of_them_resume_exactly():
    """Resumed where states are kept, the second does not count a step again to which the first goes back."""
    data = Pairs([*HEALTHY, (9, 1), (1, 1), (1, 9), (1, 1)])
    scan = list(ft.states(both, BOTH, state=start(), data=data, max_steps=9))
    assert scan[-1].extra["seen"] == (0, 1, 2, 3, 7, 8, 9, 10, 11)
    fours = [state for state in scan if state.step == 4]
    assert [state.position for state in fours] == [4, 5, 7]
    for state in fours:
        resumed = list(ft.states(both, BOTH, state=state, data=data, max_steps=9))
        for one, other in zip(reversed(resumed), reversed(scan), strict=False):
            assert_states_equal(one, other)


def test_another_hook_that_goes_back_leaves_no_later_state_behind():
    """A kept state of a branch that was left is never gone back to; without an earlier one the run stops."""
    for every, expected in ((4, 0), (2, None)):
        kept = {}

        def own(state, kept=kept):
            if state.step == 1:
                kept.setdefault("state", state)
            return kept["state"].replace(position=state.position) if state.position == 5 else None

        came = ft.hook(before_step=lambda state, steps=kept: steps.update({state.position: state.step}) or None)
        hooks = [ft.hook(after_step=own), rollback(snapshot_every=every, window=1), came]
        final = run(hooks, [1, 1, 1, 1, 1, 9], max_steps=6)
        if expected is None:
            reason = "rollback_on_spike: loss was 9, more than 3 times the median 1, and there is no earlier state to go back to"
            assert final.run.stop == ft.Stop("requested", reason)
        else:
            assert kept[6] == expected


def test_the_kept_state_is_not_what_a_hook_writes_to():
    """A hook that writes into tensors of the state that came back does not spoil the copy."""
    came_back = []

    def spoil(state):
        if state.step == 0:
            came_back.append(state.params["w"].item())
        state.params["w"].add_(1)

    hooks = [rollback(window=1, snapshot_every=100), ft.hook(after_step=spoil)]
    run(hooks, [1, 9, 1, 9, 1, 9], state=start(params={"w": torch.zeros(1)}))
    assert came_back == [0, 0, 0]


def test_hooks_are_values():
    """Equal, printable, and alike after pickle and copy."""
    hook = rollback(factor=2.0)
    assert hook == rollback(factor=2.0) != rollback()
    assert pickle.loads(pickle.dumps(hook)) == copy.deepcopy(hook) == hook
    assert repr(hook).startswith("RollBack(metric='loss', factor=2.0, window=2,")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, "factor: got 1.0"),
        ({"factor": NAN}, "factor: got nan"),
        ({"factor": "3"}, "factor: got '3'"),
        ({"window": 0}, "window: got 0"),
        ({"max_rollbacks": -1}, "max_rollbacks: got -1"),
        ({"snapshot_every": 10, "look_every": 4}, "snapshot_every: got 10, expected a multiple of look_every=4"),
    ],
)
def test_misuse_names_what_was_wrong(options, message):
    """Every number out of range is an error that says which and what is expected."""
    with pytest.raises(ValueError, match=message):
        rollback(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [True, False])
def test_on_a_gpu_states_wait_on_the_host_or_beside(on_host):
    """cuda_step goes back to the bits it had, wherever they were kept, and its graphs go on."""
    finals = []
    for graph in ("never", "auto"):
        torch.manual_seed(0)
        model = make("batchnorm").cuda()
        sgd = ft.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9)
        step_fn = ft.shell.cuda_step(ft.supervised_step(model, lambda m, b: square_loss(m[0], b), sgd), graph=graph)
        hook = rollback(window=3, on_host=on_host, look_every=2)
        finals.append(ft.fit(step_fn, [hook], state=ft.init_state(model, sgd), data=spiky(), max_steps=9))
    assert finals[0] == finals[1]
    assert finals[0].position == finals[0].step + 2
