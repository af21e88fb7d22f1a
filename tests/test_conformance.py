"""detectron2's engine behaves so, by its documentation and tests; here too. Steps count from 1 here, from 0 there.

Metrics, writers and evaluation periods are in test_conformance_metrics.py.
"""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import fntrain as ft


def job(lr=0.1, *, samples=64, hooks=(), **options):
    """A SimpleTrainer's job: a small model, SGD, a loader that goes on for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = ft.optimizer(torch.optim.SGD, lr=lr)
    step_fn = ft.supervised_step(model, lambda model, batch: model(batch).sum(), optimizer, **options)
    data = ft.data.stream(torch.rand(samples, 3, generator=torch.Generator().manual_seed(1)), 4, seed=0)
    return {"step_fn": step_fn, "hooks": list(hooks), "state": ft.init_state(model, optimizer), "data": data}


# TrainerBase, HookBase.


def test_train_runs_from_start_to_max():
    """`train(start_iter, max_iter)`: a run that starts at 4 and ends at 7 makes three steps."""
    seen = []
    look = ft.hook(after_step=lambda state: seen.append(state.step))
    four = ft.fit(**job(), max_steps=4)
    final = ft.fit(**{**job(hooks=[look]), "state": four}, max_steps=7)
    assert (seen, final.step, final.run.start_step, final.run.max_steps) == ([5, 6, 7], 7, 4, 7)


def test_hooks_are_called_in_the_order_of_their_registration():
    """before_train, then before_step and after_step for every step, then after_train; hook by hook in each."""
    calls = []

    def logged(name):
        phases = ("before_train", "before_step", "after_step", "after_train")
        return ft.hook(name=name, **{phase: lambda _, phase=phase: calls.append((phase, name)) for phase in phases})

    ft.fit(**job(hooks=[logged("a"), logged("b")]), max_steps=2)
    phases = ["before_train", *["before_step", "after_step"] * 2, "after_train"]
    assert calls == [(phase, name) for phase in phases for name in "ab"]


def test_after_train_is_called_when_a_step_raises():
    """An exception in the loop still runs after_train of every hook, and is raised."""
    ended = []

    def failing(state):
        if state.step == 2:
            raise RuntimeError("in a hook")

    last = ft.hook(after_train=lambda state: ended.append((state.step, state.run.stop.kind)))
    with pytest.raises(RuntimeError, match="in a hook"):
        ft.fit(**job(hooks=[ft.hook(after_step=failing), last, last]), max_steps=5)
    assert ended == [(2, "error")] * 2


def test_a_callback_hook_takes_functions():
    """CallbackHook(before_train=..., after_step=...): what is left out is not called."""
    calls = []
    hook = ft.hook(before_train=lambda state: calls.append(state.step), after_step=lambda state: calls.append("step"))
    ft.fit(**job(hooks=[hook]), max_steps=2)
    assert calls == [0, "step", "step"]


def test_two_hooks_of_one_kind_keep_their_own_memory(tmp_path):
    """There the second of a class loses its state_dict; here each has a name, and two of one name are refused."""

    def counter(name, by):
        return ft.stateful(name, 0, after_step=lambda state: ft.remember(state, name, state.hooks[name] + by))

    hooks = [counter("ones", 1), counter("tens", 10)]
    final = ft.fit(**job(hooks=[*hooks, ft.hooks.checkpoint(tmp_path, every=2)]), max_steps=4)
    assert dict(final.hooks) == {"ones": 4, "tens": 40}
    assert dict(ft.load(ft.latest(tmp_path)).hooks) == {"ones": 4, "tens": 40}
    with pytest.raises(ValueError, match="two hooks are named ones"):
        ft.fit(**job(hooks=[counter("ones", 1), counter("ones", 10)]), max_steps=1)


# SimpleTrainer, AMPTrainer.


def test_a_dict_of_losses_is_summed():
    """The model may return a dict; the trainer minimises the sum, and reports each and the total."""
    torch.manual_seed(0)
    model, sgd = nn.Linear(2, 2), ft.optimizer(torch.optim.SGD, lr=0.1)

    def losses(model, batch):
        return {"loss_cls": model(batch).square().mean(), "loss_box": model(batch).abs().mean()}

    start = ft.init_state(model, sgd)
    batch = torch.ones(3, 2)
    apart = ft.supervised_step(model, losses, sgd)(start, batch)
    whole = ft.supervised_step(model, lambda model, batch: sum(losses(model, batch).values()), sgd)(start, batch)
    assert torch.equal(apart.params["weight"], whole.params["weight"])
    assert apart.metrics["loss"] == apart.metrics["loss_cls"] + apart.metrics["loss_box"]


def test_data_time_is_measured():
    """`data_time`: seconds that the step waited for its batch, apart from the step's own."""
    final = ft.fit(**job(hooks=[ft.hooks.iteration_timer()]), max_steps=3)
    assert {"time/data", "time/step", "time/total"} <= final.metrics.keys()
    assert final.metrics["time/total"] >= final.metrics["time/step"] + final.metrics["time/data"]


def test_a_loss_that_is_not_finite_is_told():
    """There FloatingPointError at once; here so by on_nonfinite="raise", and by default the update is skipped."""

    def broken(model, batch):
        return model(batch).sum() * math.inf

    sgd, model = ft.optimizer(torch.optim.SGD, lr=0.1), nn.Linear(2, 1)
    state = ft.init_state(model, sgd)
    with pytest.raises(FloatingPointError, match="loss"):
        ft.supervised_step(model, broken, sgd, on_nonfinite="raise")(state, torch.ones(2, 2))
    skipped = ft.supervised_step(model, broken, sgd)(state, torch.ones(2, 2))
    assert skipped.metrics["skipped_steps"] == 1
    assert torch.equal(skipped.params["weight"], state.params["weight"])


