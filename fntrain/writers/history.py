"""History: the values of one metric over the steps of a run, and what is read off them."""

import math
from collections.abc import Sequence

import attrs


@attrs.frozen
class History:
    """Values of one metric and the steps at which they were reported, oldest first.

    A nan among the values makes their median and averages nan, so that trouble is seen.

    Args:
      steps: numbers of the steps, from 1, increasing.
      numbers: one for each step.
    Raises:
      ValueError: no value, or not one for each step.
    Example:
      >>> loss = History((20, 40, 60), (3.0, 1.0, 8.0))
      >>> loss.latest(), loss.median(2), loss.average(2), loss.global_average()
      (8.0, 4.5, 4.5, 4.0)

    Source: detectron2's HistoryBuffer, https://detectron2.readthedocs.io/en/latest/modules/utils.html
    """

    steps: tuple[int, ...]
    numbers: tuple[float, ...]

    def __attrs_post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.numbers):
            raise ValueError(f"history: got {len(self.steps)} steps and {len(self.numbers)} values, expected as many")

    def latest(self) -> float:
        """Return the last value."""
        return self.numbers[-1]

    def median(self, window: int | None = None) -> float:
        """Return the median of the last `window` values, of all without."""
        return median(self._last(window))

    def average(self, window: int | None = None) -> float:
        """Return the mean of the last `window` values, of all without."""
        return average(self._last(window))

    def global_average(self) -> float:
        """Return the mean of all values."""
        return average(self.numbers)

    def values(self) -> list[tuple[int, float]]:
        """Return the (step, value) pairs, oldest first; `zip(*history.values())` is what a plot takes."""
        return list(zip(self.steps, self.numbers, strict=True))

    def _last(self, window: int | None) -> Sequence[float]:
        if window is not None and window < 1:
            raise ValueError(f"window: got {window!r}, expected a whole number >= 1")
        return self.numbers if window is None else self.numbers[-window:]


def median(numbers: Sequence[float]) -> float:
    """Return the median; nan if one is nan, as sorting nan would give any of the values.

    Example:
      >>> median([3.0, 1.0]), median([1.0, float("nan"), 2.0])
      (2.0, nan)
    """
    ordered, middle = sorted(numbers), len(numbers) // 2
    if any(map(math.isnan, numbers)):
        return math.nan
    return ordered[middle] if len(numbers) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def average(numbers: Sequence[float]) -> float:
    """Return the mean.

    Example:
      >>> average([3.0, 1.0])
      2.0
    """
    return sum(numbers) / len(numbers)
