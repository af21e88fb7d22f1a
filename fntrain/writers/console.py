"""writers.console: one aligned line per period."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import torch

from fntrain.writers.process import duration, process_memory
from fntrain.writers.row import Row, WriteRow

_BYTES = {f"memory/{kind}" for kind in ("rss", "peak_rss", "allocated", "reserved", "peak_allocated")}


@attrs.frozen
class Console:
    """Prints rows to standard output; made by `console`."""

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        begin, first = time.perf_counter(), start_step + 1  # opened at the end of the first step

        def write(row: Row) -> None:
            if not row.scalars:
                return
            seconds = (time.perf_counter() - begin) / (row.step - first) if row.step > first else None
            print(_line(row, seconds), file=sys.stdout, flush=True)

        yield write


def console() -> Console:
    """Print one line per write: step, eta, losses, other metrics, lr, times in ms, memory.

    Example:
      >>> console()
      Console()
    """
    return Console()


def _line(row: Row, seconds_per_step: float | None) -> str:
    total = "" if row.max_steps is None else f"/{row.max_steps}"
    parts = [f"step {row.step:>{max(len(total) - 1, 1)}}{total}"]
    if row.periodic and row.max_steps is not None:
        left = row.max_steps - row.step
        parts.append("eta -:--:--" if seconds_per_step is None else f"eta {duration(seconds_per_step * left)}")
    for name in sorted(row.scalars, key=_rank):
        value = row.scalars[name]
        if name.startswith("time/"):
            parts.append(f"{name.removeprefix('time/')} {value * 1000:>7.1f} ms")
        elif name in _BYTES:
            parts.append(f"{name} {value / 2**20:.0f} MiB")
        elif name != "skipped_steps" or value:  # shown only when it happens
            parts.append(f"{name} {value:<9.4g}")
    if row.periodic:
        parts.append(f"mem {_memory()}")
    return "  ".join(parts).rstrip()


def _rank(name: str) -> tuple[bool, bool, bool, bool]:
    """Sort key: the loss, its terms, the rest, times; results of evaluations, which not every line has, at the end."""
    return getattr(name, "smooth", "") == "each", name.startswith("time/"), "loss" not in name, name != "loss"


def _memory() -> str:
    """Peak memory: of the GPU's tensors if one is in use, else of the process."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    told = process_memory()
    return f"{told.get('peak_rss', told.get('rss', 0)) / 2**20:.0f} MiB" if told else "n/a"
