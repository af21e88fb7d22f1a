"""Where metrics go: console, files, memory, experiment trackers. A writer of your own is a record with `open`.

May import: `fntrain.core`, `events`. Experiment trackers are loaded on first use.
Read first: `row` (what a writer is, and what it gets), then `jsonl`.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fntrain.lazy import imported_on_first_use
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

_ON_FIRST_USE = {
    "trackers.mlflow": "MLflow mlflow",
    "trackers.trackio": "Trackio trackio",
    "trackers.wandb": "Wandb wandb",
}
__getattr__, __dir__ = imported_on_first_use(globals(), _ON_FIRST_USE)


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
