"""What the writers for experiment trackers share: their package, the run to go on with, and media."""

import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import torch

from fntrain import events
from fntrain.core.errors import MissingExtraError
from fntrain.writers.row import Row, WriteRow


def require(package: str) -> None:
    """Raise MissingExtraError unless a package is there, without importing it: trackers take seconds to import."""
    if (sys.modules[package] if package in sys.modules else find_spec(package)) is None:
        raise MissingExtraError(f"writers.{package} needs {package}: pip install 'fntrain[{package}]'")


@attrs.frozen
class Tracked:
    """The file in the run's directory that says which run of the tracker this is, and how far it was written."""

    path: Path

    def read(self, start_step: int) -> tuple[str | None, int]:
        """Return the run to go on with (None: a new one) and the last step that it has.

        Raises:
          ValueError: the file is damaged.
        """
        if start_step == 0 or not self.path.exists():
            return None, start_step
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            return str(kept["run"]), int(kept["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: does not say which run to go on with; delete it to begin a new one"
            ) from error

    def forward(self, run: str, last_step: int, send: WriteRow) -> WriteRow:
        """Send rows of later steps than the run has, and note each; trackers can't take back what they were sent."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._note(run, last_step)
        newest = last_step

        def write(row: Row) -> None:
            nonlocal newest
            if row.step > last_step:
                send(row)
                newest = max(newest, row.step)
                self._note(run, newest)

        return write

    def _note(self, run: str, step: int) -> None:
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text(json.dumps({"run": run, "step": step}) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def converted(
    media: Mapping[str, Any],
    image: Callable[[Any], Any],
    histogram: Callable[[Any], Any],
    text: Callable[[str], Any],
) -> dict[str, Any]:
    """Return media as a tracker has them; images come as (height, width, 3 or 4) uint8 arrays, histograms flat.

    Raises:
      TypeError: something that is no medium.
    """
    done = {}
    for name, medium in media.items():
        if isinstance(medium, events.Image):
            done[name] = image(_pixels(medium.tensor))
        elif isinstance(medium, events.Histogram):
            done[name] = histogram(medium.tensor.detach().flatten().float().cpu().numpy())
        elif isinstance(medium, events.Text):
            done[name] = text(medium.text)
        else:
            raise TypeError(f"metrics[{name!r}]: got {type(medium).__name__}, expected Image, Histogram or Text")
    return done


def failed(error: BaseException) -> bool:
    """Tell whether what ended the run is a failure; leaving `ft.states` early is none."""
    return not isinstance(error, GeneratorExit)


def _pixels(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = (tensor.float().clamp(0, 1) * 255).round().to(torch.uint8)
    if tensor.shape[0] == 1:
        tensor = tensor.expand(3, -1, -1)
    return tensor.permute(1, 2, 0).contiguous().numpy()
