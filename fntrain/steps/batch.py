"""What a step needs to know of a batch: how many samples it has, and how to split it into micro-batches.

A batch is a tensor, or nested containers (see `fntrain.steps.containers`) of tensors or arrays whose first dimension
counts samples, and of lists with one mapping, text or number for each sample. A list of tensors is a list of fields, as
torch's default collate makes it: pass `split=` for a list with one tensor for each sample. The rest goes to all
micro-batches.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fntrain.steps.containers import children, map_leaves

Batch = Any
_OF_SAMPLE = (str, int, float, Mapping)


def num_samples(batch: Batch) -> int:
    """Count the samples of a batch by the first dimension of its tensors (or the length of a list of samples).

    Raises:
      ValueError: no tensor to count by, or two that disagree.
    Example:
      >>> import torch
      >>> num_samples({"image": torch.zeros(8, 1, 4, 4), "label": torch.zeros(8)})
      8
    """
    first: tuple[str, int] | None = None
    for path, size in _sizes(batch, "batch"):
        if first is None:
            first = (path, size)
        elif size != first[1]:
            raise ValueError(
                f"{path}: has {size} samples, {first[0]} has {first[1]}; expected the same first dimension, "
                "or pass split=fn(batch, num) -> micro-batches to the step"
            )
    if first is None:
        raise ValueError(f"batch: got {type(batch).__name__} without a tensor of at least one dimension to count by")
    return first[1]


def split_batch(batch: Batch, num: int) -> list[Batch]:
    """Split a batch into `num` micro-batches whose sizes differ by at most one; views, nothing is copied.

    A batch of fewer samples gives one micro-batch a sample.

    Raises:
      ValueError: the batch is empty, or its samples can't be counted.
    Example:
      >>> import torch
      >>> [part.tolist() for part in split_batch(torch.arange(5), 2)]
      [[0, 1, 2], [3, 4]]
    """
    total = num_samples(batch)
    if total == 0:
        raise ValueError("batch: got 0 samples, expected at least one")
    num = min(num, total)
    bounds = [(total * i + num - 1) // num for i in range(num + 1)]
    return [_slice(batch, start, end) for start, end in pairwise(bounds)]


def map_batch(fn: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Rebuild a batch with `fn` applied to its tensors; other leaves stay.

    Example:
      >>> import torch
      >>> map_batch(torch.neg, {"x": torch.ones(()), "name": "a"})
      {'x': tensor(-1.), 'name': 'a'}
    """
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def move_batch(batch: Batch, device: torch.device | str) -> Batch:
    """Return a batch with its tensors on a device; an object with a method `to` of its own is asked to move itself.

    Transfers from pinned memory do not wait. On the device already, tensors are shared, not copied.

    Example:
      >>> import torch
      >>> move_batch([torch.ones(1), "a"], "cpu")
      [tensor([1.]), 'a']
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    # A record or named tuple that has `to` knows better: the lengths in a PackedSequence must stay on the CPU.
    if callable(getattr(batch, "to", None)) and not isinstance(batch, Mapping | type):
        return batch.to(device)
    found = children(batch)
    return batch if found is None else found.rebuild([move_batch(value, device) for value in found.values])


def signature(batch: Batch) -> Hashable:
    """Return what two batches have in common if only the values of their tensors differ.

    Example:
      >>> import torch
      >>> signature([torch.zeros(2), "a"]) == signature([torch.ones(2), "a"]) != signature([torch.ones(3), "a"])
      True
    """
    if isinstance(batch, Tensor):
        layout = batch.stride() if batch.layout is torch.strided else batch.layout
        return (batch.shape, batch.dtype, batch.device, layout)
    found = children(batch)
    if found is not None:
        kind: Any = type(batch)
        return (kind, tuple(found.keys), *map(signature, found.values))
    if hasattr(batch, "tobytes"):  # an array
        return (str(batch.dtype), batch.shape, batch.tobytes())
    return (type(batch), batch) if isinstance(batch, Hashable) else repr(batch)


def _sizes(batch: Batch, path: str) -> Iterator[tuple[str, int]]:
    if is_array(batch):
        if batch.ndim > 0:
            yield path, batch.shape[0]
    elif _is_sample_list(batch):
        yield path, len(batch)
    elif (found := children(batch)) is not None:
        for key, value in zip(found.keys, found.values, strict=True):
            yield from _sizes(value, f"{path}.{key}" if found.are_fields else f"{path}[{key!r}]")


def _is_sample_list(value: Any) -> bool:
    """Whether there is one mapping, text or number for each sample, as in detection batches and default collate's."""
    if not isinstance(value, (tuple, list)) or hasattr(value, "_fields"):  # a named tuple holds fields
        return False
    return bool(value) and all(isinstance(item, _OF_SAMPLE) for item in value)


def is_array(value: Any) -> bool:
    """Tell whether a value is a tensor or an array, such as NumPy's.

    Example:
      >>> import torch
      >>> is_array(torch.ones(2)), is_array([1.0, 1.0])
      (True, False)
    """
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def _slice(batch: Batch, start: int, end: int) -> Batch:
    if is_array(batch):
        return batch[start:end] if batch.ndim > 0 else batch
    if _is_sample_list(batch):
        return batch[start:end]
    found = children(batch)
    return batch if found is None else found.rebuild([_slice(value, start, end) for value in found.values])
