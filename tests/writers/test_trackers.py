"""Experiment trackers: what a run reports arrives once, in one run, also after a kill; without them nothing begins."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import trackers

import fntrain as ft
from fntrain import TrainState
from fntrain.writers.trackers.tracker import Tracked

NAMES = sorted(trackers.FAKES)


def writer_of(tracker, directory, **options):
    return getattr(ft.writers, tracker)("digits", directory, **options)


def fresh(step=0):
    return TrainState(step=step, position=step, seed=0, params={})


class Endless:
    def at(self, position):
        while True:
            yield position
            position += 1


def step_fn(state, batch):
    return state.advance(metrics={"loss": float(state.step + 1)})


def media_step(state, batch):
    with ft.events.collecting() as collector:
        ft.put_image("digit", torch.tensor([[[0.0, 1.0], [0.5, 2.0]]]))
        ft.put_image("rgb", torch.full((3, 2, 2), 7, dtype=torch.uint8))
        ft.put_histogram("weights", torch.arange(4, dtype=torch.bfloat16))
        ft.put_text("sample", "1 < 2")
        ft.put_scalar("loss", float(state.step + 1))
    return state.advance(metrics=ft.events.merge([(collector, 1.0)]))


def fit(writer, max_steps, *, fn=step_fn, start=0, every=20, hooks=()):
    hooks = [*hooks, ft.hooks.write_metrics(writer, every=every, window=1)]
    return ft.fit(fn, hooks, state=fresh(start), data=Endless(), max_steps=max_steps)


# What arrives.


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_settings_arrive(name, tmp_path, monkeypatch):
    """Every row is in the tracker at its step, with the run's settings, and the run is finished."""
    module = trackers.install(monkeypatch, name)
    evaluate = ft.hooks.evaluate(lambda state: {"n": 1.0}, every=15)
    fit(writer_of(name, tmp_path, hparams={"lr": 0.1, "depth": 3}), 50, hooks=[evaluate])
    [run] = module.runs.values()
    assert trackers.points(run, "loss") == [(20, 20.0), (40, 40.0), (50, 50.0)]
    assert [step for step, _ in trackers.points(run, "eval/n")] == [15, 30, 45, 50]
    settings = run.settings[0]["config"] if name == "wandb" else run.params if name == "mlflow" else run.config
    assert settings == ({"lr": "0.1", "depth": "3"} if name == "mlflow" else {"lr": 0.1, "depth": 3})
    assert getattr(run, "status", getattr(run, "state", None)) in ("finished", "FINISHED")
    assert json.loads((tmp_path / f"{name}.json").read_text()) == {"run": next(iter(module.runs)), "step": 50}


@pytest.mark.parametrize("name", NAMES)
def test_media_arrive_where_the_tracker_has_them(name, tmp_path, monkeypatch):
    """Images come as (height, width, 3) uint8, histograms as flat numbers, texts as they are."""
    module = trackers.install(monkeypatch, name)
    fit(writer_of(name, tmp_path), 2, fn=media_step)
    [run] = module.runs.values()
    if name == "mlflow":
        got = {key: image for key, step, image in run.images if step == 2}
        assert run.texts == {"sample/step_00000001.md": "1 < 2", "sample/step_00000002.md": "1 < 2"}
    else:
        row = run.rows[2] if name == "wandb" else dict(run.logs)[2]
        got = {key: getattr(medium, "value", medium) for key, medium in row.items()}
        assert got["weights"].tolist() == [0, 1, 2, 3]
        assert got["sample"] == ("<pre>1 &lt; 2</pre>" if name == "wandb" else "1 < 2")
    assert got["digit"].dtype == np.uint8
    assert got["digit"].tolist() == [[[0] * 3, [255] * 3], [[128] * 3, [255] * 3]]
    assert got["rgb"].tolist() == [[[7] * 3] * 2] * 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_medium_is_named(name, tmp_path, monkeypatch):
    """A metric that a tracker can't show is an error."""
    trackers.install(monkeypatch, name)
    odd = lambda state, batch: state.advance(metrics={"odd": "text"})  # noqa: E731
    with pytest.raises(TypeError, match=r"metrics\['odd'\]: got str"):
        fit(writer_of(name, tmp_path), 1, fn=odd)


def test_many_params_and_metrics_go_in_several_requests(tmp_path, monkeypatch):
    """MLflow takes 100 params and 1000 metrics at once."""
    module = trackers.install(monkeypatch, "mlflow")
    many = lambda state, batch: state.advance(metrics={f"m{i}": 1.0 for i in range(2100)})  # noqa: E731
    fit(writer_of("mlflow", tmp_path, hparams={f"p{i}": i for i in range(250)}, tracking_uri="uri"), 1, fn=many)
    [run] = module.runs.values()
    assert (len(run.metrics), len(run.params), module.uris) == (2100, 250, ["uri"])


# Resume.


