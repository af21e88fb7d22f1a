"""hooks.reduce_lr_on_plateau: torch's scheduler with its memory in the state, for every form of the step."""

import logging
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fntrain as ft
from fntrain.hooks.plateau import ReduceLROnPlateau
from fntrain.testing import assert_resume_exact, assert_states_equal

FORMS = {"pure": lambda step: step, "in_place": ft.shell.in_place}


def scales(values, **options):
    """The factor after each report of a metric."""
    start = ft.TrainState(step=0, position=0, seed=0, params={})

    def step_fn(state, value):
        return state.advance(metrics={} if value is None else {"m": value})

    hook = ft.hooks.reduce_lr_on_plateau("m", **options)
    run = ft.states(step_fn, hook, state=start, data=values, max_steps=len(values))
    return [ft.steps.rates.lr_scale(state) for state in run]


def torch_scales(values, **options):
    """The same by torch's class."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    options["min_lr"] = options.pop("min_scale", 0.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, eps=0.0, **options)
    found = []
    for value in values:
        if value is not None:
            scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


values = st.lists(
    st.none() | st.sampled_from([0.0, 0.1, 0.5, 0.50001, 1.0, 2.0, math.nan, math.inf]), min_size=1, max_size=25
)


@settings(max_examples=200, deadline=None)
@given(values, st.sampled_from(["min", "max"]), st.integers(0, 3), st.integers(0, 2), st.sampled_from([0.0, 0.2]))
def test_it_is_the_scheduler_of_torch(values, mode, patience, cooldown, min_scale):
    """After every report the factor is torch's, whatever the values; steps that report nothing do not count."""
    options = {"mode": mode, "factor": 0.5, "patience": patience, "cooldown": cooldown, "min_scale": min_scale}
    assert scales(values, **options) == torch_scales(values, **options)


def test_the_comparison_can_fail(monkeypatch):
    """A hook to which nan is an improvement is not torch's."""
    monkeypatch.setattr(ReduceLROnPlateau, "improves", lambda self, value, best: not value >= best)
    values = [1.0, math.nan, 2.0, 2.0]
    assert scales(values, mode="min", patience=0) != torch_scales(values, mode="min", patience=0)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("best", [-2.0, -1e-3, 0.0, 3.0])
def test_what_is_no_better_is_no_improvement(mode, best):
    """A metric may be below 0, as a log-likelihood is: standing still is a plateau there too, a step ahead is none."""
    options = {"mode": mode, "patience": 1, "factor": 0.5, "threshold": 0.1}
    assert scales([best] * 4, **options) == [1.0, 1.0, 0.5, 0.5]
    ahead = 0.3 if mode == "max" else -0.3
    assert scales([best + ahead * abs(best or 1) * k for k in range(4)], **options) == [1.0] * 4


def test_a_run_that_was_stopped_has_the_rates_of_one_that_was_not():
    """An evaluation that runs only because the run ends is no report, as early_stopping has it."""

    def run(*stops):
        state = ft.TrainState(step=0, position=0, seed=0, params={})
        for stop in stops:
            hooks = [ft.hooks.evaluate(lambda state: {"loss": 1.0}, every=4)]
            hooks.append(ft.hooks.reduce_lr_on_plateau("eval/loss", mode="min", patience=2))
            data = iter(range(stop - state.step))
            state = ft.fit(lambda state, _: state.advance(metrics={}), hooks, state=state, data=data, max_steps=stop)
        return state

    assert run(5, 6, 7, 8, 9, 10) == run(10)
    assert ft.steps.rates.lr_scale(run(5, 6, 7, 16)) == 0.1


