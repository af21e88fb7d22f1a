"""Series: the values of one metric between the steps and the writers, and the one number that is shown for them."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from typing import Any, Literal

import torch
from toolz import groupby
from torch import Tensor

from fntrain.events import Smooth
from fntrain.steps.grads import stalls
from fntrain.writers.history import History

Smoothing = Literal["median", "mean", "latest", "global_mean"]
WINDOWED = ("median", "mean")
_NUMBERS: dict[str, Callable[[History], float]] = {
    "median": History.median,
    "mean": History.average,
    "sum": lambda history: sum(history.numbers),
}
MAX_TOTALS = 10_000  # a roll-back of more steps starts the mean over the run again


class Series:
    """The values that are not written yet, or still in the window, and the sums behind a mean over the run.

    Args:
      shown: by which number; "each" shows every value at its own step.
      window: number of steps that a median or mean covers.
    Example:
      >>> loss = Series("median", window=2)
      >>> loss.values.extend([(1, 9.0), (2, 3.0), (3, 5.0)])
      >>> list(loss.values)
      [(2, 3.0), (3, 5.0)]
    """

    __slots__ = ("shown", "totals", "values", "window")

    def __init__(self, shown: Smoothing | Smooth, window: int) -> None:
        self.shown = shown
        self.window = window if shown in WINDOWED else None
        self.values: deque[tuple[int, Any]] = deque(maxlen=1 if shown == "latest" else self.window)
        # For a mean over the run: step, number of values up to it, and their sum. Roll-backs need more than the last.
        self.totals: deque[tuple[int, int, float]] = deque(maxlen=MAX_TOTALS)

    def forget(self, step: int) -> None:
        """Drop what was measured after a step."""
        self.forget_values(step)
        while self.totals and self.totals[-1][0] > step:
            self.totals.pop()

    def forget_values(self, step: int) -> None:
        """Drop the values of later steps; keep the sums."""
        while self.values and self.values[-1][0] > step:
            self.values.pop()

    def trim(self, written: int, step: int) -> None:
        """Drop the values outside the window that ends at a step; without a window, those written already."""
        oldest = written if self.window is None else step - self.window
        while self.values and self.values[0][0] <= oldest:
            self.values.popleft()

    def since(self, step: int) -> list[tuple[int, Any]]:
        """Return the values of later steps."""
        later = takewhile(lambda pair: pair[0] > step, reversed(self.values))
        return list(later)[::-1]

    def number(self, history: History) -> float:
        """Return the one number that stands for the values of a period or window."""
        if self.shown == "global_mean":
            return self._global_mean(history)
        return _NUMBERS.get(self.shown, History.latest)(history)

    def _global_mean(self, history: History) -> float:
        _, count, total = self.totals[-1] if self.totals else (0, 0, 0.0)
        for step, number in history.values():
            count, total = count + 1, number + total
            self.totals.append((step, count, total))
        return total / count


def to_histories(series: dict[str, Series]) -> dict[str, History]:
    """Return the values of several metrics as numbers on the host, by one transfer for all.

    Example:
      >>> loss = Series("median", window=2)
      >>> loss.values.append((1, torch.tensor(0.5)))
      >>> to_histories({"loss": loss})
      {'loss': History(steps=(1,), numbers=(0.5,))}
    """
    numbers = iter(to_host([value for one in series.values() for _, value in one.values]))
    steps = {name: tuple(step for step, _ in one.values) for name, one in series.items()}
    return {name: History(some, tuple(islice(numbers, len(some)))) for name, some in steps.items()}


def to_host(values: Sequence[Any]) -> list[float]:
    """Return values as numbers, in order; those on a device by one stacked transfer for each dtype.

    Example:
      >>> to_host([1, torch.tensor(2.0)])
      [1.0, 2.0]
    """
    # A value on a device is read in one transfer with all others: each read of its own would wait for the device.
    waits = [isinstance(value, Tensor) and stalls(value) for value in values]
    numbers = [0.0 if wait else float(value) for value, wait in zip(values, waits, strict=True)]
    waiting = [index for index, wait in enumerate(waits) if wait]
    for indices in groupby(lambda index: (values[index].device, values[index].dtype), waiting).values():
        stacked = torch.stack([values[index].detach().reshape(()) for index in indices]).tolist()
        for index, number in zip(indices, stacked, strict=True):
            numbers[index] = float(number)
    return numbers