def killed_and_resumed(name, directory, module, dies_at):
    """A run with a checkpoint at every 15th step is killed and resumed: what closing the first would write is undone."""
    path = directory / f"{name}.json"
    hooks = [ft.hooks.write_metrics(writer_of(name, directory), every=20, window=1)]
    run = ft.states(step_fn, hooks, state=fresh(), data=Endless(), max_steps=50)
    for state in run:
        if state.step == dies_at - 1:
            left, note = copy.deepcopy(module.runs), path.read_text()
            break
    run.close()
    module.runs.clear()
    module.runs.update(left)
    path.write_text(note)
    fit(writer_of(name, directory), 50, start=(dies_at - 1) // 15 * 15)


def law_once(name, directory, module, dies_at):
    """A resumed run is one run in the tracker, with every row once; one that began anew is a run of its own."""
    killed_and_resumed(name, directory, module, dies_at)
    *before, run = module.runs.values()
    assert len(before) == (dies_at <= 15)
    assert trackers.points(run, "loss") == [(20, 20.0), (40, 40.0), (50, 50.0)]


@pytest.mark.parametrize("dies_at", [10, 16, 25, 35, 42, 46])
@pytest.mark.parametrize("name", NAMES)
def test_no_row_appears_twice_after_a_kill(name, tmp_path, monkeypatch, dies_at):
    """Wherever the kill was, the resumed run goes on in the same run of the tracker, without a gap or overlap."""
    law_once(name, tmp_path, trackers.install(monkeypatch, name), dies_at)


@pytest.mark.parametrize("name", NAMES)
def test_law_once_can_fail(name, tmp_path, monkeypatch):
    """A new run at every start is refused; and, where the tracker keeps all it gets, sending rows again."""
    with monkeypatch.context() as patch:
        patch.setattr(Tracked, "read", lambda self, start_step: (None, start_step))
        with pytest.raises(AssertionError):
            law_once(name, tmp_path / "new", trackers.install(monkeypatch, name), 42)
    if name != "wandb":
        read = Tracked.read
        monkeypatch.setattr(Tracked, "read", lambda self, start_step: (read(self, start_step)[0], start_step))
        with pytest.raises(AssertionError):
            law_once(name, tmp_path / "again", trackers.install(monkeypatch, name), 42)


@pytest.mark.parametrize("name", NAMES)
def test_a_start_at_step_0_is_a_new_run(name, tmp_path, monkeypatch):
    """Training again from the start in the same directory leaves the earlier run as it was."""
    module = trackers.install(monkeypatch, name)
    for steps in (40, 20):
        fit(writer_of(name, tmp_path), steps)
    first, second = module.runs.values()
    assert (len(trackers.points(first, "loss")), len(trackers.points(second, "loss"))) == (2, 1)


def test_wandb_goes_back_by_itself_when_asked(tmp_path, monkeypatch):
    """With fork_from neither id nor resume is given, and every row after the start is sent to the new run."""
    module = trackers.install(monkeypatch, "wandb")
    fit(writer_of("wandb", tmp_path), 40)
    fit(writer_of("wandb", tmp_path, fork_from="wandb0?_step=20"), 60, start=20)
    _, fork = module.runs.values()
    assert fork.settings[0]["fork_from"] == "wandb0?_step=20"
    assert [step for step, _ in trackers.points(fork, "loss")] == [40, 60]
    fit(writer_of("wandb", tmp_path), 80, start=60)
    assert [step for step, _ in trackers.points(fork, "loss")] == [40, 60, 80]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"run": "a"}'])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_note_is_no_silent_new_run(name, tmp_path, monkeypatch, text):
    """The error names the file and what to do."""
    module = trackers.install(monkeypatch, name)
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=f"{name}.json: does not say which run to go on with; delete it"):
        fit(writer_of(name, tmp_path), 60, start=20)
    assert not module.runs


# The end.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_run_that_raised_is_marked_as_failed(name, error, tmp_path, monkeypatch):
    """What was reported before is there, and the tracker says that the run did not finish."""
    module = trackers.install(monkeypatch, name)

    def dying(state, batch):
        if state.step == 25:
            raise error("boom")
        return step_fn(state, batch)

    with pytest.raises(error, match="boom"):
        fit(writer_of(name, tmp_path), 50, fn=dying)
    [run] = module.runs.values()
    assert [step for step, _ in trackers.points(run, "loss")] == [20, 25]
    if name == "mlflow":
        assert run.status == ("FAILED" if error is ArithmeticError else "KILLED")
    elif name == "wandb":
        assert run.state == "failed"
    else:
        assert run.state == "finished"
        assert run.alerts == [("run failed", f"{error.__name__}: boom", "error")]


@pytest.mark.parametrize("name", NAMES)
def test_leaving_early_is_no_failure(name, tmp_path, monkeypatch):
    """break out of ft.states finishes the run."""
    module = trackers.install(monkeypatch, name)
    hooks = [ft.hooks.write_metrics(writer_of(name, tmp_path))]
    run = ft.states(step_fn, hooks, state=fresh(), data=Endless())
    next(run)
    run.close()
    [tracked] = module.runs.values()
    assert getattr(tracked, "status", getattr(tracked, "state", None)) in ("finished", "FINISHED")
    assert not getattr(tracked, "alerts", [])


