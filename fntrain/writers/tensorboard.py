"""writers.tensorboard: event files for TensorBoard."""

import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

from fntrain import events
from fntrain.writers.row import Row, WriteRow


@attrs.frozen
class TensorBoard:
    """Writes event files; made by `tensorboard`."""

    directory: str
    hparams: Mapping[str, Any] | None = attrs.field(repr=reprlib.repr)

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        from tensorboard.compat.proto.summary_pb2 import Summary  # slow to import: only where they are used
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step > 0 else 0  # what an earlier run wrote for later steps is hidden
        with SummaryWriter(self.directory, purge_step=purge) as writer:
            if self.hparams and start_step == 0:
                _add_hparams(writer, self.hparams)

            def write(row: Row) -> None:
                if row.scalars:  # one event for all: half the cost of one each
                    values = [Summary.Value(tag=name, simple_value=value) for name, value in row.scalars.items()]
                    writer.file_writer.add_summary(Summary(value=values), row.step)
                for name, medium in row.media.items():
                    _add(writer, name, medium, row.step)
                writer.flush()

            yield write


def tensorboard(directory: str | os.PathLike[str], *, hparams: Mapping[str, Any] | None = None) -> TensorBoard:
    """Write scalars, images, histograms and text for `tensorboard --logdir directory`.

    A resumed run hides what was written for steps after its start.

    Args:
      directory: of the event files.
      hparams: the run's settings, shown under HParams and as a table under Text.
    Example:
      >>> tensorboard("runs/digits", hparams={"lr": 0.1})
      TensorBoard(directory='runs/digits', hparams={'lr': 0.1})
    """
    return TensorBoard(os.fspath(directory), hparams)


def _add_hparams(writer: Any, hparams: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard.summary import hparams as summaries

    # add_hparams of SummaryWriter would make a second run beside this one; its three summaries go into this run.
    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in hparams.items()
    }
    for summary in summaries(plain, {}):
        writer.file_writer.add_summary(summary)
    rows = "\n".join(f"| {key} | {value} |" for key, value in hparams.items())
    writer.add_text("hparams", f"| name | value |\n|---|---|\n{rows}", 0)


def _add(writer: Any, name: str, medium: Any, step: int) -> None:
    if isinstance(medium, events.Image):
        writer.add_image(name, medium.tensor.cpu(), step)
    elif isinstance(medium, events.Histogram):
        writer.add_histogram(name, medium.tensor.float().cpu(), step)
    elif isinstance(medium, events.Text):
        writer.add_text(name, medium.text, step)
    else:
        raise TypeError(f"metrics[{name!r}]: got {type(medium).__name__}, expected Image, Histogram or Text")
