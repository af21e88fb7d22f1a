"""Recipe, build, run and default_hooks: a training job as a value, and what happens to its directory."""

import itertools
import json
import logging
import pathlib
import pickle
import re
import sys
from types import SimpleNamespace

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fntrain as ft
from fntrain.core.ranks import Ranks
from fntrain.core.source import shared
from fntrain.jobs.defaults import from_position

ROOT = pathlib.Path(__file__).parents[2]


@attrs.frozen(kw_only=True)
class Config(ft.Config):
    width: int = 8


def samples(_config=None, count=96):
    generator = torch.Generator().manual_seed(0)
    return [{"x": x, "y": x.sum(0, keepdim=True)} for x in torch.randn(count, 4, generator=generator)]


def build_model(config):
    return nn.Sequential(nn.Linear(4, config.width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(config.width, 1))


def loss_fn(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])


def build_evaluation(_config, model):
    return ft.evaluation(model, lambda model, batch: {"mse": loss_fn(model, batch)}, samples(count=32))


def quiet_hooks(job, *own, **options):
    return ft.default_hooks(job, *own, writers=(), **options)


RECIPE = ft.Recipe(
    config=Config(max_steps=6, batch_size=16, lr=1e-2, log_every=2, eval_every=2, checkpoint_every=2),
    build_model=build_model,
    build_data=samples,
    loss_fn=loss_fn,
    build_evaluation=build_evaluation,
    build_hooks=quiet_hooks,
)


def config(directory, **changed):
    return attrs.evolve(RECIPE.config, output_dir=str(directory), **changed)


class StoppedError(Exception):
    pass


def stopping_at(step, recipe=RECIPE):
    """The recipe with a hook that raises after a step, as a kill would end it."""

    def fail(state):
        if state.step == step:
            raise StoppedError

    def build_hooks(job):
        return [*recipe.build_hooks(job), ft.hook(after_step=fail)]

    return attrs.evolve(recipe, build_hooks=build_hooks)


def same_bits_after_a_stop(tmp_path, recipe, again=ft.run):
    """Law: stopped at step 3 (saved: 2) and run again ends with the state and the results of one never stopped."""
    whole = ft.run(recipe, config(tmp_path / "whole"))
    with pytest.raises(StoppedError):
        ft.run(stopping_at(3, recipe), config(tmp_path / "stopped"))
    resumed = again(recipe, config(tmp_path / "stopped"))
    return resumed.state == whole.state and resumed.results == whole.results


# What run does.


def batches(_config):
    """Not a stream: batches from the first one on, each time."""
    for start in range(100):
        yield {"x": torch.full((8, 4), start / 100), "y": torch.ones(8, 1)}


DATA = {
    "data set": samples,
    "stream": lambda config: ft.data.stream(samples(), 8, seed=3),
    "generator": batches,
    "list in a DataLoader": lambda config: torch.utils.data.DataLoader(samples(), batch_size=12),
    "shuffled DataLoader": lambda config: torch.utils.data.DataLoader(samples(), batch_size=12, shuffle=True),
}


@pytest.mark.parametrize("build_data", DATA.values(), ids=DATA)
def test_a_run_that_was_stopped_and_run_again_ends_with_the_same_bits(tmp_path, build_data):
    """Whatever kind of data the recipe has."""
    assert same_bits_after_a_stop(tmp_path, attrs.evolve(RECIPE, build_data=build_data))


class FiniteStream:
    """Data that starts anywhere, and is each rank's own."""

    def at(self, position):
        return itertools.islice(batches(None), position, None)


@pytest.mark.parametrize(
    "data", [lambda: list(batches(None)), lambda: batches(None), FiniteStream], ids=["list", "once", "at"]
)
def test_a_rank_resumes_its_own_share(tmp_path, monkeypatch, data):
    """Fault of before: on ranks it was no share any more after a stop, and alone it hid where data can start."""
    build_data = lambda config: ft.data.own_share(data())  # noqa: E731
    assert same_bits_after_a_stop(tmp_path, attrs.evolve(RECIPE, build_data=build_data))
    monkeypatch.setattr("fntrain.jobs.defaults.ranks", lambda: SimpleNamespace(world_size=2))
    rest = shared(from_position(2, build_data(None)), Ranks(rank=1, world_size=2))
    rest = rest.at(2) if hasattr(rest, "at") else rest
    expected = next(itertools.islice(batches(None), 2, None))
    assert torch.equal(next(rest)["x"], expected["x"])