def make(form, *, optimizer=None, groups=None):
    """A job whose learning rate falls twice."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = optimizer or ft.optimizer(
        torch.optim.AdamW, lr=lambda step: 0.1 / (1 + step), groups=groups, fused=True
    )
    step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), optimizer)
    data = ft.data.stream(torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), 4, seed=0)
    report = ft.hook(after_step=lambda state: state.replace(metrics={**state.metrics, "m": 1.0}))
    hooks = [report, ft.hooks.reduce_lr_on_plateau("m", mode="min", factor=0.5, patience=2)]
    return {"step_fn": FORMS[form](step_fn), "hooks": hooks, "state": ft.init_state(model, optimizer), "data": data}


@pytest.mark.parametrize("form", FORMS)
def test_the_memory_is_in_the_checkpoint(form):
    """A run resumed at any step, also between two reductions, ends with the same bits."""
    assert_resume_exact(lambda: make(form), num_steps=8)


@pytest.mark.parametrize("form", FORMS)
def test_the_step_uses_and_reports_the_product(form):
    """The metric `lr` is schedule times factor, and the update is that of a schedule which falls at those steps."""
    run = list(map(ft.snapshot, ft.states(**make(form), max_steps=8)))
    factors = [1.0] * 4 + [0.5] * 3 + [0.25]
    assert [state.metrics["lr"] for state in run] == [0.1 / (1 + k) * f for k, f in enumerate(factors)]

    def lr(step):
        return 0.1 / (1 + step) * factors[step]

    by_hand = make(form, optimizer=ft.optimizer(torch.optim.AdamW, lr=lr, fused=True))
    by_hand["hooks"] = []
    plain = ft.snapshot(ft.fit(**by_hand, max_steps=8))
    assert_states_equal(run[-1].replace(hooks={}, extra={}), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_every_group_is_scaled(form, cls):
    """The factor multiplies constant rates, scheduled rates and those of groups alike."""
    groups = [ft.group("bias", lr_scale=2.0), ft.group("weight", lr=0.3)]
    states = []
    for scale in (1.0, 0.5):
        job = make(
            form, optimizer=ft.optimizer(cls, lr=0.2 * scale, groups=[groups[0], ft.group("weight", lr=0.3 * scale)])
        )
        job["hooks"] = []
        job["state"] = job["state"].replace(extra={"lr_scale": 0.5 / scale})
        states.append(ft.snapshot(ft.fit(**job, max_steps=3)).replace(extra={}))
    assert_states_equal(*states)


def test_a_program_takes_the_factor_as_an_input(tmp_path):
    """A compiled step is not built again when the factor changes, and follows the eager one."""
    job = make("pure")
    eager = ft.fit(**{**job, "step_fn": job["step_fn"]}, max_steps=8)
    again = make("pure")
    compiled = ft.shell.compile_step(again["step_fn"], directory=tmp_path)
    final = ft.fit(**{**again, "step_fn": compiled}, max_steps=8)
    assert compiled.num_compiled <= 1
    for name, value in eager.params.items():
        torch.testing.assert_close(final.params[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"mode": "up"}, {"mode": "min", "factor": 1.0}, {"mode": "min", "factor": 0}, {"mode": "min", "patience": -1}],
)
def test_bad_arguments_are_refused(options):
    """The argument, what was got and what was expected."""
    with pytest.raises(ValueError, match=r"(mode|factor|patience): got .*, expected"):
        ft.hooks.reduce_lr_on_plateau("m", **options)


def test_it_is_a_value():
    """Equal, printed and pickled as a record."""
    hook = ft.hooks.reduce_lr_on_plateau("m", mode="min")
    assert hook == ft.hooks.reduce_lr_on_plateau("m", mode="min") == pickle.loads(pickle.dumps(hook))


def test_an_evaluation_that_runs_only_because_the_run_ends_does_not_count(tmp_path):
    """Stopped between two evaluations and resumed, the run ends with the bits of one never stopped."""

    def end(root, *stops):
        for stop in stops:
            job = make("pure")
            hooks = [
                ft.hooks.evaluate(lambda state: {"m": 1.0}, every=4),
                ft.hooks.reduce_lr_on_plateau("eval/m", mode="min", factor=0.5, patience=1),
                ft.hooks.checkpoint(root, every=4, asynchronous=False),
            ]
            job |= {"hooks": hooks, "state": ft.resume_or(job["state"], root)}
            final = ft.fit(**job, max_steps=stop)
        return final

    assert_states_equal(end(tmp_path / "a", 5, 10, 13), end(tmp_path / "b", 13))


def test_a_metric_that_never_came_is_told(caplog):
    """A misspelt name would otherwise never be noticed."""
    with caplog.at_level(logging.WARNING, "fntrain"):
        scales([None, None], mode="min")
        scales([], mode="min")
        scales([1.0], mode="min")
    assert [record.getMessage() for record in caplog.records] == [
        "reduce_lr_on_plateau: saw no 'm' that is finite; list it after the hook that reports it"
    ]
