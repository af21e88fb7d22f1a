"""Stand-ins for experiment trackers, as far as the writers use them; test_trackers.py holds them against the real ones."""

# ruff: noqa: A001, A002  # arguments are called as the trackers call them

import sys
from types import ModuleType, SimpleNamespace


class Media:
    """An image, histogram or text as a tracker has it."""

    def __init__(self, value, **options):
        self.value, self.options = value, options


def wandb():
    """Steps must grow: what is older is ignored; what is logged at one step becomes one row."""
    module = ModuleType("wandb")
    module.runs = {}

    class Run:
        def __init__(self, id, settings):
            self.id, self.settings = id, [settings]
            self.rows, self.state = {}, "running"

        def log(self, data, step=None):
            if not self.rows or step >= max(self.rows):
                self.rows.setdefault(step, {}).update(data)

        def finish(self, exit_code=None):
            self.state = "failed" if exit_code else "finished"

    def init(*, project=None, dir=None, config=None, id=None, resume=None, fork_from=None, name=None, mode=None):
        assert not (resume and fork_from), "resume and fork_from can't be used together"
        settings = {"project": project, "dir": dir, "config": config, "resume": resume, "fork_from": fork_from}
        if id in module.runs:
            assert resume == "allow"
            module.runs[id].settings.append(settings)
            module.runs[id].state = "running"
        else:
            id = id or f"wandb{len(module.runs)}"
            module.runs[id] = Run(id, settings)
        return module.runs[id]

    module.init, module.Image, module.Histogram, module.Html = init, Media, Media, Media
    return module


def trackio():
    """Everything logged is kept; runs go by name."""
    module = ModuleType("trackio")
    module.runs, module.AlertLevel = {}, SimpleNamespace(ERROR="error")

    class Run:
        def __init__(self, name, config):
            self.name, self.config = name, config
            self.logs, self.alerts, self.state = [], [], "running"

        def log(self, metrics, step=None):
            self.logs.append((step, metrics))

        def alert(self, title, text=None, level=None):
            self.alerts.append((title, text, level))

        def finish(self):
            self.state = "finished"

    def init(project, name=None, config=None, resume="never"):
        name = name or f"trackio{len(module.runs)}"
        if resume == "never" or name not in module.runs:
            assert name not in module.runs
            module.runs[name] = Run(name, config)
        return module.runs[name]

    module.init, module.Image, module.Histogram, module.Markdown = init, Media, Media, Media
    return module


def mlflow():
    """Everything logged is kept; an experiment is made once, a request has a size."""
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.runs, module.experiments, module.uris = {}, {}, []

    class MlflowClient:
        def __init__(self, tracking_uri=None):
            module.uris.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id=module.experiments[name]) if name in module.experiments else None

        def create_experiment(self, name):
            assert name not in module.experiments
            module.experiments[name] = str(len(module.experiments))
            return module.experiments[name]

        def create_run(self, experiment_id, tags=None, run_name=None):
            id = f"mlflow{len(module.runs)}"
            run = {"params": {}, "metrics": [], "images": [], "texts": {}, "status": "RUNNING", "name": run_name}
            module.runs[id] = SimpleNamespace(id=id, **run)
            return SimpleNamespace(info=SimpleNamespace(run_id=id))

        def update_run(self, run_id, status=None):
            module.runs[run_id].status = status

        def log_batch(self, run_id, metrics=(), params=()):
            assert len(metrics) <= 1000 and len(params) <= 100
            module.runs[run_id].metrics.extend(metrics)
            for param in params:
                assert module.runs[run_id].params.setdefault(param.key, param.value) == param.value

        def log_image(self, run_id, image, key=None, step=None):
            module.runs[run_id].images.append((key, step, image))

        def log_text(self, run_id, text, artifact_file):
            module.runs[run_id].texts[artifact_file] = text

        def set_terminated(self, run_id, status=None):
            module.runs[run_id].status = status

    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    module.MlflowClient, module.entities = MlflowClient, entities
    return module


FAKES = {"wandb": wandb, "trackio": trackio, "mlflow": mlflow}


def install(monkeypatch, name):
    """Put a stand-in where `import` finds it."""
    module = FAKES[name]()
    monkeypatch.setitem(sys.modules, name, module)
    if name == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow.entities", module.entities)
    return module


def points(run, name):
    """(step, value) of one metric in the order of logging, whatever the tracker."""
    if hasattr(run, "metrics"):
        return [(metric.step, metric.value) for metric in run.metrics if metric.key == name]
    rows = run.rows.items() if hasattr(run, "rows") else run.logs
    return [(step, row[name]) for step, row in rows if name in row]
