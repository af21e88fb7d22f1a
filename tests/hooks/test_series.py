"""The series of one metric."""

import random

import pytest

from fntrain.hooks.series import MAX_TOTALS, Series
from fntrain.writers.history import History


def written(series, numbers, start):
    """Give a series a value a step, written together, and return what it shows."""
    for step, number in enumerate(numbers, start=start + 1):
        series.values.append((step, number))
    series.trim(start, start + len(numbers))
    steps, values = zip(*series.values, strict=True)
    return series.number(History(steps, values))


def test_a_mean_over_the_run_keeps_a_bounded_number_of_sums_and_has_the_bits_of_one_sum():
    """Fault of before: an entry a step and metric was kept for ever."""
    draw, series, total = random.Random(0), Series("global_mean", window=20), 0.0
    for start in range(0, 3 * MAX_TOTALS, 500):
        numbers = [draw.uniform(-1, 1) for _ in range(500)]
        for number in numbers:
            total = number + total
        assert written(series, numbers, start) == total / (start + 500)
    assert len(series.totals) == MAX_TOTALS


@pytest.mark.parametrize("back", [0, 1, 7, 20])
def test_a_mean_over_the_run_forgets_what_was_rolled_back(back):
    draw = random.Random(0)
    numbers, others = [draw.random() for _ in range(20)], [draw.random() for _ in range(5)]
    series, straight = Series("global_mean", window=20), Series("global_mean", window=20)
    written(series, numbers, 0)
    series.forget(20 - back)
    assert written(series, others, 20 - back) == written(straight, numbers[: 20 - back] + others, 0)


def test_a_roll_back_beyond_all_sums_begins_the_mean_anew():
    """What was rolled back is never in a mean."""
    series = Series("global_mean", window=20)
    written(series, [100.0] * (MAX_TOTALS + 10), 0)
    series.forget(5)
    assert written(series, [2.0, 4.0], 5) == 3.0
