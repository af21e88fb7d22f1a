"""Pytrees: nested mappings, lists and tuples of leaves, walked with dotted paths.

A leaf is a tensor, int, float, bool, str or None. Anything else is refused by name, so that a state can always be
saved without pickle. This is not a registry: there are no other containers.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

PyTree = Any
Leaf = Tensor | int | float | bool | str | None
_LEAVES = (int, float, bool, str, type(None))


def named_leaves(tree: PyTree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Yield (dotted path, leaf) for every leaf, mappings in their own order; `prefix` is the path of the tree itself.

    Raises:
      TypeError: a leaf is of another kind, or a mapping has a key that is not a string.
    Example:
      >>> list(named_leaves({"a": [1, 2.0], "b": {"c": None}}))
      [('a.0', 1), ('a.1', 2.0), ('b.c', None)]
    """
    for path, item in _walk(tree, prefix, ordered=False):
        if not isinstance(item, _Opened):
            yield path, item


def map_tensors(fn: Callable[[Tensor], Tensor], tree: PyTree) -> PyTree:
    """Rebuild a tree with `fn` applied to its tensors, other leaves kept.

    Example:
      >>> map_tensors(torch.neg, [torch.ones(()), "x"])
      [tensor(-1.), 'x']
    """
    return _refill(tree, map(fn, tensors(tree)))


def tensors(tree: PyTree, found: list[Tensor] | None = None) -> list[Tensor]:
    """Return the tensors of a tree, in its order; they are added to `found`, if that is given.

    Example:
      >>> tensors({"a": [torch.ones(()), 2.0]})
      [tensor(1.)]
    """
    found = [] if found is None else found
    # Every step walks over the optimizer's state: the likely kinds are asked first, the abstract one last.
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (dict, MappingProxyType, Mapping)):
        for value in tree.values():
            tensors(value, found)
    elif type(tree) is tuple or type(tree) is list:
        for value in tree:
            tensors(value, found)
    return found


def clone(tree: PyTree) -> PyTree:
    """Copy every tensor of a tree, detached, strides kept, in one foreach call; other leaves are shared.

    Example:
      >>> tree = {"a": torch.zeros(2)}
      >>> clone(tree)["a"].add_(1), tree["a"]
      (tensor([1., 1.]), tensor([0., 0.]))
    """
    return _refill(tree, iter(clone_tensors(tensors(tree))))


def copy_into(target: PyTree, source: PyTree) -> bool:
    """Copy the tensors of a tree over those of another of the same structure; False, and nothing done, if it is not.

    Structure: the same containers, keys, shapes, dtypes, devices and other leaves, and no memory that both share.

    Example:
      >>> target = {"a": torch.zeros(2)}
      >>> copy_into(target, {"a": torch.ones(2)}), target
      (True, {'a': tensor([1., 1.])})
    """
    pairs = list(zip_longest(_walk(target, "", ordered=True), _walk(source, "", ordered=True), fillvalue=("", None)))
    if not all(
        one[0] == other[0] and _same(one[1], other[1], lambda a, b: a.device == b.device) for one, other in pairs
    ):
        return False
    targets, sources = (
        [local(item) for _, item in walk if isinstance(item, Tensor)] for walk in zip(*pairs, strict=True)
    )
    if {t.untyped_storage().data_ptr() for t in targets} & {s.untyped_storage().data_ptr() for s in sources}:
        return False
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    return True


def clone_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors into fresh storage, detached, dense strides kept.

    Example:
      >>> clone_tensors([torch.ones(1)])
      [tensor([1.])]
    """
    if not tensors:
        return []
    if any(local(tensor) is not tensor for tensor in tensors):
        copies = clone_tensors([local(tensor) for tensor in tensors])
        return [relocated(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True)]
    with torch.no_grad():
        # torch >= 2.12 has one call for it; before that the same two loops, spelled out.
        if hasattr(torch, "_foreach_clone"):
            return list(torch._foreach_clone(tensors))
        copies = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return copies


def bitwise_equal(a: PyTree, b: PyTree) -> bool:
    """Tell whether two trees have the same structure and every leaf the same bits.

    Unlike `==`: nan equals itself, 0.0 differs from -0.0, 1 from 1.0, float32 from float64. Strides, devices and
    the order of keys do not count.

    Example:
      >>> bitwise_equal({"x": float("nan")}, {"x": float("nan")}), bitwise_equal(0.0, -0.0)
      (True, False)
    """
    # A container's mark holds its length, so walks of different length differ before the shorter one ends.
    walks = zip(_walk(a, "", ordered=True), _walk(b, "", ordered=True), strict=False)
    return all(one[0] == other[0] and _same(one[1], other[1], _same_bytes) for one, other in walks)


def fingerprint(tree: PyTree) -> str:
    """Hash structure and bits of a tree to 16 hexadecimal digits; equal exactly when `bitwise_equal`.

    Cost: one pass over all bytes on the host (about 1 GB/s), with a device transfer where needed.

    Example:
      >>> fingerprint({"a": 1}) == fingerprint({"a": 1}), fingerprint({"a": 1}) == fingerprint({"a": True})
      (True, False)
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, item in _walk(tree, "", ordered=True):
        digest.update(repr((path, _kind(item))).encode())
        digest.update(to_bytes(item) if isinstance(item, Tensor) else repr(_bits(item)).encode())
    return digest.hexdigest()


