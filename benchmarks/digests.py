"""Does a refactoring change a bit? Digests of a fixed set of runs, the same text before and after.

    python benchmarks/digests.py [--only PATTERN] [--compile] [--against FILE] [--list]

One line a case: its name; `ft.digest` of the last state; a hash of the metrics of all steps, bit for bit, and of why
the run ended; a hash of the files that it left (checkpoints, JSON lines), or a dash; then four digits for each step, of
its state and metrics, which show where two runs part. Cases of two ranks have both ranks' where these differ. The last
line is a digest of all lines.

Redirect the output of the tree as it was to a file, and give that with `--against` afterwards: what differs is listed,
and the exit status is 1. Equal text needs the same machine, versions and number of threads (it sets one). Only public
names are used, so the script runs on other trees: PYTHONPATH=TREE python benchmarks/digests.py. `--compile` adds
compiled steps, some 10 seconds each.
"""

import argparse
import hashlib
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import fntrain as ft

Batch = Mapping[str, Tensor]
STEPS, HALF, BATCH, SAMPLES, FEATURES, CLASSES = 8, 4, 11, 37, 6, 3
DIGITS = 8  # bytes of a hash


# ------------------------------------------------------------------------------------------------------------- hashes


def hashed(parts: Iterable[bytes]) -> str:
    """A hash of byte strings, their lengths included."""
    found = hashlib.blake2b(digest_size=DIGITS)
    for part in parts:
        found.update(struct.pack("<q", len(part)) + part)
    return found.hexdigest()


def bits_of_tensor(tensor: Tensor) -> bytes:
    """Dtype, shape and bytes; every nan counts as the same one."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.is_floating_point():
        flat = torch.where(flat.isnan(), torch.full_like(flat, float("nan")), flat)
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + bytes(flat.contiguous().view(torch.uint8).tolist())


def bits(value: Any) -> bytes:
    """The bits of a metric: a number, a tensor, or media."""
    if isinstance(value, Tensor):
        return b"tensor " + bits_of_tensor(value)
    if isinstance(value, float):
        return b"float " + struct.pack("<d", value if value == value else float("nan"))
    if isinstance(value, ft.events.Image | ft.events.Histogram):
        return type(value).__name__.encode() + b" " + bits_of_tensor(value.tensor)
    if isinstance(value, ft.events.Text | int | str | None):
        return repr(value).encode()
    raise TypeError(f"bits: got {type(value).__name__}, expected a number, a tensor or media")


def bits_of_metrics(metrics: Mapping[str, Any]) -> bytes:
    """Names, how they combine and are shown, and bits of the values; sorted by name, times left out."""
    found = []
    for name, value in sorted(metrics.items()):
        if not name.startswith("time/"):
            kind = f"{name} {getattr(name, 'reduce', None)} {getattr(name, 'smooth', None)} "
            found.append(kind.encode() + bits(value))
    return b"\n".join(found)


def bits_of_files(directory: Path) -> Iterator[bytes]:
    """Names and contents of all files of a directory, but for locks, which say which process had them."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"):
        yield f"{path.relative_to(directory)} ".encode() + path.read_bytes()


def hash_of_files(directory: Path) -> str:
    """One hash of all files, a dash if there are none."""
    found = list(bits_of_files(directory))
    return hashed(found) if found else "-"


# ------------------------------------------------------------------------------------------------------------- models


class Reporting(nn.Module):
    """Reports scalars of every kind, and media, from inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        with ft.name_scope("hidden"):
            ft.put_scalar("mean", hidden.mean())
            ft.put_scalar("largest", hidden.max(), reduce="max")
            ft.put_scalars({"samples": len(x), "smallest": -1}, reduce="sum", smooth=False)
            ft.put_histogram("values", hidden)
        ft.put_image("input", x[:1, None].sigmoid())
        ft.put_text("note", "forward")
        return torch.as_tensor(self.last(hidden))


class Tied(nn.Module):
    """Embedding and output share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(FEATURES, CLASSES, bias=False), nn.Linear(FEATURES, CLASSES)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(torch.tanh(x)) + self.embed(x))


