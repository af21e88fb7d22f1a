"""A state as JSON and back: containers and small values as they are, in place of a tensor its dotted path."""

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fntrain.core.errors import CheckpointError
from fntrain.core.state import SAVED, TrainState
from fntrain.core.tree import PyTree
from fntrain.shell.checkpoints.paths import AnyPath

_STEP = re.compile(r"step_(\d{1,19})(\.old)?")


def encode(value: PyTree, path: str = "") -> Any:
    """Return a tree as JSON: containers and tensors tagged, everything else as it is.

    Example:
      >>> encode({"a": [1, 2.5]})
      {'dict': {'a': {'list': [1, 2.5]}}}
    """
    if isinstance(value, Tensor):
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": {key: encode(item, f"{path}.{key}" if path else key) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [encode(item, f"{path}.{index}") for index, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}  # every bit is kept, the sign of a nan too
    return value


def decode(value: Any, tensors: Mapping[str, Tensor]) -> PyTree:
    """Return the tree that `encode` has made JSON of.

    Example:
      >>> decode({"dict": {"a": {"tuple": [1]}}}, {})
      {'a': (1,)}
    """
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content.items()}
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    return {"list": list, "tuple": tuple}[kind](decode(item, tensors) for item in content)


def state_of(structure: Any, tensors: Mapping[str, Tensor], *, path: AnyPath, file: AnyPath) -> TrainState:
    """Build a state of its structure and its tensors by dotted path.

    Args:
      structure: as `encode` makes it.
      tensors: by dotted path.
      path: of the checkpoint; if its name is that of a step, the state must be of that step.
      file: that the structure comes from, for the message.
    Raises:
      CheckpointError: the structure is damaged, or the directory was renamed.
    """
    try:
        fields = decode(structure, tensors)
        check_fields(fields)
        named = _STEP.fullmatch(path.name)
        if named and int(named[1]) != fields["step"]:
            raise CheckpointError(f"{path}: holds step {fields['step']}; a directory that was renamed")
        return TrainState(**{name: fields[name] for name in SAVED})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file}: structure is damaged: {error!r}") from error


def check_fields(fields: Any) -> None:
    """Raise TypeError, naming the field, unless these can be the saved fields of a state.

    Example:
      >>> check_fields([])
      Traceback (most recent call last):
      TypeError: is list, expected a dict
    """
    if not isinstance(fields, Mapping):  # a tensor can be indexed too
        raise TypeError(f"is {type(fields).__name__}, expected a dict")
    for name in ("params", "buffers", "opt_state", "hooks", "extra"):
        if not isinstance(fields[name], Mapping):
            raise TypeError(f"{name}: is {type(fields[name]).__name__}, expected a dict")
    for name in ("step", "position", "seed"):
        if type(fields[name]) is not int or (name != "seed" and fields[name] < 0):
            raise TypeError(f"{name}: is {fields[name]!r}, expected a whole number")
    for name in ("params", "buffers"):
        for key, value in fields[name].items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}[{key!r}]: is {type(value).__name__}, expected a tensor")
    for key, kept in fields["opt_state"].items():
        if not isinstance(kept, Mapping):
            raise TypeError(f"opt_state[{key!r}]: is {type(kept).__name__}, expected a dict")
