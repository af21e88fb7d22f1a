"""writers.trackio: a run of Trackio."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from fntrain.writers.row import Row, WriteRow
from fntrain.writers.trackers.tracker import Tracked, converted, failed, require


@attrs.frozen
class Trackio:
    """Sends rows to a run; made by `trackio`."""

    project: str
    directory: str
    hparams: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        require("trackio")
        import trackio as api

        tracked = Tracked(Path(self.directory) / "trackio.json")
        name, last_step = tracked.read(start_step)
        options = dict(self.options) | ({} if name is None else {"name": name, "resume": "allow"})
        run = api.init(self.project, config=dict(self.hparams or {}), **options)

        def send(row: Row) -> None:
            media = converted(row.media, api.Image, api.Histogram, api.Markdown)
            run.log({**row.scalars, **media}, step=row.step)

        try:
            yield tracked.forward(run.name, last_step, send)
        except BaseException as error:
            if failed(error):  # its runs have no status
                run.alert("run failed", f"{type(error).__name__}: {error}", level=api.AlertLevel.ERROR)
            run.finish()
            raise
        run.finish()


def trackio(
    project: str, directory: str | os.PathLike[str], *, hparams: Mapping[str, Any] | None = None, **options: Any
) -> Trackio:
    """Write scalars, images, histograms and text to Trackio; needs the extra `trackio`.

    A resumed run goes on in the same run of the tracker, whose name is in `trackio.json` in the run's directory. What
    the tracker has of steps after the start stays, and is not sent again: an exact resume measures the same. A start
    at step 0 begins a new run. Steps done again after a roll-back are in the tracker twice. A run that raised ends
    with an alert of level ERROR.

    Args:
      project: of the tracker.
      directory: of the run; the tracker keeps its own files elsewhere.
      hparams: the run's settings, as the tracker's config.
      options: of `trackio.init`, such as name or space_id.
    Raises:
      MissingExtraError: trackio is not installed.
    Example:
      >>> trackio("digits", "runs/digits")  # doctest: +SKIP
      Trackio(project='digits', directory='runs/digits', hparams=None, options={})
    """
    require("trackio")
    return Trackio(project, os.fspath(directory), hparams, options)