def test_that_law_can_fail(tmp_path):
    """A run that reads its data from the first batch again ends elsewhere."""

    def from_the_first(recipe, config):
        job = ft.build(recipe, config)
        state = ft.resume_or(job.state, config.output_dir)
        final = ft.fit(job.step_fn, state=state, data=job.data, max_steps=config.max_steps)
        return ft.jobs.recipe.Result(state=final, results=job.evaluation(final))

    recipe = attrs.evolve(RECIPE, build_data=batches)
    assert not same_bits_after_a_stop(tmp_path, recipe, again=from_the_first)


def test_passing_over_data_is_told(tmp_path, caplog):
    """Because it takes time; a stream starts where the run is."""
    recipe = attrs.evolve(RECIPE, build_data=batches)
    ft.run(recipe, config(tmp_path))
    ft.run(recipe, config(tmp_path, max_steps=8))
    assert "data: generator starts at its first batch; passing over 6" in caplog.text


@pytest.mark.parametrize("max_steps", [4, 5])
def test_results_are_those_of_the_last_state_and_measured_once(tmp_path, max_steps):
    """Whether the last step is one of the evaluation's period or not, or the run had nothing left to do."""
    asked = []

    def build_evaluation(_config, _model):
        return lambda state: asked.append(state.step) or {"deep": {"step": state.step}}

    recipe = attrs.evolve(RECIPE, build_evaluation=build_evaluation)
    assert ft.run(recipe, config(tmp_path, max_steps=max_steps)).results == {"deep/step": max_steps}
    assert asked == sorted({2, 4, max_steps})
    assert ft.run(recipe, config(tmp_path, max_steps=max_steps)).results == {"deep/step": max_steps}
    assert asked == [*sorted({2, 4, max_steps}), max_steps]


def test_results_of_a_run_that_a_hook_stopped_are_of_that_step(tmp_path):
    """The evaluation runs after the step that was the last, not after max_steps."""
    stop = ft.hooks.stop_when(lambda state: state.step == 3, "enough")
    recipe = attrs.evolve(RECIPE, build_hooks=lambda job: quiet_hooks(job, stop))
    result = ft.run(recipe, config(tmp_path))
    assert result.state.step == 3 and "enough" in result.state.run.stop.reason
    assert result.results == dict(ft.run(recipe, config(tmp_path), eval_only=True).results)


def test_timed_hooks_measure_once_too(tmp_path):
    """The evaluation is found inside `hooks.timed`."""
    asked = []
    recipe = attrs.evolve(
        RECIPE,
        build_evaluation=lambda _config, _model: lambda state: asked.append(state.step) or {"step": state.step},
        build_hooks=lambda job: [ft.hooks.timed(quiet_hooks(job))],
    )
    assert ft.run(recipe, config(tmp_path, max_steps=5)).results == {"step": 5}
    assert asked == [2, 4, 5]


def test_a_stop_at_once_is_not_followed_by_an_evaluation(tmp_path):
    """The process may be killed soon: what was not measured is not in the results; what was, is."""
    asked = []

    def ends(state):
        return ft.stop(state, "killed", at_once=True) if state.step == at else None

    recipe = attrs.evolve(
        RECIPE,
        build_evaluation=lambda _config, _model: lambda state: asked.append(state.step) or {"step": state.step},
        build_hooks=lambda job: quiet_hooks(job, ft.hook(after_step=ends)),
    )
    for at, results in ((3, {}), (4, {"step": 4.0})):
        result = ft.run(recipe, config(tmp_path))
        assert (result.state.step, result.results) == (at, results)
    assert asked == [2, 4]


def test_results_are_not_those_of_other_weights(tmp_path):
    """A hook that evaluates averages under the usual prefix does not stand in for the recipe's evaluation."""

    def build_hooks(job):
        return [ft.hooks.ema(0.5), ft.hooks.evaluate(job.evaluation, every=1, weights="ema"),
                ft.hooks.checkpoint(job.config.output_dir, every=6)]  # fmt: skip

    recipe = attrs.evolve(RECIPE, build_hooks=build_hooks)
    trained = ft.run(recipe, config(tmp_path))
    assert trained.results["mse"] != trained.state.metrics["eval/mse"]
    assert trained.results == ft.run(recipe, config(tmp_path)).results


