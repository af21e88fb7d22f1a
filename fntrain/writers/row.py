"""What a writer is: a value whose `open` gives a function that takes rows."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import attrs

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
