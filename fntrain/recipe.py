"""Recipe: a training job as a value. Its parts are functions; another job is this one with some of them replaced."""

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.data import DataLoader

from fntrain import data as streams
from fntrain import hooks as standard
from fntrain import schedules, writers
from fntrain.config import Config, to_dict
from fntrain.errors import CheckpointError
from fntrain.fold import fit
from fntrain.hook import AnyHook, Gated, Hook, flatten
from fntrain.module import init_state
from fntrain.optim import Optimizer, group, optimizer
from fntrain.shell.checkpoint import resume_or
from fntrain.shell.cuda import cuda_step
from fntrain.shell.in_place import in_place
from fntrain.shell.params import load_params
from fntrain.state import StepFn, TrainState
from fntrain.step import LossFn, supervised_step

Evaluate = Callable[[TrainState], Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Job:
    """A recipe made live: what `ft.fit` takes, and what hooks may want to know."""

    config: Any
    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    optimizer: Optimizer
    step_fn: StepFn
    data: Any = attrs.field(repr=lambda data: type(data).__name__)
    state: TrainState = attrs.field(repr=False)
    evaluation: Evaluate | None = None
    hooks: tuple[AnyHook, ...] = ()

    @property
    def named_hooks(self) -> list[Hook]:
        """The single hooks, without their gates, in the order in which they run."""
        return [one.hook if isinstance(one, Gated) else one for one in flatten(self.hooks)]


@attrs.frozen(kw_only=True)
class Result:
    """What `ft.run` returns: the last state, and the results of the evaluation at the end by name."""

    state: TrainState
    results: Mapping[str, float]


def build_optimizer(config: Any, model: nn.Module) -> Optimizer:
    """AdamW with warm-up and cosine, no decay of norms and biases; the default of a recipe.

    Example:
      >>> build_optimizer(Config(lr=0.1), nn.Linear(2, 2)).lr(0)
      0.1
    """
    lr = schedules.warmup_cosine(config.lr, warmup_steps=config.warmup_steps, total_steps=config.max_steps)
    vectors = [group(_is_vector, weight_decay=0.0)] if any(param.ndim < 2 for param in model.parameters()) else []
    return optimizer(torch.optim.AdamW, lr=lr, groups=vectors, weight_decay=config.weight_decay, fused=True)


def build_step(config: Any, model: nn.Module, loss_fn: LossFn, optimizer: Optimizer) -> StepFn:
    """`supervised_step`, run in place, on a GPU as graphs; the default of a recipe."""
    step_fn = supervised_step(
        model,
        loss_fn,
        optimizer,
        accumulate=config.accumulate,
        clip_grad_norm=config.clip_grad_norm,
        precision=config.precision,
    )
    device = next(model.parameters()).device
    return cuda_step(step_fn, device=device) if device.type == "cuda" else in_place(step_fn)


def no_evaluation(_config: Any, _model: nn.Module) -> None:
    """The default of a recipe: nothing is evaluated."""


def build_writers(config: Any) -> Sequence[writers.Writer]:
    """Console, `metrics.jsonl` and TensorBoard files in the run's directory; the default of a recipe."""
    return writers.default(config.output_dir, hparams=to_dict(config))


def default_hooks(job: Job, *own: AnyHook, writers: Sequence[writers.Writer] | None = None) -> tuple[AnyHook, ...]:
    """The usual hooks in their order: signals, timer, evaluation, your own, metrics, checkpoints.

    Args:
      job: what they are for.
      own: hooks that report metrics, or read the evaluation's, or remember; they run after it and before all is
        written and saved.
      writers: in place of those of `build_writers`.
    Example:
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean())
      >>> print(", ".join(str(one.name) for one in build(recipe).named_hooks))
      on_signal, iteration_timer, write_metrics, checkpoint
    """
    config = job.config
    evaluate = [] if job.evaluation is None else [standard.evaluate(job.evaluation, every=config.eval_every)]
    return (
        standard.on_signal(),
        standard.iteration_timer(),
        *evaluate,
        *own,
        standard.write_metrics(build_writers(config) if writers is None else writers, every=config.log_every),
        standard.checkpoint(config.output_dir, every=config.checkpoint_every, keep_last=config.keep_last),
    )


def _is_vector(_name: str, param: torch.Tensor) -> bool:
    return param.ndim < 2


def _same(value: Any) -> Any:
    return value


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch)


