"""Checks of arguments, said once: where, got, expected. A wrong value raises ValueError, a wrong kind TypeError."""

import operator
from collections.abc import Callable, Sequence
from numbers import Real
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


def number(name: str, value: Any, holds: Callable[[Any], bool], expected: str, *, optional: bool = False) -> None:
    """Raise ValueError unless a value is a number for which `holds` is true, or None where that is allowed.

    Example:
      >>> number("decay", 1.5, lambda decay: 0 <= decay < 1, "in [0, 1)")
      Traceback (most recent call last):
      ValueError: decay: got 1.5, expected a number in [0, 1)
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
        raise ValueError(f"{name}: got {value!r}, expected a number {expected}{' or None' if optional else ''}")


def one_of(name: str, value: Any, choices: Sequence[Any], expected: str | None = None) -> None:
    """Raise ValueError unless a value is one of several; `expected` lists them in other words.

    Example:
      >>> one_of("mode", "best", ("max", "min"))
      Traceback (most recent call last):
      ValueError: mode: got 'best', expected 'max' or 'min'
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}: got {value!r}, expected {expected or ', '.join(others) + ' or ' + last}")


def function(name: str, value: Any, expected: str = "a function", *, optional: bool = False) -> None:
    """Raise TypeError unless a value can be called, or is None where that is allowed.

    Example:
      >>> function("fn", 3, "a function of the state")
      Traceback (most recent call last):
      TypeError: fn: got int, expected a function of the state
    """
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")


def real(where: str, value: Any, error: type[Exception] = TypeError) -> float:
    """Return a number as Python's own, an int as it is; raises `error` whose message begins with `where`.

    Example:
      >>> real("put_scalar('x'): got", "text")
      Traceback (most recent call last):
      TypeError: put_scalar('x'): got str, expected a number
    """
    if isinstance(value, int | float):
        return value
    try:
        return float(value)  # NumPy's numbers
    except (TypeError, ValueError) as wrong:
        raise error(f"{where} {type(value).__name__}, expected a number") from wrong
