"""What a step needs to know of a batch: how many samples it has, and how to split it into micro-batches.

A batch is a tensor, or nested mappings, tuples and lists of tensors (or arrays) whose first dimension counts samples,
and of lists with one mapping, string or number for each sample. A list of tensors is a list of fields, as torch's
default collate makes it: pass `split=` for a list with one tensor for each sample. The rest goes to all micro-batches.
"""

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Batch = Any


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
    """Rebuild a batch with `fn` applied to its tensors, in mappings, lists, tuples and dataclasses.

    Example:
      >>> import torch
      >>> map_batch(torch.neg, {"x": torch.ones(()), "name": "a"})
      {'x': tensor(-1.), 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        new = {key: map_batch(fn, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return new
        kind = copy.copy(batch)
        kind.update(new)
        return kind
    if isinstance(batch, tuple | list):
        parts = [map_batch(fn, value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
        return dataclasses.replace(batch, **{name: map_batch(fn, value) for name, value in fields.items()})
    return batch


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
    if isinstance(batch, Mapping):
        return (type(batch), *((key, signature(value)) for key, value in batch.items()))
    if isinstance(batch, tuple | list):
        return (type(batch), *map(signature, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return (type(batch), *(signature(getattr(batch, field.name)) for field in dataclasses.fields(batch)))
    if hasattr(batch, "tobytes"):  # an array
        return (str(batch.dtype), batch.shape, batch.tobytes())
    return (type(batch), batch) if isinstance(batch, Hashable) else repr(batch)


def _sizes(batch: Batch, path: str) -> Iterator[tuple[str, int]]:
    if _is_array(batch):
        if batch.ndim > 0:
            yield path, batch.shape[0]
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _sizes(value, f"{path}[{key!r}]")
    elif _is_sample_list(batch):
        yield path, len(batch)
    elif isinstance(batch, tuple | list):
        for index, value in enumerate(batch):
            yield from _sizes(value, f"{path}[{index}]")


def _is_sample_list(value: Any) -> bool:
    """One mapping, string or number for each sample, as the default collate and detection batches have them."""
    kinds = (Mapping, str, int, float)
    return isinstance(value, tuple | list) and bool(value) and all(isinstance(item, kinds) for item in value)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def _slice(batch: Batch, start: int, end: int) -> Batch:
    if _is_array(batch):
        return batch[start:end] if batch.ndim > 0 else batch
    if isinstance(batch, Mapping):
        return {key: _slice(value, start, end) for key, value in batch.items()}
    if _is_sample_list(batch):
        return batch[start:end]
    if isinstance(batch, tuple | list):
        parts = [_slice(value, start, end) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
