"""writers.wandb: a run of Weights & Biases."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import attrs

from fntrain.writers.row import Row, WriteRow
from fntrain.writers.trackers.tracker import Tracked, converted, failed, require


@attrs.frozen
class Wandb:
    """Sends rows to a run; made by `wandb`."""

    project: str
    directory: str
    hparams: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        require("wandb")
        import wandb as api

        directory = Path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)  # wandb would put its files elsewhere
        tracked = Tracked(directory / "wandb.json")
        options = dict(self.options)
        run_id, last_step = tracked.read(start_step)
        if options.keys() & {"fork_from", "resume_from"}:  # the tracker itself goes back to a step
            last_step = start_step
        elif run_id is not None:
            options = {"id": run_id, "resume": "allow"} | options
        run = api.init(project=self.project, dir=self.directory, config=dict(self.hparams or {}), **options)

        def send(row: Row) -> None:
            media = converted(
                row.media, api.Image, api.Histogram, lambda text: api.Html(f"<pre>{escape(text)}</pre>", inject=False)
            )
            run.log({**row.scalars, **media}, step=row.step)

        try:
            yield tracked.forward(run.id, last_step, send)
        except BaseException as error:
            run.finish(exit_code=int(failed(error)))
            raise
        run.finish()


def wandb(
    project: str, directory: str | os.PathLike[str], *, hparams: Mapping[str, Any] | None = None, **options: Any
) -> Wandb:
    """Write scalars, images, histograms and text to Weights & Biases; needs the extra `wandb`.

    A resumed run goes on in the same run of the tracker, whose id is in `wandb.json` in the run's directory. What the
    tracker has of steps after the start stays, and is not sent again: an exact resume measures the same. After a
    change, start elsewhere: with `fork_from=f"{id}?_step={step}"` the tracker copies the run up to a step, with
    `resume_from` of the same form it cuts it there, where it is offered. A start at step 0 begins a new run.
    Steps done again after a roll-back are ignored by the tracker, with a warning, until they are new.

    Args:
      project: of the tracker.
      directory: of the run; the tracker's own files go there too.
      hparams: the run's settings, as the tracker's config.
      options: of `wandb.init`, such as name, entity, tags, `mode="offline"`.
    Raises:
      MissingExtraError: wandb is not installed.
    Example:
      >>> wandb("digits", "runs/digits", mode="offline")  # doctest: +SKIP
      Wandb(project='digits', directory='runs/digits', hparams=None, options={'mode': 'offline'})
    """
    require("wandb")
    return Wandb(project, os.fspath(directory), hparams, options)