class Reassigning(nn.Module):
    """Assigns its buffer anew, and has one that is not saved."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.as_tensor(self.linear(x - self.mean))


class Unused(nn.Module):
    """One parameter never gets a gradient, one is frozen by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(FEATURES, CLASSES), nn.Linear(2, 2)
        self.frozen = nn.Linear(FEATURES, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.used(x) + self.frozen(x))


class Drawing(nn.Module):
    """Draws from Python's generator too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(F.dropout(x)) * random.random())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def bf16_mlp() -> nn.Module:
    return nn.Sequential(Cast(), mlp()).to(torch.bfloat16)


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def convolution() -> nn.Module:
    layers = (nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model: Any = nn.Sequential(*layers, nn.Linear(48, CLASSES))
    return model.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


class Cast(nn.Module):
    """Casts what comes in to bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


class Recurrent(nn.Module):
    """An LSTM keeps a list of its weights beside the slots."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, CLASSES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1])


# ------------------------------------------------------------------------------------------------------------- losses


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["x"]).float()
    ft.put_scalar("accuracy", (logits.argmax(-1) == batch["y"]).float().mean())
    ft.put_scalar("right", (logits.argmax(-1) == batch["y"]).sum(), reduce="sum")
    return F.cross_entropy(logits, batch["y"])


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def dict_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    logits = model(batch["x"])
    return {"class": F.cross_entropy(logits, batch["y"]), "size": 0.1 * logits.square().mean()}


def masked_loss(model: nn.Module, batch: Batch) -> Any:
    losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return ft.weighted((losses * batch["mask"]).sum(), batch["mask"].sum())


def masked_dict_loss(model: nn.Module, batch: Batch) -> Any:
    logits = model(batch["x"])
    losses = F.cross_entropy(logits, batch["y"], reduction="none")
    terms = {"class": (losses * batch["mask"]).sum(), "size": (logits.square().sum(1) * batch["mask"]).sum()}
    return ft.weighted(terms, batch["mask"].sum())


def sums_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    logits = model(batch["x"])
    losses = F.cross_entropy(logits, batch["y"], reduction="none")
    return {"class": (losses * batch["mask"]).sum(), "size": logits.square().sum()}


def denominators(batch: Batch) -> dict[str, Any]:
    return {"class": batch["mask"].sum(), "size": CLASSES * len(batch["y"])}


def measures(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What evaluations report, nested."""
    logits = model(batch["x"]).float()
    right = (logits.argmax(-1) == batch["y"]).float()
    loss = F.cross_entropy(logits, batch["y"])
    return {"loss": loss, "by": {"mask": ft.weighted((right * batch["mask"]).sum(), batch["mask"].sum())}}