@attrs.frozen(kw_only=True)
class Recipe:
    """The parts of a training job, functions of the config; `attrs.evolve(recipe, build_model=...)` makes another.

    Args:
      config: default settings, a `Config` or a class derived from it.
      build_model: config -> module, initialised from the seed.
      build_data: config -> data set of samples (read by `ft.data.stream` in batches), a stream, or any iterable of
        batches.
      loss_fn: (model, batch) -> loss, as for `ft.supervised_step`.
      build_optimizer: (config, model) -> `ft.optimizer(...)`.
      build_step: (config, model, loss_fn, optimizer) -> step function.
      build_evaluation: (config, model) -> function of the state, such as `ft.evaluation(...)`, or None.
      build_hooks: job -> hooks, such as `ft.default_hooks(job, my_hook)`.
      preprocess: raw input -> sample, for `ft.predictor`.
      predict_fn: (model, batch) -> outputs, for `ft.predictor`.
      postprocess: output of one sample -> result, for `ft.predictor`.
    Example:
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean())
      >>> wide = attrs.evolve(recipe, build_model=lambda config: nn.Sequential(nn.Linear(2, 99), nn.Linear(99, 1)))
      >>> sum(param.numel() for param in build(wide).model.parameters())
      397

    Source: detectron2's DefaultTrainer, with functions in place of methods to override
    """

    config: Any = attrs.field(factory=Config)
    build_model: Callable[[Any], nn.Module]
    build_data: Callable[[Any], Any]
    loss_fn: LossFn
    build_optimizer: Callable[[Any, nn.Module], Optimizer] = build_optimizer
    build_step: Callable[[Any, nn.Module, LossFn, Optimizer], StepFn] = build_step
    build_evaluation: Callable[[Any, nn.Module], Evaluate | None] = no_evaluation
    build_hooks: Callable[[Job], Iterable[AnyHook]] = default_hooks
    preprocess: Callable[[Any], Any] = _same
    predict_fn: Callable[[nn.Module, Any], Any] = _forward
    postprocess: Callable[[Any], Any] = _same

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise TypeError(
                f"config: got {type(self.config).__name__}, expected ft.Config(...) or a class derived from it"
            )
        for field in attrs.fields(Recipe):
            if field.name != "config" and not callable(getattr(self, field.name)):
                raise TypeError(f"{field.name}: got {type(getattr(self, field.name)).__name__}, expected a function")


def build(recipe: Recipe, config: Any = None) -> Job:
    """Make a recipe live: model, optimizer, data, step, evaluation and hooks, and the state before the first step.

    The default generators are seeded with `config.seed` for the model's first weights.

    Args:
      recipe: what to build.
      config: settings in place of the recipe's own.
    Raises:
      TypeError: a part returned something of the wrong kind.
    Example:
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean())
      >>> job = build(recipe, Config(max_steps=2))
      >>> ft.fit(job.step_fn, state=job.state, data=job.data, max_steps=2).step
      2
    """
    config = recipe.config if config is None else config
    _seed(config.seed)
    model = recipe.build_model(config)
    if not isinstance(model, nn.Module):
        raise TypeError(f"build_model: returned {type(model).__name__}, expected a torch.nn.Module")
    wanted = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model.to(wanted)
    if config.weights is not None:
        load_params(config.weights, model)
    optimizer = recipe.build_optimizer(config, model)
    step_fn = recipe.build_step(config, model, recipe.loss_fn, optimizer)
    job = Job(
        config=config,
        model=model,
        optimizer=optimizer,
        step_fn=step_fn,
        data=_stream(config, recipe.build_data(config)),
        state=init_state(model, optimizer, seed=config.seed),
        evaluation=recipe.build_evaluation(config, model),
    )
    return attrs.evolve(job, hooks=tuple(recipe.build_hooks(job)))


def run(recipe: Recipe, config: Any = None, *, resume: bool = True, eval_only: bool = False) -> Result:
    """Train a recipe to the end, or go on where an earlier run in its directory stopped; evaluate at the end.

    Args:
      recipe: what to train.
      config: settings in place of the recipe's own.
      resume: go on from the newest checkpoint in `config.output_dir`, if there is one.
      eval_only: do not train: evaluate the newest checkpoint, or `config.weights`.
    Returns:
      the last state and the results of the evaluation at its step.
    Raises:
      CheckpointError: `eval_only` and nothing to evaluate; without `resume`, the directory holds later checkpoints.
      ValueError: `eval_only` and the recipe has no evaluation.
    Example:
      >>> import tempfile
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean(),
      ...                 build_hooks=lambda job: [])
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     run(recipe, Config(output_dir=directory, max_steps=3)).state.step
      3
    """
    job = build(recipe, config)
    state = resume_or(job.state, job.config.output_dir) if resume else job.state
    if eval_only:
        if job.evaluation is None:
            raise ValueError("eval_only: the recipe has no evaluation; give it build_evaluation")
        if state is job.state and job.config.weights is None:
            raise CheckpointError(
                f"{job.config.output_dir}: holds no checkpoint to evaluate, and config.weights is None"
            )
        return Result(state=state, results=_results(job, state))
    final = fit(job.step_fn, job.hooks, state=state, data=job.data, max_steps=job.config.max_steps)
    return Result(state=final, results=_results(job, final))


def _results(job: Job, state: TrainState) -> dict[str, float]:
    """What the evaluation says of a state; by the hook if it has just been asked."""
    if job.evaluation is None:
        return {}
    found = {name: value for name, value in state.metrics.items() if name.startswith("eval/")}
    results = found or job.evaluation(state)
    return {name.removeprefix("eval/"): float(value) for name, value in results.items()}


def _seed(seed: int) -> None:
    """Seed for the model's first weights, as a script would; every later draw derives from (seed, step)."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed & 0xFFFFFFFF)


def _stream(config: Any, data: Any) -> Any:
    """What build_data returned, as what `fit` takes."""
    is_data_set = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if hasattr(data, "at") or not is_data_set or isinstance(data, DataLoader):
        return data
    return streams.stream(data, config.batch_size, seed=config.seed, num_workers=config.num_workers)
