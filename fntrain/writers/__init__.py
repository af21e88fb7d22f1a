"""Where metrics go: console, files, memory, experiment trackers. A writer of your own is a record with `open`.

May import: `fntrain.core`, `events`. Experiment trackers are loaded on first use.
Read first: `row` (what a writer is, and what it gets), then `jsonl`.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fntrain.lazy import exported_later
from fntrain.writers.console import Console, console
from fntrain.writers.jsonl import Jsonl, jsonl
from fntrain.writers.memory import Memory, memory
from fntrain.writers.row import Row, Writer, WriteRow, local_path
from fntrain.writers.tensorboard import TensorBoard, tensorboard

if TYPE_CHECKING:
    from fntrain.writers.trackers.mlflow import MLflow, mlflow
    from fntrain.writers.trackers.trackio import Trackio, trackio
    from fntrain.writers.trackers.wandb import Wandb, wandb

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

__getattr__ = exported_later(
    globals(),
    {
        "MLflow": "fntrain.writers.trackers.mlflow",
        "Trackio": "fntrain.writers.trackers.trackio",
        "Wandb": "fntrain.writers.trackers.wandb",
        "mlflow": "fntrain.writers.trackers.mlflow",
        "trackio": "fntrain.writers.trackers.trackio",
        "wandb": "fntrain.writers.trackers.wandb",
    },
)


def __dir__() -> list[str]:
    return __all__


def default(directory: str | os.PathLike[str], *, hparams: Mapping[str, Any] | None = None) -> tuple[Writer, ...]:
    """Return the usual three: console, `metrics.jsonl` and TensorBoard files in the run's directory.

    Raises:
      ConfigError: the directory is a URL; the files are local ones.
    Example:
      >>> [type(writer).__name__ for writer in default("runs/digits")]
      ['Console', 'Jsonl', 'TensorBoard']
    """
    root = local_path("directory", directory)
    return console(), jsonl(root / "metrics.jsonl"), tensorboard(root, hparams=hparams)
