"""What is to be written of a state, found out before anything is written: every leaf is looked at here."""

from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.state import TrainState, saved_fields
from fntrain.shell.checkpoints.manifest import MODEL, TRAIN, Part, Stored, file_of
from fntrain.shell.checkpoints.structure import check_fields, encode
from fntrain.shell.checkpoints.tensor_file import DTYPES


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
    mine = [
        _part_of_rank(_stored(leaf, tensor), tensor, ranks) if leaf in split else _stored(leaf, tensor)
        for leaf, tensor in tensors.items()
        if leaf in split or ranks.rank == 0
    ]
    for leaf in tensors.keys() - split:
        if leaf.rpartition("@")[0] in split:
            raise CheckpointError(f"state.{leaf}: is named like a part of one that is split over ranks; rename it")
    return mine


def _stored(leaf: str, tensor: Tensor) -> Stored:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(f"state.{leaf}: got a {kind} tensor, expected a plain dense one")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"state.{leaf}: got {tensor.dtype}, which safetensors does not know; save real and imag")
    # The strides of a dense copy: the gaps and overlaps of a view are not kept.
    strides = None if tensor.is_contiguous() else tuple(torch.empty_like(tensor, device="meta").stride())
    shape, file = tuple(tensor.shape), file_of(leaf)
    return Stored(
        leaf=leaf,
        name=leaf.partition(".")[2] if file == MODEL else leaf,
        dtype=dtype,
        shape=shape,
        parts=(Part(leaf, file, shape),),
        stride=strides,
        device=None if tensor.device.type == "cpu" else tensor.device.type,
    )


def _part_of_rank(stored: Stored, tensor: Tensor, ranks: Ranks) -> Stored:
    """The same with the rows that this rank holds as its part."""
    leaf = stored.leaf
    try:
        row, _ = tree.rows(tensor)
    except ValueError as error:
        raise CheckpointError(f"state.{leaf}: {error}") from error
    if ranks.world_size == 1:
        raise CheckpointError(
            f"state.{leaf}: is split over ranks, and the state does not know which: save what ft.fit returned, or its "
            "hooks got, on all ranks"
        )
    part = Part(f"{leaf}@{ranks.rank}", file_of(leaf), tuple(tree.local(tensor).shape), row)
    return attrs.evolve(stored, parts=(part,))


def _check_names(tensors: list[Stored]) -> None:
    """Refuse two tensors of one name in a file, and a name that the format has for itself."""
    taken: set[tuple[str, str]] = set()
    for stored in tensors:
        key = (stored.parts[0].file, stored.name)
        if key in taken or stored.name == "__metadata__":
            raise CheckpointError(
                f"state.{stored.leaf}: the name {stored.name!r} is taken by a parameter or the format; rename one"
            )
        taken.add(key)