def test_eval_only_measures_and_writes_nothing(tmp_path):
    """The newest checkpoint, or weights; without either, or without an evaluation, an error that says so."""
    trained = ft.run(RECIPE, config(tmp_path / "run"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = ft.run(RECIPE, config(tmp_path / "run", lr=7.0), eval_only=True)
    assert result.state == trained.state and result.results == trained.results
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    weights = str(ft.export(trained.state, tmp_path / "model.safetensors"))
    fresh = ft.run(RECIPE, config(tmp_path / "none", weights=weights), eval_only=True)
    assert fresh.results == trained.results and not (tmp_path / "none").exists()
    with pytest.raises(ft.CheckpointError, match="none: holds no checkpoint to evaluate"):
        ft.run(RECIPE, config(tmp_path / "none"), eval_only=True)
    with pytest.raises(ft.CheckpointError, match="without resume: no checkpoint"):
        ft.run(RECIPE, config(tmp_path / "run"), eval_only=True, resume=False)
    with pytest.raises(ft.ConfigError, match="build_evaluation"):
        ft.run(
            attrs.evolve(RECIPE, build_evaluation=ft.jobs.defaults.no_evaluation),
            config(tmp_path / "run"),
            eval_only=True,
        )


def test_weights_are_read_by_the_first_run_alone(tmp_path):
    """A run that goes on has its own, also when the file has gone since."""
    weights = ft.export(build_model(RECIPE.config), tmp_path / "model.safetensors")
    settings = config(tmp_path / "run", weights=str(weights), max_steps=2)
    assert ft.build(RECIPE, settings).model[0].weight.equal(ft.build(RECIPE, settings).model[0].weight)
    assert not ft.build(RECIPE, settings).model[0].weight.equal(ft.build(RECIPE).model[0].weight)
    ft.run(RECIPE, settings)
    weights.unlink()
    assert ft.run(RECIPE, attrs.evolve(settings, max_steps=4)).state.step == 4
    with pytest.raises(ft.CheckpointError, match=r"model.safetensors: no such file"):
        ft.run(RECIPE, attrs.evolve(settings, output_dir=str(tmp_path / "other")))


def test_a_run_that_is_refused_leaves_the_config_of_the_directory(tmp_path, caplog):
    """Another width, another seed, a used directory without resume: an error, and config.json is as it was."""
    ft.run(RECIPE, config(tmp_path))
    kept = (tmp_path / "config.json").read_text()
    for changed, resume, message in [
        ({"width": 9}, True, r"checkpoint has \(8,\).*model has \(9,\)"),
        ({"seed": 9}, True, "seed is 0, this run has 9"),
        ({"lr": 9.0}, False, "is of a later step"),
    ]:
        with pytest.raises(ft.CheckpointError, match=message):
            ft.run(RECIPE, config(tmp_path, **changed), resume=resume)
    assert (tmp_path / "config.json").read_text() == kept
    ft.run(RECIPE, config(tmp_path, max_steps=8, lr=0.5))
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.5
    assert [record.message.partition(": ")[2] for record in caplog.records if "config changed" in record.message] == [
        "max_steps: 6 -> 8",
        "lr: 0.01 -> 0.5",
    ]


def test_two_runs_in_one_process_are_two_runs(tmp_path):
    """One recipe built twice: nothing is shared, and what the first leaves in the generators does not matter."""
    first = ft.run(RECIPE, config(tmp_path / "a"))
    torch.rand(5)
    assert ft.run(RECIPE, config(tmp_path / "b")).state == first.state
    job, again = ft.build(RECIPE), ft.build(RECIPE)
    assert job.model is not again.model and job.state == again.state


def test_a_relative_directory_is_below_the_current_one(tmp_path, monkeypatch):
    """As written in the config."""
    monkeypatch.chdir(tmp_path)
    ft.run(RECIPE, config("runs/a b", max_steps=2))
    assert ft.latest(tmp_path / "runs" / "a b").name == "step_00000002"


# Parts.


def test_a_recipe_is_a_value():
    """Equal to its like, pickled as its functions are, and printed by their names, without what is the default."""
    assert attrs.evolve(RECIPE) == RECIPE != attrs.evolve(RECIPE, loss_fn=lambda model, batch: 0)
    assert pickle.loads(pickle.dumps(RECIPE)) == RECIPE
    text = repr(RECIPE)
    assert text.endswith("build_model=build_model, build_data=samples, loss_fn=loss_fn, "
                         "build_evaluation=build_evaluation, build_hooks=quiet_hooks)")  # fmt: skip
    assert " at 0x" not in text


def told(recipe, settings=None):
    """What each part of a job is, in words."""
    job = ft.build(recipe, settings)
    return {
        "model": repr(job.model),
        "weights": [param.tolist() for param in job.model.parameters()],
        "optimizer": repr(job.optimizer),
        "data": [{k: v.tolist() for k, v in one.items()} for one, _ in zip(job.data.at(0), range(2), strict=False)],
        "hooks": repr(job.hooks),
        "loss": recipe.loss_fn,
    }


EVOLVED = {
    "optimizer": ("optimizer", {"build_optimizer": lambda config, model: ft.optimizer(torch.optim.SGD, lr=0.1)}),
    "data": ("data", {"build_data": lambda config: samples(count=40)}),
    "loss": ("loss", {"loss_fn": lambda model, batch: (model(batch["x"]) - batch["y"]).abs().mean()}),
    "hooks": ("hooks", {"build_hooks": lambda job: [ft.hooks.iteration_timer()]}),
}


def changes(evolve, part):
    old, new = told(RECIPE), told(evolve(RECIPE, **EVOLVED[part][1]))
    return {name for name in old if old[name] != new[name]}


@pytest.mark.parametrize("part", EVOLVED)
def test_a_recipe_evolved_in_one_part_builds_all_others_the_same(part):
    """Law: first weights, data order and the rest do not hang on each other."""
    assert changes(attrs.evolve, part) == {EVOLVED[part][0]}


def test_that_law_can_fail_too():
    """A loss that brings another model with it changes two parts."""
    assert len(changes(lambda recipe, **part: attrs.evolve(recipe, build_model=lambda c: nn.Linear(4, 1), **part), "loss")) > 2  # fmt: skip


def test_models_without_vectors_and_with_vectors_alone_have_the_default_optimizer():
    """The group without decay is there if something is in it."""
    for model in (nn.Linear(4, 1, bias=False), nn.LayerNorm(4)):
        parts = {
            "build_model": lambda config, model=model: model,
            "loss_fn": lambda model, batch: model(batch["x"]).mean(),
        }
        job = ft.build(attrs.evolve(RECIPE, **parts))
        ft.fit(job.step_fn, state=job.state, data=job.data, max_steps=1)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"build_model": lambda config: None}, "build_model: returned NoneType, expected a torch.nn.Module"),
        ({"build_data": lambda config: None}, "build_data: returned NoneType, expected a data set, a stream"),
        ({"build_optimizer": lambda config, model: torch.optim.SGD(model.parameters())}, "expected ft.optimizer"),
        ({"build_step": lambda *parts: None}, "build_step: returned NoneType, expected a step function"),
        ({"build_evaluation": lambda *parts: {}}, r"build_evaluation: returned dict, expected ft.evaluation\(...\) or None"),
        ({"build_hooks": lambda job: None}, "build_hooks: returned NoneType, expected hooks"),
    ],
)  # fmt: skip
def test_a_part_that_returns_something_else_is_named(part, message):
    """With what was got and what was expected."""
    with pytest.raises(TypeError, match=message):
        ft.build(attrs.evolve(RECIPE, **part))


