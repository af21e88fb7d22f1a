"""Look into checkpoints and safetensors files: what is in one, how two differ, whether all are whole.

`python -m fntrain` is the command line of these functions.
"""

import math
import os
from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import named_leaves
from fntrain.core.tree import Leaf
from fntrain.shell.checkpoints.commit import store_at
from fntrain.shell.checkpoints.manifest import MANIFEST
from fntrain.shell.checkpoints.paths import AnyPath, path_of
from fntrain.shell.checkpoints.reading import check
from fntrain.shell.checkpoints.save_load import latest, load
from fntrain.shell.weights.files import read_weights

_CHUNK = 1 << 22  # elements looked at in one go, so that float64 copies of a large tensor are never whole
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED = torch.float4_e2m1fn_x2  # two numbers a byte; torch can't convert them


@attrs.frozen(kw_only=True)
class LeafSummary:
    """One leaf: of a tensor shape, dtype, bytes and norm; of a number, text or None the value.

    Args:
      leaf: dotted path in a checkpoint, name in a safetensors file.
      shape: None for what is no tensor.
      dtype: of a tensor; the Python type of anything else.
      bytes: of the values; 0 for what is no tensor.
      norm: square root of the sum of squares in float64, without elements that are not finite; None for no tensor,
        or where torch can't read the numbers (float4).
      nonfinite: number of elements that are inf or nan.
      value: of what is no tensor.
    """

    leaf: str
    shape: tuple[int, ...] | None = None
    dtype: str
    bytes: int = 0
    norm: float | None = None
    nonfinite: int = 0
    value: int | float | str | None = None


@attrs.frozen(kw_only=True)
class LeafDifference:
    """A leaf that is not bitwise the same on both sides.

    Args:
      leaf: its name.
      reason: what differs, in words.
      max_abs: largest absolute difference of two elements; nan where only one of them is nan, None where the two sides
        can't be subtracted.
      ulp: largest number of steps from one floating-point number to the next, for two tensors of one dtype.
    """

    leaf: str
    reason: str
    max_abs: float | None = None
    ulp: int | None = None


@attrs.frozen(kw_only=True)
class Verdict:
    """Whether a checkpoint is whole; `problem` is None if every byte of it is as it was written."""

    path: AnyPath
    problem: str | None = None


def summaries(path: str | os.PathLike[str]) -> tuple[LeafSummary, ...]:
    """Summarise every leaf of a checkpoint, of the newest in a directory of them, or of safetensors files.

    Raises:
      CheckpointError: nothing there, or damaged.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     summaries(ft.export({"w": torch.tensor([3.0, 4.0])}, directory + "/w.safetensors"))
      (LeafSummary(leaf='w', shape=(2,), dtype='float32', bytes=8, norm=5.0, nonfinite=0, value=None),)
    """
    found = source(path)
    leaves = dict(named_leaves(load(found))) if _is_checkpoint(found) else read_weights(found)
    return tuple(_summary(name, leaf) for name, leaf in leaves.items())