def test_gradients_can_be_changed_after_the_backward():
    """after_backward: a function of the gradients by name, before clipping."""
    halved = job(transform_grads=lambda grads: {name: grad / 2 for name, grad in grads.items()})
    slow = job(lr=0.05)
    one, other = (ft.fit(**made, max_steps=1) for made in (halved, slow))
    torch.testing.assert_close(dict(one.params), dict(other.params))


# LRScheduler, checkpoints.


def test_resume_at_12_of_step_lr_3_has_lr_1e_minus_5_and_counts_12(tmp_path):
    """12 steps of StepLR(3) from 0.1: 1e-5 comes next, and a resumed run begins with it, whatever rate it was given."""
    steps = []
    look = ft.hook(after_step=lambda state: steps.append((state.step, round(state.metrics["lr"], 9))))
    schedule = ft.schedules.from_torch(StepLR, lr=0.1, num_steps=20, step_size=3)
    hooks = [look, ft.hooks.checkpoint(tmp_path, every=10)]
    ft.fit(**job(lr=schedule, hooks=hooks), max_steps=12)
    assert [path.name for path in ft.shell.checkpoints.save_load.checkpoints(tmp_path)] == [
        "step_00000012",
        "step_00000010",
    ]
    assert steps[-1] == (12, 1e-4)
    again = job(lr=schedule, hooks=hooks)
    resumed = ft.resume_or(again["state"], tmp_path)
    assert resumed.step == 12
    assert schedule(resumed.step) == pytest.approx(1e-5)
    ft.fit(**{**again, "state": resumed}, max_steps=13)
    assert steps[-1] == (13, 1e-5)


def test_periodic_checkpoints_and_the_last(tmp_path):
    """PeriodicCheckpointer(period=5, max_iter=12, max_to_keep=2) keeps the last two, the final one among them."""
    ft.fit(**job(hooks=[ft.hooks.checkpoint(tmp_path, every=5, keep_last=2)]), max_steps=12)
    assert [path.name for path in ft.shell.checkpoints.save_load.checkpoints(tmp_path)] == [
        "step_00000012",
        "step_00000010",
    ]


@pytest.mark.parametrize(
    ("scores", "mode", "saved"),
    [
        ([math.nan, 0.8, 0.9, 0.9], "min", [2]),
        ([math.nan, 0.8, 0.9, 0.9], "max", [2, 3]),
        ([0.5, math.inf, 0.4, math.nan, 0.6], "max", [1, 5]),
        ([None, 0.3, None, 0.2], "min", [2, 4]),
    ],
)
def test_the_best_checkpointer_saves_when_the_score_is_better(tmp_path, monkeypatch, scores, mode, saved):
    """[nan, .8, .9, .9] with mode "min" saves exactly once: a nan neither is the best nor blocks what comes after."""
    steps = []
    save = ft.shell.checkpoints.saver.Saver.save
    monkeypatch.setattr(
        ft.shell.checkpoints.saver.Saver,
        "save",
        lambda self, state, then: steps.append(state.step) or save(self, state, then),
    )

    def report(state):
        score = scores[state.step - 1]
        return None if score is None else state.replace(metrics={**state.metrics, "bbox/AP50": score})

    hooks = [ft.hook(after_step=report), ft.hooks.best_checkpoint(tmp_path, "bbox/AP50", mode=mode)]
    ft.fit(**job(hooks=hooks), max_steps=len(scores))
    assert steps == saved
    assert ft.latest(tmp_path).name == f"step_{saved[-1]:08d}"


def test_the_best_checkpointer_test_can_fail(tmp_path):
    """A comparison that lets nan in saves at other steps."""
    best, wrong = -math.inf, []
    for step, score in enumerate([math.nan, 0.8, 0.9, 0.9], 1):
        if not score <= best:
            best, _ = score, wrong.append(step)
    assert wrong != [2, 3]


# PreciseBN, EvalHook.


def test_evaluation_leaves_the_model_as_it_was():
    """inference_context: the train/eval flag of every module, buffers and generators are as before."""
    made = job()
    model = made["step_fn"].model
    model[1].eval()
    evaluate = ft.hooks.evaluate(
        ft.evaluation(model, lambda model, batch: {"mean": model(batch).mean()}, torch.rand(9, 3)), every=2
    )
    flags = [module.training for module in model.modules()]
    with_it = ft.fit(**{**made, "hooks": [evaluate]}, max_steps=5)
    assert flags == [module.training for module in model.modules()]
    other = job()
    other["step_fn"].model[1].eval()
    assert ft.fit(**other, max_steps=5) == with_it


def test_precise_bn_leaves_training_as_it_was():
    """Parameters are those of a run without it: training does not read the running statistics."""
    made = job()
    hook = ft.hooks.precise_bn(made["step_fn"].model, torch.rand(32, 3), every=2)
    with_it = ft.fit(**{**made, "hooks": [hook]}, max_steps=5)
    plain = ft.fit(**job(), max_steps=5)
    assert with_it.replace(buffers={}) == plain.replace(buffers={})
    assert not torch.equal(with_it.buffers["1.running_mean"], plain.buffers["1.running_mean"])