def test_hooks_may_be_one_several_or_made_one_by_one():
    """Whatever fit takes, and a generator."""
    timer = ft.hooks.iteration_timer()
    for hooks in (timer, ft.every(2, timer), ft.compose(timer, ft.hook()), [timer], [(timer,)]):
        assert ft.build(attrs.evolve(RECIPE, build_hooks=lambda job, hooks=hooks: hooks)).named_hooks[0] == timer
    assert ft.build(attrs.evolve(RECIPE, build_hooks=lambda job: (hook for hook in [timer]))).hooks == (timer,)


def test_a_config_without_its_decorator_is_told():
    """Its fields would be no flags, and not in config.json."""

    class Forgotten(ft.Config):
        width: int = 8

    with pytest.raises(TypeError, match=r"config: Forgotten is no record; put @attrs.frozen"):
        attrs.evolve(RECIPE, config=Forgotten())


def test_a_config_that_is_not_the_recipe_s_is_refused():
    """One without the recipe's own fields would fail somewhere in its functions."""
    for call in (ft.build, ft.run):
        with pytest.raises(TypeError, match=r"got fntrain.jobs.config.Config, expected .*test_recipe.Config"):
            call(RECIPE, ft.Config())


@pytest.mark.parametrize("device", ["cuda:17", "bogus"])
def test_a_device_that_is_not_there_is_told(device):
    """In one line, with what to give instead."""
    with pytest.raises(ft.ConfigError, match=f"device: got '{device}'.*'auto'"):
        ft.build(RECIPE, attrs.evolve(RECIPE.config, device=device))


