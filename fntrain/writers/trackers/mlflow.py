"""writers.mlflow: a run of MLflow."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from fntrain.writers.row import Row, WriteRow
from fntrain.writers.trackers.tracker import Tracked, converted, failed, require

MAX_PARAMS, MAX_METRICS = 100, 1000  # of one request


@attrs.frozen
class MLflow:
    """Sends rows to a run; made by `mlflow`."""

    experiment: str
    directory: str
    hparams: Mapping[str, Any] | None = None
    tracking_uri: str | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        require("mlflow")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        client = MlflowClient(tracking_uri=self.tracking_uri)  # no run is active: yours, if you have one, stays
        tracked = Tracked(Path(self.directory) / "mlflow.json")
        run_id, last_step = tracked.read(start_step)
        if run_id is None:
            known = client.get_experiment_by_name(self.experiment)
            number = known.experiment_id if known else client.create_experiment(self.experiment)
            run_id = client.create_run(number, **self.options).info.run_id
            params = [Param(key, str(value)) for key, value in (self.hparams or {}).items()]
            for start in range(0, len(params), MAX_PARAMS):
                client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
        else:
            client.update_run(run_id, status="RUNNING")

        def send(row: Row) -> None:
            now = time.time_ns() // 10**6
            metrics = [Metric(key, value, now, row.step) for key, value in row.scalars.items()]
            for start in range(0, len(metrics), MAX_METRICS):
                client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
            media = converted(row.media, lambda pixels: pixels, lambda _: None, lambda text: text)
            for name, medium in media.items():
                if isinstance(medium, str):
                    client.log_text(run_id, medium, f"{name}/step_{row.step:08}.md")
                elif medium is not None:
                    client.log_image(run_id, medium, key=name, step=row.step)

        try:
            yield tracked.forward(run_id, last_step, send)
        except BaseException as error:
            ended = "FAILED" if isinstance(error, Exception) else "KILLED"
            client.set_terminated(run_id, ended if failed(error) else "FINISHED")
            raise
        client.set_terminated(run_id, "FINISHED")


def mlflow(
    experiment: str,
    directory: str | os.PathLike[str],
    *,
    hparams: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
    **options: Any,
) -> MLflow:
    """Write scalars, images and text (as artifacts) to MLflow; needs the extra `mlflow`.

    A resumed run goes on in the same run of the tracker, whose id is in `mlflow.json` in the run's directory. What the
    tracker has of steps after the start stays, and is not sent again: an exact resume measures the same. A start at
    step 0 begins a new run. Steps done again after a roll-back are in the tracker twice. It has no histograms: they
    are left out.

    Args:
      experiment: its name; made if there is none.
      directory: of the run.
      hparams: the run's settings, as the tracker's params.
      tracking_uri: of the server or store; None for what MLflow is set to.
      options: of `MlflowClient.create_run`: run_name, tags.
    Raises:
      MissingExtraError: mlflow is not installed.
    Example:
      >>> mlflow("digits", "runs/digits", run_name="first")  # doctest: +SKIP
      MLflow(experiment='digits', directory='runs/digits', hparams=None, tracking_uri=None,
             options={'run_name': 'first'})
    """
    require("mlflow")
    return MLflow(experiment, os.fspath(directory), hparams, tracking_uri, options)