def differences(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[LeafDifference, ...]:
    """List the leaves in which two checkpoints or safetensors files differ; empty if they are bitwise equal.

    Of a checkpoint beside a safetensors file, only the model's tensors are compared.

    Raises:
      CheckpointError: one is not there, or damaged.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     a = ft.export({"w": torch.ones(2)}, directory + "/a.safetensors")
      ...     b = ft.export({"w": torch.ones(2) + 2**-22}, directory + "/b.safetensors")
      ...     differences(a, a), differences(a, b)[0].ulp
      ((), 2)
    """
    one, other = source(a), source(b)
    if _is_checkpoint(one) and _is_checkpoint(other):
        states = load(one), load(other)
        listed = _differences(*(dict(named_leaves(state)) for state in states))
        if listed or states[0] == states[1]:
            return listed
        return (LeafDifference(leaf="", reason="the leaves are equal, but not the containers around them"),)
    return _differences(*(dict(read_weights(path)) for path in (one, other)))


def verify(directory: str | os.PathLike[str]) -> tuple[Verdict, ...]:
    """Read every byte of every checkpoint in a directory, newest first, or of the one checkpoint given.

    Raises:
      CheckpointError: there is none.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = ft.save(ft.TrainState(step=5, position=5, seed=0, params={"w": torch.zeros(2)}), directory)
      ...     [verdict.problem for verdict in verify(directory)]
      [None]
    """
    root = path_of(directory)
    found = [root] if _is_checkpoint(root) else store_at(root).claimed()
    if not found:
        raise CheckpointError(f"{root}: " + ("holds no checkpoints" if root.is_dir() else "no such directory"))
    return tuple(Verdict(path=path, problem=_problem(path)) for path in found)


def source(path: str | os.PathLike[str]) -> AnyPath:
    """Return what a path stands for: the newest checkpoint of a directory of them, anything else as it is.

    Example:
      >>> source("model.safetensors").name
      'model.safetensors'
    """
    found = path_of(path)
    return found if _is_checkpoint(found) else latest(found) or found


def _is_checkpoint(path: AnyPath) -> bool:
    return (path / MANIFEST).exists()


def _problem(path: AnyPath) -> str | None:
    try:
        check(path)
    except CheckpointError as error:
        return str(error)
    return None


def _summary(name: str, leaf: Leaf) -> LeafSummary:
    if not isinstance(leaf, Tensor):
        return LeafSummary(leaf=name, dtype=type(leaf).__name__, value=leaf)
    summary = LeafSummary(leaf=name, shape=tuple(leaf.shape), dtype=_dtype(leaf), bytes=leaf.nbytes)
    if leaf.dtype == _PACKED:
        return summary
    norm, nonfinite = 0.0, 0
    for [chunk] in _chunks(leaf):
        finite = chunk.isfinite()
        nonfinite += chunk.numel() - int(finite.sum())
        norm = math.hypot(norm, torch.linalg.vector_norm(chunk.where(finite, 0)).item())
    return attrs.evolve(summary, norm=norm, nonfinite=nonfinite)


def _differences(ours: Mapping[str, Leaf], theirs: Mapping[str, Leaf]) -> tuple[LeafDifference, ...]:
    return tuple(found for name in sorted(ours.keys() | theirs.keys()) if (found := _difference(name, ours, theirs)))


def _difference(name: str, ours: Mapping[str, Leaf], theirs: Mapping[str, Leaf]) -> LeafDifference | None:
    if name not in ours or name not in theirs:
        return LeafDifference(leaf=name, reason="only in the " + ("first" if name in ours else "second"))
    a, b = ours[name], theirs[name]
    if tree.bitwise_equal(a, b):
        return None
    if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype):
        return LeafDifference(leaf=name, reason="values", max_abs=_max_abs(a, b), ulp=_ulp(a, b))
    max_abs = abs(a - b) if isinstance(a, float) and isinstance(b, float) else None
    return LeafDifference(leaf=name, reason=f"{_described(a)} and {_described(b)}", max_abs=max_abs)


def _described(leaf: Leaf) -> str:
    return f"{tuple(leaf.shape)} {_dtype(leaf)}" if isinstance(leaf, Tensor) else repr(leaf)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _max_abs(a: Tensor, b: Tensor) -> float | None:
    if a.dtype == _PACKED:
        return None
    if a.dtype in _INTEGERS.values():
        return float(_steps(a.long(), b.long()))  # exact where float64 would round both to one number
    largest = torch.zeros((), dtype=torch.float64)
    for x, y in _chunks(a, b):
        same = (x == y) | (x.isnan() & y.isnan())  # inf minus inf would be nan
        largest = torch.maximum(largest, (x - y).abs().where(~same, 0).max())  # nan stays
    return largest.item()


def _ulp(a: Tensor, b: Tensor) -> int | None:
    """Largest distance in representable numbers; 0.0 and -0.0 are one. None if not of floats, or one side is nan."""
    if a.dtype not in _FLOATS:
        return None
    kind = _INTEGERS[a.itemsize]
    most = 0
    for (x, y), bits in zip(_chunks(a, b), _chunks(a, b, kind=kind), strict=True):
        if not torch.equal(x.isnan(), y.isnan()):
            return None
        # Bits of a float, read as an integer with a sign, count the numbers from 0 upwards; downwards from the lowest.
        ordered = [one.where(one >= 0, torch.iinfo(kind).min - one).where(~x.isnan(), 0) for one in bits]
        most = max(most, _steps(*ordered))
    return most


def _steps(a: Tensor, b: Tensor) -> int:
    """The largest |a - b| of int64 tensors; exact, but to float64 where a difference across 0 is above 2**53."""
    if not a.numel():
        return 0
    across = (a < 0) != (b < 0)
    near, far = (a - b).abs().where(~across, 0), (a.double().abs() + b.double().abs()).where(across, 0)
    return max(int(near.max()), int(far.max()))


def _chunks(*tensors: Tensor, kind: torch.dtype | None = None) -> Iterator[list[Tensor]]:
    """Pieces of tensors of one shape in float64, of complex ones both parts; or of their bits, as int64."""
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    flat = [one.contiguous().view(-1) for one in real]
    for start in range(0, flat[0].numel(), _CHUNK):
        pieces = [one[start : start + _CHUNK] for one in flat]
        yield [one.double() if kind is None else one.view(kind).long() for one in pieces]
