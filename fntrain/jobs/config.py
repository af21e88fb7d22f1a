"""Config: the settings of a run as a record, to and from plain dicts, and scaled to another number of processes."""

import enum
import json
from collections.abc import Mapping
from pathlib import PurePath
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from fntrain.core.check import whole
from fntrain.core.errors import ConfigError
from fntrain.steps.precision import Precision

C = TypeVar("C")


@attrs.frozen
class _AtLeast:
    """A validator that raises ConfigError unless the field is a whole number >= low."""

    low: int

    def __call__(self, _config: Any, field: "attrs.Attribute[int]", value: int) -> None:
        try:
            whole(field.name, value, self.low)
        except ValueError as error:
            raise ConfigError(*error.args) from error


def _count(default: int, low: int = 1) -> Any:
    return attrs.field(default=default, validator=_AtLeast(low))


@attrs.frozen(kw_only=True)
class Config:
    """Settings of a run. Inherit to add your own; every field becomes a flag of the command line, see `ft.main`.

    Raises:
      ConfigError: a number that counts something is too small; the message names it.
    """

    output_dir: str = "runs/default"
    """Directory of the run: checkpoints, logs, config.json. A run started again there goes on."""
    seed: int = 0
    """What every random draw derives from."""
    max_steps: int = _count(1000)
    """Number of steps in all, those of earlier runs in the same directory included."""
    batch_size: int = _count(64)
    """Samples per step, over all processes."""
    accumulate: int = _count(1)
    """Number of parts that a batch is split into, to save memory; the result is that of one."""
    num_workers: int = _count(0, 0)
    """Processes that load data; 0 loads in the training process."""
    lr: float = 1e-3
    """Learning rate at its peak."""
    warmup_steps: int = _count(0, 0)
    """Steps in which the learning rate rises to its peak; then it falls to 0 as a cosine."""
    weight_decay: float = 0.01
    """Of AdamW; not applied to norms and biases."""
    clip_grad_norm: float | None = None
    """Largest 2-norm of the gradients; None: no limit."""
    precision: Precision = "fp32"
    """In which model and loss compute; the weights are kept in float32."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one, each process its own."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What each of several processes holds: the whole state ("ddp"), or a part of it ("fsdp")."""
    weights: str | None = None
    """Checkpoint or safetensors file to start from; a run that goes on has its own and does not read it."""
    log_every: int = _count(20)
    """Steps between two lines of metrics."""
    eval_every: int = _count(500)
    """Steps between two evaluations; the last step is always followed by one."""
    checkpoint_every: int = _count(500)
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = _count(3)
    """Number of checkpoints to keep."""
    reference_world_size: int = _count(0, 0)
    """Number of processes that these settings are meant for, see `ft.scale_config`; 0: any."""


def to_dict(config: Any) -> dict[str, Any]:
    """Return a record's settings as plain values: records as dicts, tuples as lists, enums by name, paths as text.

    Raises:
      TypeError: a value is none of these, nor a number, text, None, or a list or dict of them.
    Example:
      >>> to_dict(Config(lr=0.1))["lr"]
      0.1
    """
    return dict(json.loads(json.dumps(attrs.asdict(config), default=_plain)))


def from_dict(like: C, settings: Mapping[str, Any]) -> C:
    """Return a record like another with these settings; fields that they do not name stay. It inverts `to_dict`.

    Raises:
      ConfigError: a setting that the record does not have; the message names it.
    Example:
      >>> from_dict(Config(), {"lr": 0.5}).lr
      0.5
    """
    kinds = get_type_hints(type(like))
    fields = {field.name: field for field in attrs.fields(type(like))}  # type: ignore[arg-type]
    if unknown := sorted(settings.keys() - fields.keys()):
        raise ConfigError(f"{type(like).__name__}: has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    values = {name: _restored(kinds[name], value, getattr(like, name)) for name, value in settings.items()}
    return attrs.evolve(like, **values)  # type: ignore[misc]


def scale_config(config: C, world_size: int) -> C:
    """Return the config for another number of processes than `reference_world_size`, by the linear scaling rule.

    The global batch and the learning rate are multiplied by world_size / reference_world_size; steps, warm-up and the
    periods of logs, evaluation and checkpoints, which count steps, are divided by it. With `reference_world_size` 0, or
    the same number, nothing changes.

    Args:
      config: a `Config`.
      world_size: number of processes of this run.
    Raises:
      ConfigError: the batch does not divide to a whole number of samples.
    Example:
      >>> config = scale_config(Config(batch_size=64, lr=0.1, max_steps=1000, reference_world_size=1), 4)
      >>> config.batch_size, config.lr, config.max_steps
      (256, 0.4, 250)

    Source: detectron2's auto_scale_workers; Goyal et al., https://arxiv.org/abs/1706.02677
    """
    settings: Any = config
    reference = settings.reference_world_size
    if reference in (0, whole("world_size", world_size, 1)):
        return config
    if settings.batch_size * world_size % reference:
        raise ConfigError(
            f"batch_size: {settings.batch_size} for {reference} processes is no whole number for {world_size}"
        )
    scale = world_size / reference
    periods = ("max_steps", "log_every", "eval_every", "checkpoint_every")
    scaled = {name: max(1, round(getattr(settings, name) / scale)) for name in periods}
    scaled |= {"batch_size": settings.batch_size * world_size // reference, "reference_world_size": world_size}
    scaled |= {"lr": settings.lr * scale, "warmup_steps": round(settings.warmup_steps / scale)}
    return attrs.evolve(settings, **scaled)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name  # as the command line has it
    if isinstance(value, PurePath):
        return str(value)
    expected = "a number, text, None, an enum, a path, or attrs records of them"
    raise TypeError(f"config: got {type(value).__name__} {value!r}, expected {expected}")


def _restored(kind: Any, value: Any, old: Any) -> Any:
    """Turn a plain value of `to_dict` back into one of a field's types; it stays as it is if it fits none of them."""
    if attrs.has(type(old)) and isinstance(value, Mapping):
        return from_dict(old, value)
    for one in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if isinstance(one, type) and attrs.has(one) and isinstance(value, Mapping):
            kinds = get_type_hints(one)
            return one(**{name: _restored(kinds.get(name), inner, None) for name, inner in value.items()})
        if isinstance(one, type) and isinstance(value, str):
            if issubclass(one, enum.Enum) and value in one.__members__:
                return one[value]
            if issubclass(one, PurePath):
                return one(value)
        if get_origin(one) is tuple and isinstance(value, list):
            inner = get_args(one)
            each = inner[:1] * len(value) if inner[1:] == (...,) else inner
            return tuple(_restored(*pair, None) for pair in zip(each, value, strict=True))
    return tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value
