"""writers.jsonl: one JSON object per line."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from fntrain.writers.row import Row, WriteRow, local_path


@attrs.frozen
class Jsonl:
    """Appends rows to a file; made by `jsonl`."""

    path: str

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(path, start_step)
        with path.open("a", encoding="utf-8") as file:

            def write(row: Row) -> None:
                if not row.scalars:
                    return
                # Strict JSON has no nan: it is written as null.
                numbers = {key: value if math.isfinite(value) else None for key, value in row.scalars.items()}
                file.write(json.dumps({"step": row.step} | numbers | {"step": row.step}, allow_nan=False) + "\n")
                file.flush()

            yield write


def jsonl(path: str | os.PathLike[str]) -> Jsonl:
    """Write scalars to a file, one JSON object per line, `step` first; nan and inf are written as null.

    A run first drops the lines of steps after its start (and a last line that a kill cut short); the file as it was is
    kept beside it, with the ending `.old`. Of steps done again after a roll-back the later line counts.

    Raises:
      ConfigError: the path is a URL; the file is a local one.
    Example:
      >>> jsonl("runs/digits/metrics.jsonl")
      Jsonl(path='runs/digits/metrics.jsonl')
    """
    return Jsonl(str(local_path("path", path)))


def _truncate(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line + "\n" for line in text.splitlines() if _step(line, start_step) <= start_step)
    if kept != text:
        shutil.copyfile(path, path.with_name(path.name + ".old"))
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(kept, encoding="utf-8")
        fresh.replace(path)


def _step(line: str, start_step: int) -> int:
    """The line's step; one past the start for what is no row, so that it goes."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return start_step + 1
