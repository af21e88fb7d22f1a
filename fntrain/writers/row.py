"""What a writer is: a value whose `open` gives a function that takes rows. And where it may write."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import attrs

from fntrain.core.errors import ConfigError
from fntrain.writers.history import History


@attrs.frozen(kw_only=True)
class Row:
    """What is written at one step.

    Args:
      step: number of the step, from 1.
      max_steps: of the run, or None.
      scalars: numbers by name, already on the host and smoothed.
      media: ft.events.Image, Histogram or Text by name.
      periodic: False for results written at a step of their own, between two periods.
      histories: the values behind the smoothed scalars, by name; of a window, so also of steps of earlier rows.
      valid_step: what earlier rows said of steps after this one no longer holds: the run was rolled back.
    """

    step: int
    max_steps: int | None
    scalars: Mapping[str, float]
    media: Mapping[str, Any]
    periodic: bool
    histories: Mapping[str, History] = attrs.field(factory=dict)
    valid_step: int = sys.maxsize


WriteRow = Callable[[Row], None]


class Writer(Protocol):
    """Where metrics go. A frozen record; what it holds open lives in the context manager only."""

    def open(self, start_step: int) -> AbstractContextManager[WriteRow]:
        """Open for a run that starts after `start_step`: what was written for later steps must not stay."""


def local_path(name: str, path: str | os.PathLike[str]) -> Path:
    """Return a path of the local file system, where logs are written; a file:// URL is one.

    Raises:
      ConfigError: it is a URL of another file system, of which a local directory would be made otherwise.
    Example:
      >>> local_path("directory", "s3://bucket/runs")
      Traceback (most recent call last):
      fntrain.ConfigError: directory: got 's3://bucket/runs', expected a local path: logs are local files; ...
    """
    text = os.fspath(path).removeprefix("file://")
    if "://" in text:
        raise ConfigError(
            f"{name}: got {text!r}, expected a local path: logs are local files; give one for them (checkpoints can go "
            "to the URL)"
        )
    return Path(text)
