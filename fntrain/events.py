"""Reports from inside a step: scalars and media, callable from anywhere in the model, with no global storage.

A step collects what its forward reports and returns it in `state.metrics`. The collector lives in a context variable
for the duration of one forward; outside of one, reporting is an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core.check import real
from fntrain.metrics import Combine, MetricName, Reduce, Scalar, Smooth

__all__ = [
    "Collector",
    "Combine",
    "Histogram",
    "Image",
    "MetricName",
    "Reduce",
    "Scalar",
    "Smooth",
    "Text",
    "collecting",
    "merge",
    "name_scope",
    "put_histogram",
    "put_image",
    "put_scalar",
    "put_scalars",
    "put_text",
]


@attrs.frozen(eq=False)
class Image:
    """An image in the metrics: shape (channels, height, width), floats in [0, 1] or uint8."""

    tensor: Tensor


@attrs.frozen(eq=False)
class Histogram:
    """Values in the metrics whose distribution a writer shows; any shape."""

    tensor: Tensor


@attrs.frozen
class Text:
    """Text in the metrics, markdown where the writer knows it."""

    text: str


class Collector:
    """What one forward reported: name -> values, and media."""

    __slots__ = ("media", "prefix", "scalars")

    def __init__(self) -> None:
        self.scalars: dict[str, list[Scalar]] = {}
        self.media: dict[str, Any] = {}
        self.prefix = ""


_current: ContextVar[Collector] = ContextVar("fntrain_collector")


def put_scalar(name: str, value: Scalar | int, *, reduce: Combine = "mean", smooth: bool = True) -> None:
    """Report a number from inside a step; it appears in `state.metrics`.

    A tensor is detached and copied, never synchronised with the host. Calls during a backward (recomputation by
    activation checkpointing) are ignored. Several calls of one name in a step combine by `reduce`; means over
    micro-batches are weighted like the loss.

    Args:
      name: put after the names of the enclosing `name_scope`s.
      value: a number or a tensor with one element.
      reduce: how several values combine.
      smooth: False for what should be shown as it is rather than as a median over the last steps.
    Raises:
      RuntimeError: called outside of a step.
      TypeError: no number.
      ValueError: a tensor with more than one element, or an unknown `reduce`.
    Example:
      >>> with collecting() as collector:
      ...     put_scalar("accuracy", torch.tensor(0.5))
      >>> merge([(collector, 1.0)])
      {'accuracy': tensor(0.5000)}
    """
    collector = _collector("put_scalar", name)
    if collector is None:
        return
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"put_scalar({name!r}): got shape {tuple(value.shape)}, expected one element")
        value = value.detach().reshape(()).clone()
    else:
        value = real(f"put_scalar({name!r}): got", value)
    if reduce not in ("mean", "sum", "max", "min"):
        raise ValueError(f"put_scalar({name!r}): got reduce={reduce!r}, expected mean, sum, max or min")
    key = MetricName(collector.prefix + name, reduce, "median" if smooth else "latest")
    collector.scalars.setdefault(key, []).append(value)


def put_scalars(values: Mapping[str, Scalar | int], *, reduce: Combine = "mean", smooth: bool = True) -> None:
    """Report several numbers, see `put_scalar`.

    Example:
      >>> with collecting() as collector:
      ...     put_scalars({"a": 1.0, "b": 2.0})
      >>> merge([(collector, 1.0)])
      {'a': 1.0, 'b': 2.0}
    """
    for name, value in values.items():
        put_scalar(name, value, reduce=reduce, smooth=smooth)


def put_image(name: str, image: Tensor) -> None:
    """Report an image of shape (channels, height, width), floats in [0, 1] or uint8; the last of a step is kept.

    Raises:
      ValueError: another shape.
      RuntimeError: called outside of a step.
    Example:
      >>> with collecting() as collector:
      ...     put_image("input", torch.zeros(1, 8, 8))
      >>> merge([(collector, 1.0)])["input"].tensor.shape
      torch.Size([1, 8, 8])
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3, 4):
        raise ValueError(f"put_image({name!r}): got shape {tuple(image.shape)}, expected (1, 3 or 4, height, width)")
    _put_media("put_image", name, Image(image.detach().clone()))


