"""Takes a state apart into tensors and JSON, for a checkpoint, and builds it from these again.

Every leaf is checked here before anything is written, so that a leaf that can't be saved costs no half checkpoint.
"""

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.state import SAVED, TrainState, saved_fields
from fntrain.core.tree import PyTree
from fntrain.shell.checkpoints.manifest import MANIFEST, MODEL, TRAIN, Part, Stored, file_of
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.tensor_file import DTYPES

_STEP = re.compile(r"step_(\d{1,19})(\.old)?")


@attrs.frozen(eq=False)
class Contents:
    """What this rank is to write of a state.

    Args:
      step: of the state.
      structure: the saved fields as JSON, with the dotted path in place of a tensor.
      stored: the tensors, in the order of the files; of each one part, of those split over ranks this rank's. Where
        the bytes lie and their checksums are filled in when they are written.
      tensors: the values, in the same order, on whatever device.
      ranks: that write together; the first writes what is not split.
    """

    step: int
    structure: Any
    stored: list[Stored]
    tensors: list[Tensor]
    ranks: Ranks

    @classmethod
    def of(cls, state: TrainState) -> "Contents":
        """Look at every leaf; raises CheckpointError for one that can't be saved. Copies and reads no tensor."""
        fields = saved_fields(state)
        try:
            tensors = _tensors(fields)
            check_fields(fields)
        except TypeError as error:
            raise CheckpointError(f"state.{error}") from error
        ranks = state.run.ranks if state.run.ranks.sharded else ALONE
        mine = _of_this_rank(tensors, ranks)
        # Large elements first: every tensor of a file is aligned, so that other libraries can map it.
        mine.sort(key=lambda stored: (stored.parts[0].file == TRAIN, -DTYPES[stored.dtype][0].itemsize))
        _check_names(mine)
        values = [tree.local(tensors[stored.leaf]).detach() for stored in mine]
        return cls(state.step, encode(fields), mine, values, ranks)


def _tensors(fields: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for leaf, value in tree.named_leaves(fields):
        if isinstance(value, Tensor):
            if leaf in found:
                raise CheckpointError(f"state.{leaf}: two tensors have this dotted path; rename one of the keys")
            found[leaf] = value
    return found


def _of_this_rank(tensors: dict[str, Tensor], ranks: Ranks) -> list[Stored]:
    split = {leaf for leaf, tensor in tensors.items() if tree.local(tensor) is not tensor}
    mine = [_stored(leaf, tensor, ranks) for leaf, tensor in tensors.items() if leaf in split or ranks.rank == 0]
    for leaf in tensors.keys() - split:
        if leaf.rpartition("@")[0] in split:
            raise CheckpointError(f"state.{leaf}: is named like a part of one that is split over ranks; rename it")
    return mine


def _stored(leaf: str, tensor: Tensor, ranks: Ranks) -> Stored:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(f"state.{leaf}: got a {kind} tensor, expected a plain dense one")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"state.{leaf}: got {tensor.dtype}, which safetensors does not know; save real and imag")
    # The strides of a dense copy: the gaps and overlaps of a view are not kept.
    stride = None if tensor.is_contiguous() else tuple(torch.empty_like(tensor, device="meta").stride())
    name = leaf.partition(".")[2] if file_of(leaf) == MODEL else leaf
    device = None if tensor.device.type == "cpu" else tensor.device.type
    return Stored(leaf, name, dtype, tuple(tensor.shape), (_part(leaf, tensor, ranks),), stride, device)


def _part(leaf: str, tensor: Tensor, ranks: Ranks) -> Part:
    """What this rank writes of a tensor: all, or the rows that it holds of one that is split."""
    if tree.local(tensor) is tensor:
        return Part(leaf, file_of(leaf), tuple(tensor.shape))
    try:
        row, _ = tree.rows(tensor)
    except ValueError as error:
        raise CheckpointError(f"state.{leaf}: {error}") from error
    if ranks.world_size == 1:
        raise CheckpointError(
            f"state.{leaf}: is split over ranks, and the state does not know which: save what ft.fit returned, or its "
            "hooks got, on all ranks"
        )
    return Part(f"{leaf}@{ranks.rank}", file_of(leaf), tuple(tree.local(tensor).shape), row)


def _check_names(tensors: list[Stored]) -> None:
    """Refuse two tensors of one name in a file, and the name that the format reserves."""
    taken: set[tuple[str, str]] = set()
    for stored in tensors:
        key = (stored.parts[0].file, stored.name)
        if key in taken or stored.name == "__metadata__":
            why = f"the name {stored.name!r} is taken by a parameter or the format; rename one"
            raise CheckpointError(f"state.{stored.leaf}: {why}")
        taken.add(key)


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


def state_of(structure: Any, tensors: Mapping[str, Tensor], path: AnyPath, file: str = MANIFEST) -> TrainState:
    """Build a state of its structure and its tensors by dotted path.

    Args:
      structure: as `encode` makes it.
      tensors: by dotted path.
      path: of the checkpoint; if its name is that of a step, the state must be of that step.
      file: the one in the checkpoint that the structure comes from, for the message.
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
        raise CheckpointError(f"{path / file}: structure is damaged: {error!r}") from error


def check_fields(fields: Any) -> None:
    """Raise TypeError, naming the field, unless these can be the saved fields of a state.

    Example:
      >>> check_fields([])
      Traceback (most recent call last):
      TypeError: is list, expected a dict
    """
    _expect(Mapping, fields)
    for name in ("params", "buffers", "opt_state", "hooks", "extra"):
        _expect(Mapping, fields[name], f"{name}: ")
    for name in ("step", "position", "seed"):
        if type(fields[name]) is not int or (name != "seed" and fields[name] < 0):
            raise TypeError(f"{name}: is {fields[name]!r}, expected a whole number")
    for name, kind in {"params": Tensor, "buffers": Tensor, "opt_state": Mapping}.items():
        for key, value in fields[name].items():
            _expect(kind, value, f"{name}[{key!r}]: ")


def _expect(kind: type, value: Any, where: str = "") -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{where}is {type(value).__name__}, expected a {'tensor' if kind is Tensor else 'dict'}")
