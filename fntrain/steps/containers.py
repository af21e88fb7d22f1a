"""What is a container: one law for batches, a model's outputs, predictions, and the inputs of programs and graphs.

Containers are mappings of any class, lists, tuples (named ones and those of torch.return_types too), dataclasses and
attrs records. All else is a leaf: tensors, arrays, numbers, texts, other objects. What a state may hold is stricter,
see `fntrain.core.tree`.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import attrs
from torch import Tensor


class Children(NamedTuple):
    """What a container holds: keys, fields or indices, the values there, and how one like it is made of others.

    `rebuild` keeps no reference to the values: a program that keeps it would keep a batch alive.
    """

    keys: Sequence[Any]
    values: Sequence[Any]
    rebuild: Callable[[Sequence[Any]], Any]
    are_fields: bool = False  # whether the keys are names of a record's fields


def children(value: Any) -> Children | None:
    """Return what a container holds, None for a leaf. Of a record these are the fields that its constructor takes.

    Example:
      >>> found = children({"x": 1, "y": 2})
      >>> found.keys, found.values, found.rebuild([3, 4])
      (('x', 'y'), (1, 2), {'x': 3, 'y': 4})
    """
    kind = type(value)
    if kind is dict:  # the kinds that most batches are made of come first
        keys = tuple(value)
        return Children(keys, tuple(value.values()), partial(_dict, keys))
    if kind is tuple or kind is list:
        return Children(range(len(value)), value, kind)
    if isinstance(value, Tensor):
        return None
    if hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__attrs_attrs__"):
        names, arguments = _fields(kind)
        return Children(names, [getattr(value, name) for name in names], partial(_record, kind, arguments), True)
    if isinstance(value, Mapping):
        return Children(tuple(value), tuple(value.values()), partial(_mapping, _emptied(value), tuple(value)))
    if isinstance(value, tuple | list):
        # A named tuple takes its fields one by one, but has a second constructor for all of them.
        return Children(range(len(value)), value, getattr(kind, "_make", kind))
    return None


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """Rebuild nested containers with `fn` applied to every leaf.

    Example:
      >>> map_leaves(str, {"x": [1, 2.0]})
      {'x': ['1', '2.0']}
    """
    found = children(value)
    return fn(value) if found is None else found.rebuild([map_leaves(fn, item) for item in found.values])


def leaves(value: Any) -> list[Any]:
    """Return the leaves of nested containers, in their order.

    Example:
      >>> leaves({"x": [1, 2.0], "y": ("text",)})
      [1, 2.0, 'text']
    """
    found = children(value)
    return [value] if found is None else [leaf for item in found.values for leaf in leaves(item)]


def _fields(kind: Any) -> tuple[list[str], list[str]]:
    """Names of the fields that the constructor takes, and the names that it takes them by."""
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        return names, names
    fields = [field for field in attrs.fields(kind) if field.init]
    return [field.name for field in fields], [field.alias or field.name for field in fields]


def _dict(keys: Sequence[Any], values: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(keys, values, strict=True))


def _record(kind: Any, arguments: Sequence[str], values: Sequence[Any]) -> Any:
    return kind(**dict(zip(arguments, values, strict=True)))


def _emptied(value: Mapping[Any, Any]) -> Any:
    """An empty mapping of the same class and attributes; of a class of one's own, its constructor; else dict."""
    if not isinstance(value, MutableMapping):
        return dict
    if not isinstance(value, dict | UserDict):
        return type(value)  # a copy of it could share what it holds with the original
    empty = copy.copy(value)
    empty.clear()
    return empty


def _mapping(empty: Any, keys: Sequence[Any], values: Sequence[Any]) -> Any:
    if isinstance(empty, type):
        return empty(_dict(keys, values))
    new = copy.copy(empty)
    for key, item in zip(keys, values, strict=True):  # not update(), which adds up in a Counter
        new[key] = item
    return new