def put_histogram(name: str, values: Tensor) -> None:
    """Report the distribution of a tensor's values; the last of a step is kept.

    Example:
      >>> with collecting() as collector:
      ...     put_histogram("activations", torch.zeros(4))
      >>> list(merge([(collector, 1.0)]))
      ['activations']
    """
    _put_media("put_histogram", name, Histogram(values.detach().clone()))


def put_text(name: str, text: str) -> None:
    """Report a text; the last of a step is kept.

    Example:
      >>> with collecting() as collector:
      ...     put_text("sample", "to be or not")
      >>> merge([(collector, 1.0)])
      {'sample': Text(text='to be or not')}
    """
    _put_media("put_text", name, Text(text))


@contextmanager
def name_scope(name: str) -> Iterator[None]:
    """Put `name/` before the names of everything reported inside; does nothing outside of a step.

    Example:
      >>> with collecting() as collector, name_scope("head"):
      ...     put_scalar("loss", 1.0)
      >>> merge([(collector, 1.0)])
      {'head/loss': 1.0}
    """
    collector = _current.get(None)
    if collector is None:
        yield
        return
    before = collector.prefix
    collector.prefix = f"{before}{name}/"
    try:
        yield
    finally:
        collector.prefix = before


class collecting:  # noqa: N801  # a context manager spelled out: it is entered once a micro-batch
    """Collect what is reported inside the block; steps wrap each forward in it.

    Example:
      >>> with collecting() as collector:
      ...     put_scalar("n", 1)
      >>> collector.scalars
      {'n': [1]}
    """

    __slots__ = ("token",)

    def __enter__(self) -> Collector:
        collector = Collector()
        self.token = _current.set(collector)
        return collector

    def __exit__(self, *_: object) -> None:
        _current.reset(self.token)


def merge(collected: Sequence[tuple[Collector, Scalar]]) -> dict[str, Any]:
    """Combine what several forwards reported, each with the weight of its micro-batch, into metrics.

    One value of a name stays as it is, bit for bit. Of media the last is kept.

    Example:
      >>> parts = []
      >>> for value in (1.0, 4.0):
      ...     with collecting() as collector:
      ...         put_scalar("x", value)
      ...     parts.append((collector, value))
      >>> merge(parts)
      {'x': 3.4}
    """
    values: dict[str, list[tuple[Scalar, Scalar]]] = {}
    metrics: dict[str, Any] = {}
    for collector, weight in collected:
        for name, scalars in collector.scalars.items():
            share = weight / len(scalars)
            values.setdefault(name, []).extend((value, share) for value in scalars)
        metrics.update(collector.media)
    for name, weighted in values.items():
        metrics[name] = weighted[0][0] if len(weighted) == 1 else _combine(name, weighted)
    return metrics


def _combine(name: str, weighted: list[tuple[Scalar, Scalar]]) -> Scalar:
    values = [value for value, _ in weighted]
    reduce = getattr(name, "reduce", "mean")
    if reduce == "sum":
        return sum(values[1:], start=values[0])
    if reduce in ("max", "min"):
        extreme = torch.amax if reduce == "max" else torch.amin
        if any(isinstance(value, Tensor) for value in values):
            return extreme(torch.stack([torch.as_tensor(value) for value in values]), dim=0)
        return max(values) if reduce == "max" else min(values)
    total = sum((weight for _, weight in weighted[1:]), start=weighted[0][1])
    first, *others = [_weighed(value, weight) for value, weight in weighted]
    return float("nan") if isinstance(total, int | float) and total == 0 else sum(others, start=first) / total


def _weighed(value: Scalar, weight: Scalar) -> Scalar:
    """The product; 0 without weight, where a mean over nothing was nan."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, value * weight)
    return value * weight if weight else 0.0


def _collector(caller: str, name: str) -> Collector | None:
    if torch._C._current_graph_task_id() != -1:  # inside a backward, on whatever thread autograd runs it
        return None
    collector = _current.get(None)
    if collector is None:
        raise RuntimeError(
            f"{caller}({name!r}): called outside of a step; report from the loss function or the model, "
            "or return metrics from a hook with state.replace(metrics={**state.metrics, ...})"
        )
    return collector


def _put_media(caller: str, name: str, value: Image | Histogram | Text) -> None:
    collector = _collector(caller, name)
    if collector is not None:
        collector.media[collector.prefix + name] = value