def halved(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transform of gradients that leaves the last one out."""
    return {name: grad * 0.5 for name, grad in list(grads.items())[:-1]}


def split_in_two(batch: Batch, num: int) -> list[Batch]:
    """A split of its own: the first sample, then the rest."""
    del num
    return [{name: value[part] for name, value in batch.items()} for part in (slice(1), slice(1, None))]


# --------------------------------------------------------------------------------------------------------------- data


def samples(**changes: float) -> list[dict[str, Tensor]]:
    """The data set; with nan=index or huge=index one sample is spoiled."""
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(SAMPLES, FEATURES, generator=generator)
    ys = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    masks = torch.rand(SAMPLES, generator=generator) < 0.5
    for kind, index in changes.items():
        xs[int(index)] *= {"nan": float("nan"), "huge": 1e6}[kind]
    return [{"x": x, "y": y, "mask": mask} for x, y, mask in zip(xs, ys, masks, strict=True)]


@attrs.frozen
class Listed:
    """Ready-made batches over and over, cut for ranks."""

    batches: list[Batch] = attrs.field(repr=False)

    def at(self, position: int) -> Iterator[Batch]:
        return islice(cycle(self.batches), position % len(self.batches), None)

    def shard(self, rank: int, world_size: int) -> "Listed":
        return Listed([{name: value[rank::world_size] for name, value in batch.items()} for batch in self.batches])


def listed(num: int, *, masked: int | None = None, spike: int | None = None) -> Listed:
    """Batches in order; of one no sample counts, or its inputs are far too large."""
    generator = torch.Generator().manual_seed(2)
    batches: list[Batch] = []
    for index in range(num):
        x = torch.randn(BATCH, FEATURES, generator=generator) * (300.0 if index == spike else 1.0)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        mask = (torch.rand(BATCH, generator=generator) < 0.6) & (index != masked)
        batches.append({"x": x, "y": y, "mask": mask})
    return Listed(batches)


def stream(**options: Any) -> Any:
    """Data that straddles epochs, ragged or not as the options say."""
    return ft.data.stream(samples(), BATCH, seed=4, **options)


# -------------------------------------------------------------------------------------------------------------- hooks

Hooks = Callable[[nn.Module, Path], list[Any]]


def no_hooks(model: nn.Module, directory: Path) -> list[Any]:
    del model, directory
    return []


def evaluated(model: nn.Module, **options: Any) -> Any:
    return ft.hooks.evaluate(ft.evaluation(model, measures, samples(), batch_size=10), every=2, **options)


def averaging(model: nn.Module, directory: Path) -> list[Any]:
    """Two averages, one of which is evaluated, and writers."""
    averages = [ft.hooks.ema(0.9), ft.hooks.ema(0.5, every=2, warmup=False, name="slow")]
    return [*averages, evaluated(model, weights="ema"), *written(directory)]


def plateau(model: nn.Module, directory: Path) -> list[Any]:
    del directory
    reduce = ft.hooks.reduce_lr_on_plateau("eval/loss", mode="max", factor=0.5, patience=0, cooldown=1)
    return [evaluated(model), reduce]


def measured_bn(model: nn.Module, directory: Path) -> list[Any]:
    del directory
    return [ft.hooks.precise_bn(model, samples(), every=3, batch_size=10, forward=measures), evaluated(model)]


def written(directory: Path) -> list[Any]:
    writer = ft.writers.jsonl(directory / "metrics.jsonl")
    return [ft.hooks.write_metrics(writer, every=3, window=5, smoothing={"right": "latest", "*": "mean"})]


def saved(model: nn.Module, directory: Path) -> list[Any]:
    """The best one, and three rules of what to keep."""
    best = ft.hooks.keep_best("eval/loss", mode="min", n=2)
    return [
        ft.hooks.iteration_timer(),
        ft.hooks.ema(0.8),
        evaluated(model),
        ft.hooks.best_checkpoint(directory / "best", "eval/loss", mode="min"),
        ft.hooks.write_metrics(ft.writers.memory(), every=2),
        ft.hooks.checkpoint(directory / "all", every=2, keep_last=1, keep_every=4, keep_best=best),
    ]


def rolled_back(model: nn.Module, directory: Path) -> list[Any]:
    del model
    spike = ft.hooks.rollback_on_spike(window=3, factor=3.0, look_every=1, snapshot_every=2)
    return [ft.hooks.ema(0.9), spike, *written(directory)]


def stopped(model: nn.Module, directory: Path) -> list[Any]:
    del model, directory
    return [ft.hooks.early_stopping("loss", mode="max", patience=2, min_delta=0.01)]


def noted(state: ft.TrainState) -> ft.TrainState:
    """A user's own hook: remembers what it has seen."""
    return state.replace(extra={**state.extra, "seen": [*state.extra.get("seen", ()), state.step]})


def gated(model: nn.Module, directory: Path) -> list[Any]:
    """Gates, a compound hook, a stop by predicate."""
    del model, directory
    own = ft.hook(after_step=noted)
    stop = ft.hooks.stop_when(lambda state: state.step == STEPS - 1, "one before the last")
    both = ft.compose(ft.first(2, own), ft.between(4, 5, own))
    return [both, ft.every(3, own), ft.when(lambda state: state.step == 2, own), ft.at_end(own), stop]


# ------------------------------------------------------------------------------------------------------------ recipes

COSINE = ft.schedules.warmup_cosine(0.05, warmup_steps=3, total_steps=STEPS)
ADAMW = ft.optimizer(optim.AdamW, lr=0.01, weight_decay=0.1, fused=True)
SGD = ft.optimizer(optim.SGD, lr=0.1)
MOMENTUM = ft.optimizer(optim.SGD, lr=COSINE, momentum=0.9, nesterov=True)
GROUPS = [
    ft.group("0.weight", frozen=True),
    ft.group("*.bias", lr_scale=2.0, weight_decay=0.0),
    ft.group(lambda name, _: name.startswith("2."), lr_scale=0.5),
]
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": MOMENTUM,
    "momentum-fused": ft.optimizer(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw-fused": ADAMW,
    "adamw-foreach": ft.optimizer(optim.AdamW, lr=COSINE, foreach=True),
    "adamw-loop": ft.optimizer(optim.AdamW, lr=COSINE, foreach=False),
    "adamw-tensor-lr": ft.optimizer(optim.AdamW, lr=torch.tensor(0.01), fused=True),
    "adam-amsgrad": ft.optimizer(optim.Adam, lr=0.01, amsgrad=True, fused=True),
    "adagrad": ft.optimizer(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": ft.optimizer(optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "nadam": ft.optimizer(optim.NAdam, lr=0.01),
    "adafactor": ft.optimizer(optim.Adafactor, lr=0.05),
    "asgd": ft.optimizer(optim.ASGD, lr=0.05),
    "rprop": ft.optimizer(optim.Rprop, lr=0.01),
    "groups-sgd": ft.optimizer(optim.SGD, lr=COSINE, momentum=0.9, weight_decay=0.1, groups=GROUPS),
    "groups-adamw": ft.optimizer(optim.AdamW, lr=COSINE, weight_decay=0.1, fused=True, groups=GROUPS),
    "schedule-momentum": ft.optimizer(
        optim.SGD, lr=0.1, momentum=ft.schedules.linear(0.5, 0.95, total_steps=STEPS), weight_decay=1e-3
    ),
    "schedule-decay": ft.optimizer(
        optim.AdamW, lr=COSINE, weight_decay=ft.schedules.step_decay(0.2, every=2, gamma=0.5), fused=True
    ),
}


@attrs.frozen(kw_only=True)
class Recipe:
    """What is trained, whatever the form of the step."""

    model: Callable[[], nn.Module] = mlp
    loss: Callable[..., Any] = mean_loss
    optimizer: ft.Optimizer = ADAMW
    options: Mapping[str, Any] = attrs.field(factory=dict)
    data: Any = attrs.field(factory=stream)
    hooks: Hooks = no_hooks
    extra: Mapping[str, Any] = attrs.field(factory=dict)


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    ragged = stream(ragged_last=True)
    nan = ft.data.stream(samples(nan=5), BATCH, seed=4)
    huge = ft.data.stream(samples(huge=5), BATCH, seed=4, drop_last=True)
    none = listed(5, masked=2)
    spike = listed(12, spike=5)
    fp16 = {"precision": "fp16"}
    scale = {"loss_scale": {"scale": torch.tensor(2.0**10), "good_steps": torch.tensor(1998, dtype=torch.int32)}}
    low = partial(Recipe, model=bf16_mlp)
    masters = partial(ft.optimizer, master_weights=True)
    return {
        **{name: Recipe(optimizer=optimizer) for name, optimizer in OPTIMIZERS.items()},
        "masters-adamw": low(optimizer=masters(optim.AdamW, lr=COSINE, fused=True)),
        "masters-momentum": low(optimizer=masters(optim.SGD, lr=0.05, momentum=0.9)),
        "bf16-weights": low(optimizer=ft.optimizer(optim.AdamW, lr=0.01)),
        "lr-scale": Recipe(optimizer=OPTIMIZERS["groups-adamw"], extra={"lr_scale": 0.25, "own": [1, torch.ones(2)]}),
        "accumulate-1-ragged": Recipe(data=ragged, options={"accumulate": 1}),
        "accumulate-3-ragged": Recipe(data=ragged, options={"accumulate": 3, "clip_grad_norm": 0.2}),
        "accumulate-dict": Recipe(data=ragged, loss=dict_loss, options={"accumulate": 2}, optimizer=MOMENTUM),
        "accumulate-masked": Recipe(data=none, loss=masked_loss, options={"accumulate": 3}, optimizer=MOMENTUM),
        "accumulate-split": Recipe(options={"accumulate": 2, "split": split_in_two}),
        "clip-norm": Recipe(optimizer=MOMENTUM, options={"clip_grad_norm": 0.1}),
        "clip-value": Recipe(optimizer=MOMENTUM, options={"clip_grad_value": 0.01}),
        "precision-bf16": Recipe(options={"precision": "bf16", "clip_grad_norm": 0.5}),
        "precision-fp16": Recipe(options=fp16, extra=scale),
        "precision-fp16-overflow": Recipe(options={**fp16, "clip_grad_norm": 1.0}, data=huge, optimizer=MOMENTUM),
        "precision-fp16-accumulate": Recipe(options={**fp16, "accumulate": 2}, data=ragged),
        "transform-grads": Recipe(options={"transform_grads": halved, "clip_grad_norm": 0.1}),
        "weights": Recipe(loss=sums_loss, data=none, options={"weights": denominators}, optimizer=MOMENTUM),
        "weights-accumulate": Recipe(loss=sums_loss, data=none, options={"weights": denominators, "accumulate": 3}),
        "masked-zero-weight": Recipe(loss=masked_loss, data=none),
        "masked-dict": Recipe(loss=masked_dict_loss, data=none, optimizer=MOMENTUM),
        "nan-skip": Recipe(model=batchnorm, data=nan, options={"clip_grad_norm": 1.0}),
        "nan-skip-momentum": Recipe(model=Reporting, data=nan, optimizer=MOMENTUM),
        "nan-allow": Recipe(data=nan, options={"on_nonfinite": "allow"}, optimizer=SGD),
        "dropout": Recipe(model=dropout, options={"accumulate": 2}),
        "batchnorm": Recipe(model=batchnorm, optimizer=MOMENTUM),
        "channels-last": Recipe(model=convolution),
        "tied": Recipe(model=Tied),
        "reassigned-buffer": Recipe(model=Reassigning, data=ragged),
        "unused-and-frozen": Recipe(model=Unused, optimizer=MOMENTUM),
        "lstm": Recipe(model=Recurrent),
        "reporting": Recipe(model=Reporting, options={"accumulate": 2}, hooks=lambda _, path: written(path)),
        "seeds-all": Recipe(model=Drawing, options={"seeds": "all"}),
        "hooks-ema": Recipe(model=batchnorm, hooks=averaging),
        "hooks-plateau": Recipe(optimizer=MOMENTUM, hooks=plateau),
        "hooks-precise-bn": Recipe(model=batchnorm, hooks=measured_bn),
        "hooks-checkpoints": Recipe(model=batchnorm, hooks=saved),
        "hooks-rollback": Recipe(model=dropout, optimizer=SGD, data=spike, hooks=rolled_back),
        "hooks-early-stopping": Recipe(hooks=stopped),
        "hooks-gates": Recipe(model=Tied, hooks=gated),
    }


# -------------------------------------------------------------------------------------------------------------- forms

Form = Callable[[Recipe, Path], Iterator[ft.TrainState]]


def made(recipe: Recipe, *, weights: int = 0) -> tuple[Any, ft.TrainState]:
    """The pure step on a new model, and its first state."""
    torch.manual_seed(weights)
    model = recipe.model()
    step_fn = ft.supervised_step(model, recipe.loss, recipe.optimizer, **recipe.options)
    return step_fn, ft.init_state(model, recipe.optimizer, seed=3, extra=recipe.extra)


def run(form: Callable[[Any], Any], recipe: Recipe, directory: Path) -> Iterator[ft.TrainState]:
    """From the first state to the last."""
    step_fn, state = made(recipe)
    hooks = recipe.hooks(step_fn.model, directory)
    yield from ft.states(form(step_fn), hooks, state=state, data=recipe.data, max_steps=STEPS)


def resumed(form: Callable[[Any], Any], recipe: Recipe, directory: Path) -> Iterator[ft.TrainState]:
    """Saved in the middle, by a hook if there are several ranks; another model goes on from the checkpoint."""
    path, alone = directory / "saved", ft.shell.ranks().world_size == 1
    for weights, until in ((0, HALF), (1, STEPS)):
        step_fn, state = made(recipe, weights=weights)
        fast, hooks = form(step_fn), recipe.hooks(step_fn.model, directory)
        hooks += [] if alone else [ft.hooks.checkpoint(path, every=HALF, name="saved")]
        state = ft.resume_or(state, path)
        for new in ft.states(fast, hooks, state=state, data=recipe.data, max_steps=until):
            state = new
            yield state
        if alone:
            ft.save(state, path)


def foreign(recipe: Recipe, directory: Path) -> Iterator[ft.TrainState]:
    """In place from another model's state, and in the middle back to an earlier one."""
    step_fn, _ = made(recipe)
    start = ft.snapshot(made(recipe, weights=5)[1])
    fast, hooks, kept = ft.shell.in_place(step_fn), recipe.hooks(step_fn.model, directory), [start]
    for state in ft.states(fast, hooks, state=start, data=recipe.data, max_steps=HALF):
        kept.append(ft.snapshot(state))
        yield state
    yield from ft.states(fast, hooks, state=kept[2], data=recipe.data, max_steps=STEPS)


def pure(step_fn: Any) -> Any:
    return step_fn


def spread_over(step_fn: Any, strategy: Mapping[str, Any]) -> Any:
    return ft.shell.distribute(step_fn, **strategy)


FORMS: dict[str, Form] = {
    "pure": partial(run, pure),
    "in_place": partial(run, ft.shell.in_place),
    "debug": partial(run, partial(ft.shell.in_place, debug=True)),
    "alone": partial(run, ft.shell.distribute),
    "resumed": partial(resumed, ft.shell.in_place),
    "resumed-pure": partial(resumed, pure),
    "foreign": foreign,
    "compile": partial(run, ft.shell.compile_step),
    "in_place-compile": partial(run, partial(ft.shell.in_place, compile=True)),
}
SOME: dict[str, list[str]] = {  # forms that only some recipes are run in
    "debug": ["momentum", "accumulate-3-ragged"],
    "alone": ["adamw-fused", "batchnorm"],
    "resumed": [
        *("sgd", "groups-adamw", "adafactor", "masters-adamw", "lr-scale", "precision-fp16", "masked-zero-weight"),
        *("nan-skip", "dropout", "tied", "hooks-ema", "hooks-plateau", "hooks-precise-bn", "hooks-checkpoints"),
    ],
    "resumed-pure": ["schedule-momentum", "hooks-ema"],
    "foreign": ["momentum", "adamw-fused", "masters-momentum", "batchnorm", "tied", "hooks-ema"],
}
COMPILED = {
    "compile": ["groups-adamw", "dropout", "nan-skip"],
    "in_place-compile": ["clip-norm"],
}
WRAP_LINEAR: Any = lambda name, module: isinstance(module, nn.Linear)  # noqa: E731, ARG005
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp-compress": {"strategy": "ddp", "compress": "bf16"},
    "ddp-unused": {"strategy": "ddp", "find_unused_parameters": True},
    "fsdp": {"strategy": "fsdp"},
    "fsdp-wrap": {"strategy": "fsdp", "wrap": WRAP_LINEAR, "reshard_after_forward": False},
    "fsdp-mixed": {"strategy": "fsdp", "mixed_precision": "bf16"},
}
RANKED: dict[str, list[str]] = {  # what two ranks do together
    "ddp": [
        *("sgd", "groups-adamw", "adafactor", "masters-adamw", "accumulate-3-ragged", "accumulate-masked"),
        *("clip-value", "precision-bf16", "precision-fp16-overflow", "transform-grads", "weights-accumulate"),
        *("masked-zero-weight", "nan-skip", "dropout", "tied", "reporting", "hooks-ema", "hooks-plateau"),
        *("hooks-precise-bn", "hooks-checkpoints", "hooks-rollback", "hooks-early-stopping"),
    ],
    "ddp-compress": ["clip-norm"],
    "ddp-unused": ["unused-and-frozen"],
    "fsdp": [
        *("momentum", "groups-adamw", "masters-adamw", "accumulate-3-ragged", "weights", "masked-dict", "nan-skip"),
        *("precision-fp16-overflow", "reporting", "hooks-ema", "hooks-checkpoints", "hooks-rollback"),
    ],
    "fsdp-wrap": ["clip-norm"],
    "fsdp-mixed": ["adamw-fused"],
}
RESUMED_RANKS = ["ddp/hooks-ema", "fsdp/groups-adamw"]


# ------------------------------------------------------------------------------------------------------------- values


def schedules() -> Iterator[bytes]:
    """The values of every kind of schedule."""
    make = ft.schedules
    kinds: list[Callable[[int], float]] = [
        make.constant(0.1),
        make.linear(0.1, 0.5, total_steps=20),
        make.cosine(0.1, total_steps=20, end=0.01) * 0.3,
        make.exponential(0.1, gamma=0.9),
        make.multistep(0.1, milestones=[5, 9]),
        make.step_decay(0.1, every=4),
        make.inverse_sqrt(0.1, warmup_steps=5),
        make.join((4, make.constant(1.0)), make.cosine(1.0, total_steps=9)),
        make.warmup(make.constant(0.3), steps=6, start_factor=0.1),
        COSINE,
        make.from_torch(optim.lr_scheduler.OneCycleLR, lr=0.1, num_steps=30, max_lr=0.3, total_steps=40),
    ]
    for schedule in kinds:
        yield repr(schedule).encode()
        yield b"".join(struct.pack("<d", schedule(step)) for step in range(25))


def order() -> Iterator[bytes]:
    """Which samples the batches of a stream have, whole and shared, and what is read of them."""
    for options in ({}, {"drop_last": True}, {"ragged_last": True}, {"shuffle": False}):
        whole = stream(**options)
        for position in (0, 1, 3, 4, 50, 10**6):
            yield repr(whole.samples(position)).encode()
            yield repr([whole.shard(rank, 3).share(position) for rank in range(3)]).encode()
        yield from (bits_of_tensor(batch["x"]) for batch in islice(whole.at(2), 5))
    for size, seed in ((1, 0), (1000, 7), (4097, 2**40)):
        yield repr(ft.data.stream(range(size), 1, seed=seed).samples(0)).encode()
    yield repr([ft.fold_in(3, use, 5) for use in range(4)]).encode()


def updates() -> Iterator[bytes]:
    """`Optimizer.update` as a pure function, with gradients that are left out or laid out otherwise."""
    for name, optimizer in OPTIMIZERS.items():
        generator = torch.Generator().manual_seed(8)
        params = {key: torch.randn(4, 3, generator=generator) for key in ("0.weight", "1.bias", "2.weight")}
        state: Any = optimizer.init(params)
        for step in range(3):
            grads = {key: torch.randn(3, 4, generator=generator).t() for key in list(params)[step % 2 :]}
            params, state = optimizer.update(params, grads, state, step=step)
        yield name.encode()
        yield ft.digest(ft.TrainState(step=0, position=0, seed=0, params=params, opt_state=state)).encode()


def files() -> Iterator[bytes]:
    """The bytes of a checkpoint and of an export; what is read back."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        step_fn, state = made(Recipe(model=Tied))
        batch = next(stream().at(0))
        state = step_fn(step_fn(state, batch), batch)
        path = ft.save(state, directory / "saved")
        ft.export(state, directory / "model.safetensors")
        yield from bits_of_files(directory)
        yield ft.digest(ft.load(str(path))).encode()
        torch.manual_seed(9)
        model = Tied()
        yield str(ft.load_params(directory / "model.safetensors", model)).replace(name, "").encode()
        yield ft.digest(ft.init_state(model, ADAMW)).encode()
        yield bits_of_metrics(ft.evaluation(model, measures, samples(), batch_size=10)(state))


VALUES: dict[str, Callable[[], Iterator[bytes]]] = {
    "value/schedules": schedules,
    "value/order": order,
    "value/updates": updates,
    "value/files": files,
}


# -------------------------------------------------------------------------------------------------------------- cases


def followed(states: Iterator[ft.TrainState], directory: Path) -> list[str]:
    """Run; the columns of a case's line after its name."""
    metrics, steps, last = [], [], None
    for state in states:
        last = state
        digest, found = ft.digest(state), bits_of_metrics(state.metrics)
        metrics.append(found)
        steps.append(hashed([digest.encode(), found])[:4])
    assert last is not None
    stop = last.run.stop
    metrics.append(f"{last.step} {last.position} {stop and (stop.kind, stop.reason)}".encode())
    return [ft.digest(last), hashed(metrics), hash_of_files(directory), ".".join(steps)]


def in_one_process(name: str, form: Form, recipe: Recipe) -> str:
    """The line of a case that this process runs."""
    with tempfile.TemporaryDirectory() as directory:
        return " ".join([name, *followed(form(recipe, Path(directory)), Path(directory))])


def ranked_form(name: str) -> tuple[Form, Recipe]:
    """What a case of two ranks does."""
    kind, _, recipe = name.removeprefix("ranks-2/").rpartition("/")
    begin, strategy = (resumed, kind.removeprefix("resumed-")) if kind.startswith("resumed-") else (run, kind)
    return partial(begin, partial(spread_over, strategy=STRATEGIES[strategy])), recipes()[recipe]


def in_ranks(names: Sequence[str], out: Path) -> None:
    """In every rank: all cases, one after another; rank 0 writes their lines."""
    torch.set_num_threads(1)
    here = ft.shell.ranks()
    lines = []
    for index, name in enumerate(names):
        directory = out.parent / str(index)
        directory.mkdir(exist_ok=True)
        form, recipe = ranked_form(name)
        found = here.gather(followed_together(form(recipe, directory), directory, here))
        lines.append(" ".join([name, *("+".join(dict.fromkeys(both)) for both in zip(*found, strict=True))]))
    if here.rank == 0:
        out.write_text(json.dumps(lines))


def followed_together(states: Iterator[ft.TrainState], directory: Path, here: Any) -> list[str]:
    """The same of one rank; files are looked at when all have written theirs."""
    columns = followed(states, Path("no such directory"))
    here.barrier()
    return [*columns[:2], hash_of_files(directory), columns[3]]


def ranked_lines(names: Sequence[str]) -> list[str]:
    """The lines of the cases that two ranks run."""
    if not names:
        return []
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "lines.json"
        ft.shell.launch(partial(in_ranks, names, out), 2)
        return list(json.loads(out.read_text()))


def cases(*, compiled: bool) -> dict[str, Callable[[], str] | None]:
    """Every case by name, with what makes its line; None: two ranks make it."""
    found: dict[str, Callable[[], str] | None] = {}
    known = recipes()
    everywhere = {"pure": list(known), "in_place": list(known)}
    for form, names in (everywhere | SOME | (COMPILED if compiled else {})).items():
        for one in names:
            found[f"{form}/{one}"] = partial(in_one_process, f"{form}/{one}", FORMS[form], known[one])
    for name, fn in VALUES.items():
        found[name] = partial(value_line, name, fn)
    ranked = [f"{strategy}/{one}" for strategy, names in RANKED.items() for one in names]
    return found | dict.fromkeys(f"ranks-2/{one}" for one in [*ranked, *(f"resumed-{one}" for one in RESUMED_RANKS)])


def value_line(name: str, fn: Callable[[], Iterator[bytes]]) -> str:
    return f"{name} {hashed(fn())}"


def lines_of(chosen: Mapping[str, Callable[[], str] | None]) -> Iterator[str]:
    """The lines of some cases, then that of all."""
    lines = []
    for make in chosen.values():
        if make is not None:
            lines.append(make())
            yield lines[-1]
    for line in ranked_lines([name for name, make in chosen.items() if make is None]):
        lines.append(line)
        yield line
    yield f"all {len(lines)} {hashed(line.encode() for line in lines)}"


def differences(before: Sequence[str], now: Sequence[str], *, some: bool) -> Iterator[str]:
    """The lines that differ, or are on one side only; with `some`, of those there are now."""
    old, new = ({line.partition(" ")[0]: line for line in lines} for lines in (before, now))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name) and not (some and (name == "all" or name not in new)):
            yield f"- {old.get(name, f'{name}: not there')}\n+ {new.get(name, f'{name}: not there')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="cases whose names fit, such as '*/adamw*' or 'ranks-2/*'")
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="lines to compare with; exit status 1 if they differ"
    )
    parser.add_argument("--list", action="store_true", help="names of cases, and nothing is run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    chosen = cases(compiled=args.compile)
    chosen = {name: make for name, make in chosen.items() if fnmatchcase(name, args.only or "*")}
    if args.list:
        print("\n".join(chosen))
        return 0
    begin, lines = time.perf_counter(), []
    print(f"fntrain of {Path(str(ft.__file__)).parent}", file=sys.stderr)
    for line in lines_of(chosen):
        lines.append(line)
        print(line, flush=True)
    print(f"{len(chosen)} cases in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    if args.against is None:
        return 0
    differing = list(differences(args.against.read_text().splitlines(), lines, some=args.only is not None))
    print("\n".join(differing) or f"the same as {args.against}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
