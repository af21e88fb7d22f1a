"""Config: the settings of a run as a record, to and from plain dicts, and scaled to another number of processes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs

from fntrain.check import whole
from fntrain.precision import Precision

C = TypeVar("C")


@attrs.frozen(kw_only=True)
class Config:
    """Settings of a run. Inherit to add your own; every field becomes a flag of the command line, see `ft.main`."""

    output_dir: str = "runs/default"
    """Directory of the run: checkpoints, logs, config.json. A run started again there goes on."""
    seed: int = 0
    """What every random draw derives from."""
    max_steps: int = 1000
    """Number of steps in all."""
    batch_size: int = 64
    """Samples per step."""
    accumulate: int = 1
    """Number of parts that a batch is split into, to save memory; the result is that of one."""
    num_workers: int = 0
    """Processes that load data; 0 loads in the training process."""
    lr: float = 1e-3
    """Learning rate at its peak."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its peak; then it falls to 0 as a cosine."""
    weight_decay: float = 0.01
    """Of AdamW; not applied to norms and biases."""
    clip_grad_norm: float | None = None
    """Largest 2-norm of the gradients, or None."""
    precision: Precision = "fp32"
    """Of model and loss."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one."""
    weights: str | None = None
    """Checkpoint or safetensors file to start from; a run that is resumed has its own."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    eval_every: int = 500
    """Steps between two evaluations; the last step is always followed by one."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = 3
    """Number of checkpoints to keep."""
    reference_world_size: int = 0
    """Number of processes that these settings are meant for, see `ft.scale_config`; 0: any."""


def to_dict(config: Any) -> dict[str, Any]:
    """Return a record's settings as plain values, nested records as dicts, tuples as lists.

    Raises:
      TypeError: a value is not a number, text, None, or a list or dict of them.
    Example:
      >>> to_dict(Config(lr=0.1))["lr"]
      0.1
    """
    plain: dict[str, Any] = json.loads(json.dumps(attrs.asdict(config), default=_plain))
    return plain


def from_dict(like: C, settings: Mapping[str, Any]) -> C:
    """Return a record like another with these settings; what they do not name stays.

    Raises:
      ValueError: a setting that the record does not have; the message names it.
    Example:
      >>> from_dict(Config(), {"lr": 0.5}).lr
      0.5
    """
    fields = {field.name: field for field in attrs.fields(type(like))}  # type: ignore[arg-type]
    if unknown := sorted(settings.keys() - fields.keys()):
        raise ValueError(f"{type(like).__name__}: has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    values = {}
    for name, value in settings.items():
        old = getattr(like, name)
        if attrs.has(type(old)) and isinstance(value, Mapping):
            values[name] = from_dict(old, value)
        else:
            values[name] = tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value
    changed: C = attrs.evolve(like, **values)  # type: ignore[misc]
    return changed


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings that differ, one line each, nested ones by dotted name.

    Example:
      >>> differences({"lr": 0.1, "model": {"width": 8}}, {"lr": 0.1, "model": {"width": 16}})
      ['model.width: 8 -> 16']
    """
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return lines


def scale_config(config: C, world_size: int) -> C:
    """Return the config for another number of processes than `reference_world_size`, by the linear scaling rule.

    The global batch and the learning rate are multiplied by world_size / reference_world_size; steps, warm-up and the
    periods of logs, evaluation and checkpoints, which count steps, are divided by it. With `reference_world_size` 0, or
    the same number, nothing changes.

    Args:
      config: a `Config`.
      world_size: number of processes of this run.
    Raises:
      ValueError: the batch does not divide to a whole number of samples.
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
        raise ValueError(
            f"batch_size: {settings.batch_size} for {reference} processes is no whole number for {world_size}"
        )
    scale = world_size / reference
    periods = ("max_steps", "log_every", "eval_every", "checkpoint_every")
    scaled = {name: max(1, round(getattr(settings, name) / scale)) for name in periods}
    changed: C = attrs.evolve(
        settings,
        batch_size=settings.batch_size * world_size // reference,
        lr=settings.lr * scale,
        warmup_steps=round(settings.warmup_steps / scale),
        reference_world_size=world_size,
        **scaled,
    )
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"config: got {type(value).__name__} {value!r}, expected a number, text, None, or records of them")