def test_a_warm_up_of_all_steps_is_told():
    """What a short trial of a recipe with warm-up comes to."""
    with pytest.raises(ft.ConfigError, match="warmup_steps: got 6, expected fewer than max_steps=6"):
        ft.build(RECIPE, attrs.evolve(RECIPE.config, warmup_steps=6))


# Hooks.

count = ft.stateful("count", 0, after_step=lambda state: ft.remember(state, "count", state.hooks["count"] + 1))
OWN = {
    "stateful": lambda job: [count],
    "reports": lambda job: [ft.hooks.memory_stats(every=2)],
    "best": lambda job: [ft.hooks.best_checkpoint(job.config.output_dir + "/best", "eval/mse", mode="min")],
    "plateau": lambda job: [ft.hooks.reduce_lr_on_plateau("eval/mse", mode="min")],
    "early stopping": lambda job: [ft.hooks.early_stopping("eval/mse", mode="min", patience=9)],
    "rollback": lambda job: [ft.hooks.rollback_on_spike()],
    "profile": lambda job: [ft.hooks.profile(job.config.output_dir + "/trace", when=lambda state: state.step == 1)],
    "ema": lambda job: [ft.hooks.ema()],
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_own_hooks_fit_between_the_usual_ones(tmp_path, own):
    """With memory, reports or checkpoints of their own; and the run resumes with them."""
    recipe = attrs.evolve(RECIPE, build_hooks=lambda job: quiet_hooks(job, *own(job)))
    assert ft.run(recipe, config(tmp_path, max_steps=3)).state.step == 3
    assert ft.run(recipe, config(tmp_path, max_steps=5)).state.step == 5


def test_what_is_evaluated_is_what_hooks_before_the_evaluation_made_of_it(tmp_path):
    """BatchNorm's statistics and averages are there when it is measured, and the best is saved with them."""

    def build_model(config):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def build_hooks(job):
        precise = ft.hooks.precise_bn(job.model, samples(), every=2, forward=loss_fn, batch_size=16)
        best = ft.hooks.best_checkpoint(job.config.output_dir + "/best", "eval/mse", mode="min")
        averages = ft.hooks.evaluate(job.evaluation, every=2, weights="ema", prefix="averages/", name="averages")
        return quiet_hooks(job, averages, best, before_evaluation=[precise, ft.hooks.ema(0.5)])

    recipe = attrs.evolve(RECIPE, build_model=build_model, build_hooks=build_hooks)
    names = [one.name for one in ft.build(recipe).named_hooks]
    assert names == ["on_signal", "iteration_timer", "precise_bn", "ema", "evaluate", "averages", "best_checkpoint",
                     "write_metrics", "checkpoint", "keep_config"]  # fmt: skip
    result = ft.run(recipe, config(tmp_path))
    assert result.results == ft.run(recipe, config(tmp_path), eval_only=True).results
    best = ft.load(ft.latest(tmp_path / "best"))
    assert best.hooks["best_checkpoint"].keys() == {str(best.step)}
    assert ft.predictor(recipe, tmp_path / "best").config == config(tmp_path)


# The second recipe, as the README has it.


def test_a_second_recipe_is_digits_with_other_parts_in_under_15_lines(tmp_path, monkeypatch):
    """Another model and optimizer by attrs.evolve; data, loss, evaluation, own hook and predictor are those of digits."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [text] = [block for block in blocks if "digits.recipe" in block]
    assert len([line for line in text.splitlines() if line]) < 15
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    import digits

    second = {"__name__": "second"}
    exec(text, second)
    settings = attrs.evolve(second["config"], output_dir=str(tmp_path), max_steps=60, eval_every=30)
    result = ft.run(second["recipe"], settings)
    assert result.results["accuracy"] > 0.6 and result.state.hooks["best"] >= result.results["accuracy"]
    assert re.search("SGD.*step_decay.*momentum=0.9", repr(ft.build(second["recipe"], settings).optimizer))
    test = digits.Digits(train=False)
    predict = ft.predictor(second["recipe"], tmp_path)
    digit, probability = predict(test[0]["image"][0] * 16)
    assert digit in range(10) and 0 < probability <= 1
    right = [predict(test[i]["image"][0] * 16)[0] == int(test[i]["label"]) for i in range(len(test))]
    assert sum(right) / len(right) == pytest.approx(result.results["accuracy"])


@pytest.fixture(autouse=True)
def _log_level():
    logger = logging.getLogger("fntrain")
    level = logger.level
    yield
    logger.setLevel(level)
