"""Checks of arguments, said once: where, got, expected."""

import operator
from typing import Any


def whole(name: str, value: Any, low: int) -> int:
    """Return a whole number >= low as an int (NumPy's too); raises ValueError that names the argument.

    Example:
      >>> whole("every", 0, 1)
      Traceback (most recent call last):
      ValueError: every: got 0, expected a whole number >= 1
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low:
        raise ValueError(f"{name}: got {value!r}, expected a whole number >= {low}")
    return number
