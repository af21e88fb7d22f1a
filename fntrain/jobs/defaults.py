"""The default parts of a recipe: optimizer, step, writers, hooks; and how its device and data are chosen."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.data import DataLoader

from fntrain import hooks as standard
from fntrain import schedules
from fntrain.core.errors import ConfigError
from fntrain.core.hook import AnyHook, hook
from fntrain.core.state import StepFn, TrainState
from fntrain.data import OwnShare, own_share, stream
from fntrain.jobs.config import to_dict
from fntrain.jobs.job import Job
from fntrain.shell.distributed.connected import ranks
from fntrain.shell.distributed.distribute import distribute
from fntrain.shell.setup import keep_config, log_directory
from fntrain.shell.steps.device import checked_device
from fntrain.shell.steps.graphs import cuda_step
from fntrain.shell.steps.in_place import in_place
from fntrain.steps.optim import Optimizer, group, optimizer
from fntrain.steps.settings import LossFn
from fntrain.steps.supervised import supervised_step
from fntrain.writers import Writer
from fntrain.writers import default as usual_writers

_log = logging.getLogger("fntrain")


def build_optimizer(config: Any, model: nn.Module) -> Optimizer:
    """AdamW with warm-up and cosine, no decay of norms and biases; the default of a recipe.

    Raises:
      ConfigError: the warm-up takes all steps.
    Example:
      >>> build_optimizer(ft.Config(lr=0.1), nn.Linear(2, 2)).lr(0)
      0.1
    """
    if config.warmup_steps >= config.max_steps:
        raise ConfigError(f"warmup_steps: got {config.warmup_steps}, expected fewer than max_steps={config.max_steps}")
    lr = schedules.warmup_cosine(config.lr, warmup_steps=config.warmup_steps, total_steps=config.max_steps)
    vectors = [group(_is_vector, weight_decay=0.0)] if any(param.ndim < 2 for param in model.parameters()) else []
    return optimizer(torch.optim.AdamW, lr=lr, groups=vectors, weight_decay=config.weight_decay, fused=True)


def build_step(config: Any, model: nn.Module, loss_fn: LossFn, optimizer: Optimizer) -> StepFn:
    """Make a supervised step: distributed over several ranks, as CUDA graphs on a GPU, or else in place."""
    limits = {"accumulate": config.accumulate, "clip_grad_norm": config.clip_grad_norm}
    step_fn = supervised_step(model, loss_fn, optimizer, precision=config.precision, **limits)
    if ranks().world_size > 1:
        return distribute(step_fn, config.strategy)
    device = next(model.parameters()).device
    return cuda_step(step_fn, device=device) if device.type == "cuda" else in_place(step_fn)


def no_evaluation(_config: Any, _model: nn.Module) -> None:
    """Evaluate nothing; the default of a recipe."""


def build_writers(config: Any) -> Sequence[Writer]:
    """Return the usual writers for the run's directory, or for one in `runs/` if that is a URL; used by the hooks."""
    return usual_writers(log_directory(config.output_dir), hparams=to_dict(config))


def default_hooks(
    job: Job, *own: AnyHook, before_evaluation: Sequence[AnyHook] = (), writers: Sequence[Writer] | None = None
) -> tuple[AnyHook, ...]:
    """The usual hooks in their order: signals, timer, evaluation, your own, metrics, checkpoints, config.json.

    Args:
      job: what they are for.
      own: hooks that report metrics, or read the evaluation's, or remember; they run after it and before all is
        written and saved.
      before_evaluation: hooks that change what is evaluated, such as `ft.hooks.precise_bn`.
      writers: in place of those of `build_writers`.
    Example:
      >>> recipe = ft.Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                    loss_fn=lambda model, batch: model(batch).square().mean())
      >>> print(", ".join(str(one.name) for one in ft.build(recipe).named_hooks))
      on_signal, iteration_timer, write_metrics, checkpoint, keep_config
    """
    config = job.config
    evaluate = [] if job.evaluation is None else [standard.evaluate(job.evaluation, every=config.eval_every)]
    return (
        standard.on_signal(),
        standard.iteration_timer(),
        *before_evaluation,
        *evaluate,
        *own,
        standard.write_metrics(build_writers(config) if writers is None else writers, every=config.log_every),
        standard.checkpoint(config.output_dir, every=config.checkpoint_every, keep_last=config.keep_last),
        # Last: a run that another hook refuses must not leave its settings in the directory of another run.
        hook(before_train=_KeepConfig(config.output_dir, to_dict(config)), name="keep_config"),
    )


@attrs.frozen
class _KeepConfig:
    """The callback that writes the settings beside the checkpoints, where `ft.predictor` finds them."""

    directory: str
    settings: dict[str, Any] = attrs.field(repr=False)

    def __call__(self, state: TrainState) -> None:
        if state.run.ranks.rank == 0:
            keep_config(self.directory, self.settings)


def _is_vector(_name: str, param: torch.Tensor) -> bool:
    return param.ndim < 2


def device_of(config: Any) -> torch.device:
    """Return the device that a config asks for.

    Raises:
      ConfigError: there is none of that name here.
    Example:
      >>> device_of(ft.Config(device="cpu"))
      device(type='cpu')
    """
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    advice = "give 'cpu', or 'auto', which takes what there is"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, which torch does not know; {advice}") from error
    try:
        return checked_device(device) if device.type == "cuda" else device
    except RuntimeError as error:
        raise ConfigError(f"{str(error).partition(';')[0]}; {advice}") from error


def as_data(config: Any, data: Any) -> Any:
    """Return what `build_data` gave as what `ft.fit` takes: a data set becomes a stream.

    Raises:
      TypeError: it is nothing that can be read.
    Example:
      >>> as_data(ft.Config(batch_size=2), [1, 2, 3]).samples(0)
      [(0, 2), (0, 0)]
    """
    # First: a stream or a loader may have a length and items, as a data set does.
    if hasattr(data, "at") or isinstance(data, DataLoader):
        return data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return stream(data, config.batch_size, seed=config.seed, num_workers=config.num_workers)
    if not isinstance(data, Iterable):
        expected = "a data set, a stream, or an iterable of batches"
        raise TypeError(f"build_data: returned {type(data).__name__}, expected {expected}")
    return data


def from_position(position: int, data: Any) -> Any:
    """Return data at a position; of data that can't start there, the batches before the position are read and dropped.

    That is right because `build_data` has just made the data. The share of one rank (`ft.data.own_share`) stays marked
    as such where there are several ranks.

    Example:
      >>> list(from_position(2, [10, 20, 30]))
      [30]
    """
    if position == 0 or hasattr(data, "at"):
        return data
    if isinstance(data, OwnShare):
        rest = from_position(position, data.data)
        return own_share(rest) if ranks().world_size > 1 else rest
    text = "data: %s starts at its first batch; passing over %d, which a stream (ft.data.stream) would not read"
    _log.warning(text, type(data).__name__, position)
    return islice(data, position, None)
