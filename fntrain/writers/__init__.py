"""Where metrics go: console, files, memory, experiment trackers. A writer of your own is a record with `open`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fntrain.writers.console import Console, console
from fntrain.writers.jsonl import Jsonl, jsonl
from fntrain.writers.memory import Memory, memory
from fntrain.writers.mlflow import MLflow, mlflow
from fntrain.writers.row import Row, Writer, WriteRow
from fntrain.writers.tensorboard import TensorBoard, tensorboard
from fntrain.writers.trackio import Trackio, trackio
from fntrain.writers.wandb import Wandb, wandb

__all__ = [
    "Console",
    "Jsonl",
    "MLflow",
    "Memory",
    "Row",
    "TensorBoard",
    "Trackio",
    "Wandb",
    "WriteRow",
    "Writer",
    "console",
    "default",
    "jsonl",
    "memory",
    "mlflow",
    "tensorboard",
    "trackio",
    "wandb",
]


def default(directory: str | os.PathLike[str], *, hparams: Mapping[str, Any] | None = None) -> tuple[Writer, ...]:
    """Return the usual three: console, `metrics.jsonl` and TensorBoard files in the run's directory.

    Example:
      >>> [type(writer).__name__ for writer in default("runs/digits")]
      ['Console', 'Jsonl', 'TensorBoard']
    """
    return console(), jsonl(Path(directory) / "metrics.jsonl"), tensorboard(directory, hparams=hparams)