# The packages.


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_told_when_the_writer_is_built(name, tmp_path, monkeypatch):
    """Hours before the first step; a writer that comes by pickle says it when it is opened."""
    trackers.install(monkeypatch, name)
    writer = writer_of(name, tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ft.MissingExtraError, match=rf"writers.{name} needs {name}: pip install 'fntrain\[{name}\]'"):
        writer_of(name, tmp_path)
    with pytest.raises(ft.MissingExtraError, match=rf"fntrain\[{name}\]"):
        fit(pickle.loads(pickle.dumps(writer)), 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_package_is_imported_only_when_a_run_writes(name, tmp_path, monkeypatch):
    """Building the writer and the hook looks for the package and no more."""
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    hook = ft.hooks.write_metrics(writer_of(name, tmp_path))
    with pytest.raises(RuntimeError, match="imported"):
        ft.fit(step_fn, [hook], state=fresh(), data=Endless(), max_steps=1)


@pytest.mark.parametrize("name", NAMES)
def test_writers_of_trackers_are_values(name, tmp_path, monkeypatch):
    """They compare, print and pickle, with what is passed on to the tracker."""
    trackers.install(monkeypatch, name)
    options = {"run_name": "a"} if name == "mlflow" else {"name": "a"}
    writer = writer_of(name, "runs/a", hparams={"lr": 1}, **options)
    assert pickle.loads(pickle.dumps(writer)) == writer != writer_of(name, "runs/b", hparams={"lr": 1}, **options)
    assert str(options) in repr(writer) and "runs/a" in repr(writer)
    fit(writer_of(name, tmp_path, **options), 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_ins_are_faithful(name, monkeypatch):
    """What the stand-ins are called with, the real packages take too."""
    if find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install 'fntrain[{name}]'")
    code = f"""
import inspect, sys, warnings
warnings.simplefilter("ignore")
import {name} as real
sys.path.insert(0, {str(inspect.getfile(trackers)).rpartition("/")[0]!r})
import trackers
fake = trackers.FAKES[{name!r}]()
pairs = []
if {name!r} == "mlflow":
    from mlflow.entities import Metric, Param
    pairs += [(Metric, fake.entities.Metric), (Param, fake.entities.Param)]
    kind, own = real.MlflowClient, fake.MlflowClient
else:
    from {"wandb.sdk.wandb_run" if name == "wandb" else "trackio"} import Run as kind
    own = type(fake.init({"project='p'" if name == "wandb" else "'p'"}))
    pairs += [(real.init, fake.init)]
    assert all(hasattr(real, what) for what in vars(fake) if what[0].isupper())
pairs += [(getattr(kind, what), getattr(own, what)) for what in vars(own) if not what.startswith("__") or
          {name!r} == "mlflow" and what == "__init__"]
for theirs, ours in pairs:
    missing = set(inspect.signature(ours).parameters) - set(inspect.signature(theirs).parameters)
    assert not missing, (theirs, missing)
print(len(pairs))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 3


REAL = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[3])
import fntrain as ft
from test_trackers import fit, media_step
name, directory = sys.argv[1:3]
os.chdir(directory)
options = {
    "wandb": {"mode": "offline"}, "trackio": {"auto_log_cpu": False}, "mlflow": {"tracking_uri": "sqlite:///ml.db"}
}[name]
writer = getattr(ft.writers, name)("digits", directory, hparams={"lr": 0.1}, **options)
fit(writer, 40, fn=media_step)
first = json.load(open(f"{name}.json"))
fit(writer, 50, fn=media_step, start=30)
second = json.load(open(f"{name}.json"))
points = None
if name == "trackio":
    from trackio.sqlite_storage import SQLiteStorage
    logs = SQLiteStorage.get_logs("digits", second["run"])
    points = [[row["step"], row["loss"]] for row in logs if "loss" in row]
if name == "mlflow":
    import mlflow
    client = mlflow.MlflowClient("sqlite:///ml.db")
    points = [[metric.step, metric.value] for metric in client.get_metric_history(second["run"], "loss")]
    assert client.get_run(second["run"]).data.params == {"lr": "0.1"}
    assert client.get_run(second["run"]).info.status == "FINISHED"
    assert {artifact.path for artifact in client.list_artifacts(second["run"])} == {"images", "sample"}
print("RESULT", json.dumps([first, second, points]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_real_tracker_takes_a_run_and_its_resume(name, tmp_path):
    """Offline or in a local store: one run, every row once, media and settings included."""
    if find_spec(name) is None:
        pytest.skip(f"needs {name}: pip install 'fntrain[{name}]'")
    env = os.environ | {"WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", REAL, name, str(tmp_path), here], capture_output=True, text=True, env=env, timeout=110
    )
    assert done.returncode == 0, done.stderr
    [result] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    first, second, points = json.loads(result.removeprefix("RESULT "))
    assert first["run"] == second["run"]
    assert (first["step"], second["step"]) == (40, 50)
    assert points in (None, [[20, 20.0], [40, 40.0], [50, 50.0]])
    assert points or list((tmp_path / "wandb").glob("offline-run-*"))