def local(tensor: Any) -> Any:
    """Return this rank's part of a tensor that is split over ranks (a DTensor), or the tensor itself.

    Example:
      >>> local(torch.ones(1))
      tensor([1.])
    """
    return tensor._local_tensor if type(tensor) is not Tensor and hasattr(tensor, "_local_tensor") else tensor


def relocated(tensor: Any, part: Tensor) -> Any:
    """Return a tensor split like another one, around another part.

    Example:
      >>> relocated(torch.ones(1), torch.zeros(1))
      tensor([0.])
    """
    if local(tensor) is tensor:
        return part
    return type(tensor)(part, tensor._spec, requires_grad=False)


def rows(tensor: Any) -> tuple[int, int]:
    """Return the first row and the number of rows that this rank holds of a tensor split over ranks.

    Raises:
      ValueError: it is not split by rows over one group of ranks.
    """
    placements, mesh = tensor.placements, tensor.device_mesh
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(f"got a tensor with placements {placements}, expected one split by rows")
    size = tensor.shape[0]
    return min(mesh.get_local_rank() * -(-size // mesh.size()), size), local(tensor).shape[0]


def split_like(tensor: Any, other: Tensor) -> Tensor:
    """Return a whole tensor split over ranks as another one is; as it is, if that one is whole or it is split already.

    Example:
      >>> split_like(torch.ones(2), torch.zeros(2))
      tensor([0., 0.])
    """
    if local(tensor) is tensor or local(other) is not other or other.shape != tensor.shape:
        return other
    start, number = rows(tensor)
    return relocated(tensor, other.detach()[start : start + number].clone())  # type: ignore[no-any-return]


def to_bytes(tensor: Tensor) -> memoryview:
    r"""View the bytes of a tensor, of one split over ranks its part, in logical (C) order; copies if it must.

    Example:
      >>> bytes(to_bytes(torch.tensor([1, 2], dtype=torch.int16)))
      b'\x01\x00\x02\x00'
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise TypeError(f"got a {tensor.layout} tensor, expected a plain dense one; convert it with .to_dense()")
    tensor = local(tensor)
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def brief(leaf: Leaf) -> Leaf:
    """Return what tells a leaf from most others at little cost: of a whole tensor a text with the sum of its bits.

    Cost: reads a tensor once, on its device.

    Example:
      >>> brief(torch.ones(2)), brief(3)
      ('torch.float32 [2] 2130706432', 3)
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if local(leaf) is not leaf:
        return f"{leaf.dtype} {list(leaf.shape)}"
    real = torch.view_as_real(leaf.detach().resolve_conj()) if leaf.is_complex() else leaf.detach()
    bits = real.contiguous().view(_INTEGERS[real.element_size()]).sum(dtype=torch.int64)
    return f"{leaf.dtype} {list(leaf.shape)} {int(bits)}"


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _refill(tree: PyTree, tensors: Iterator[Tensor]) -> PyTree:
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, (dict, MappingProxyType, Mapping)):
        return {key: _refill(value, tensors) for key, value in tree.items()}
    if type(tree) is tuple or type(tree) is list:
        return type(tree)([_refill(value, tensors) for value in tree])
    return tree


class _Opened(str):
    """Marks where a container begins, by its kind and length, so that [] and {} and a missing key differ."""


def _walk(tree: PyTree, path: str, *, ordered: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        yield path, _Opened(f"dict{len(tree)}")
        for key in sorted(tree) if ordered else tree:
            if not isinstance(key, str):
                raise TypeError(f"{path or 'tree'}: got key {key!r}, expected a string")
            yield from _walk(tree[key], f"{path}.{key}" if path else key, ordered=ordered)
    elif type(tree) is list or type(tree) is tuple:
        yield path, _Opened(f"{type(tree).__name__}{len(tree)}")
        for index, value in enumerate(tree):
            yield from _walk(value, f"{path}.{index}" if path else str(index), ordered=ordered)
    elif isinstance(tree, Tensor) or type(tree) in _LEAVES:  # no subclasses: np.float64 would come back as a float
        yield path, tree
    else:
        raise TypeError(
            f"{path or 'tree'}: got {type(tree).__name__}, expected a tensor, number, string, None, or a dict, "
            "list or tuple of them"
        )


def _kind(item: Any) -> tuple[Any, ...]:
    if isinstance(item, Tensor):
        return ("tensor", str(item.dtype), tuple(item.shape))
    return (str(item),) if isinstance(item, _Opened) else (type(item).__name__,)


def _bits(item: Any) -> Any:
    if isinstance(item, _Opened):
        return None
    return struct.pack("<d", item) if isinstance(item, float) else item


def _same(a: Any, b: Any, same_tensors: Callable[[Tensor, Tensor], bool]) -> bool:
    return _kind(a) == _kind(b) and (same_tensors(a, b) if isinstance(a, Tensor) else bool(_bits(a) == _bits(b)))


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a is b or to_bytes(a) == to_bytes(b)
