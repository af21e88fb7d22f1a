"""predictor: a trained recipe as a function of raw inputs."""

import json
import shutil

import attrs
import pytest
import torch
from test_recipe import RECIPE, build_model, config, samples
from torch import nn

import fntrain as ft

PREDICTING = attrs.evolve(
    RECIPE,
    preprocess=lambda raw: {"x": torch.tensor(raw, dtype=torch.float32)},
    predict_fn=lambda model, batch: {"y": model(batch["x"]).squeeze(-1)},
    postprocess=lambda output: float(output["y"]),
)
RAWS = [[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 0.5, 0.0, 2.0]]


@pytest.fixture
def trained(tmp_path):
    """A run with another width than the recipe's own, and its directory."""
    directory = tmp_path / "run"
    return ft.run(PREDICTING, config(directory, width=13)), directory


def by_hand(state):
    model = build_model(config("unused", width=13)).eval()
    ft.load_into(model, state)
    with torch.no_grad():
        return [model(torch.tensor([raw])).item() for raw in RAWS]


def test_every_kind_of_checkpoint_predicts_the_same(trained, tmp_path):
    """A run's directory, one checkpoint, an exported file, a file inside of a checkpoint, a state."""
    result, run = trained
    wanted = by_hand(result.state)
    settings = config(run, width=13)
    ft.export(result.state, run / "model.safetensors")
    ft.export(result.state, tmp_path / "elsewhere.safetensors")
    predictors = [
        ft.predictor(PREDICTING, run),
        ft.predictor(PREDICTING, str(run)),
        ft.predictor(PREDICTING, ft.latest(run)),
        ft.predictor(PREDICTING, ft.latest(run) / "model.safetensors"),
        ft.predictor(PREDICTING, run / "model.safetensors"),
        ft.predictor(PREDICTING, tmp_path / "elsewhere.safetensors", config=settings),
        ft.predictor(PREDICTING, result.state, config=settings),
    ]
    for predict in predictors:
        assert [predict(raw) for raw in RAWS] == pytest.approx(wanted, abs=1e-6)
        assert predict.config == settings


def test_a_run_elsewhere_has_its_settings_there(tmp_path, monkeypatch):
    """Where fsspec reaches, config.json is beside the checkpoints as well, and nothing on the disk."""
    monkeypatch.chdir(tmp_path)
    settings = config("memory://test_predictor/runs", width=13)
    result = ft.run(PREDICTING, settings)
    assert ft.run(PREDICTING, attrs.evolve(settings, max_steps=8)).state.step == 8
    predict = ft.predictor(PREDICTING, "memory://test_predictor/runs/step_00000006")
    assert predict.config == attrs.evolve(settings, max_steps=8)
    assert predict(RAWS[0]) == ft.predictor(PREDICTING, result.state, config=settings)(RAWS[0])
    best = ft.save(result.state, "memory://test_predictor/runs/best")
    assert ft.predictor(PREDICTING, best).config == ft.predictor(PREDICTING, best.parent).config == predict.config
    assert list(tmp_path.iterdir()) == []


def test_batches_are_their_samples(trained):
    """Whatever the size of the batches; none gives none; any iterable will do."""
    predict = ft.predictor(PREDICTING, trained[1])
    one_by_one = [predict(raw) for raw in RAWS]
    for size in (1, 2, 3, 256):
        assert predict.batch(iter(RAWS), batch_size=size) == pytest.approx(one_by_one, abs=1e-6)
    assert predict.batch([]) == []
    with pytest.raises(ValueError, match="batch_size: got 0"):
        predict.batch(RAWS, batch_size=0)


def test_training_goes_on_without_it(trained):
    """The model is its own, in eval mode and without gradients; the state it was made of stays."""
    state = trained[0].state
    digest = ft.digest(state)
    predict = ft.predictor(PREDICTING, state, config=config("unused", width=13))
    predict(RAWS[0])
    assert not predict.model.training and not any(param.requires_grad for param in predict.model.parameters())
    assert ft.digest(state) == digest
    assert repr(predict).startswith("Predictor(model=Sequential, config=Config(")


def test_a_device_of_another_machine_can_be_replaced(trained):
    """The settings of a run say where it was trained; that need not be here."""
    kept = trained[1] / "config.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"device": "cuda:17"}))
    with pytest.raises(ft.ConfigError, match="device: got 'cuda:17'"):
        ft.predictor(PREDICTING, trained[1])
    assert ft.predictor(PREDICTING, trained[1], device="cpu").config.device == "cpu"


def test_settings_of_something_else_are_told(trained, tmp_path):
    """A config.json that other libraries write beside their weights; and one that is damaged."""
    result, run = trained
    for text in ('{"architectures": ["Bert"]}', "{", "[1]"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.json").write_text(text)
        path = ft.export(result.state, tmp_path / "other" / "model.safetensors")
        with pytest.raises(ft.ConfigError, match=r"other/config.json: is not of this recipe .*; give config=\.\.\."):
            ft.predictor(PREDICTING, path)
        assert ft.predictor(PREDICTING, path, config=config(run, width=13))(RAWS[0]) is not None


def test_nothing_there_is_told(trained, tmp_path):
    """No such path, no checkpoint in it, one of another model."""
    with pytest.raises(ft.CheckpointError, match="nope: no such file"):
        ft.predictor(PREDICTING, tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ft.CheckpointError, match="empty: holds no safetensors file"):
        ft.predictor(PREDICTING, tmp_path / "empty")
    shutil.copytree(ft.latest(trained[1]), tmp_path / "moved" / "far" / "away")
    with pytest.raises(ft.CheckpointError, match="does not fit Sequential"):
        ft.predictor(PREDICTING, tmp_path / "moved" / "far" / "away")


def test_outputs_that_are_no_batch_are_told():
    """A mean over the samples can't be taken apart."""
    recipe = attrs.evolve(PREDICTING, predict_fn=lambda model, batch: model(batch["x"]).mean())
    state = ft.build(recipe).state
    with pytest.raises(ValueError, match=r"predict_fn: gave an output of shape \(\) for 2 samples"):
        ft.predictor(recipe, state).batch(RAWS[:2])


def test_a_recipe_without_the_three_functions_predicts_from_samples():
    """Then a raw input is a sample, and the result what the model gives for it."""
    recipe = ft.Recipe(build_model=lambda config: nn.Linear(4, 1), build_data=samples, loss_fn=RECIPE.loss_fn)
    predict = ft.predictor(recipe, ft.build(recipe).state)
    assert predict(torch.ones(4)).shape == (1,)
