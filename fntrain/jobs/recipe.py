"""Recipe: a training job as a value whose parts are functions. Replace some of them, and it is another job."""

import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any

import attrs
from toolz import identity
from torch import nn

from fntrain.core.check import function
from fntrain.core.errors import CheckpointError, ConfigError
from fntrain.core.fold import fit
from fntrain.core.hook import AnyHook
from fntrain.core.ranks import ALONE
from fntrain.core.rng import seed_all
from fntrain.core.state import Run, StepFn
from fntrain.jobs import defaults
from fntrain.jobs.config import Config, scale_config
from fntrain.jobs.job import EvaluationFn, Job, Result
from fntrain.shell.checkpoints.resume import resume_or
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.distributed.connected import ranks
from fntrain.shell.weights.load import load_params
from fntrain.steps.module import init_state
from fntrain.steps.optim import Optimizer
from fntrain.steps.settings import LossFn

_log = logging.getLogger("fntrain")


@attrs.frozen(kw_only=True, repr=False)
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
    build_optimizer: Callable[[Any, nn.Module], Optimizer] = defaults.build_optimizer
    build_step: Callable[[Any, nn.Module, LossFn, Optimizer], StepFn] = defaults.build_step
    build_evaluation: Callable[[Any, nn.Module], EvaluationFn | None] = defaults.no_evaluation
    build_hooks: Callable[[Job], Iterable[AnyHook]] = defaults.default_hooks
    preprocess: Callable[[Any], Any] = identity
    predict_fn: Callable[[nn.Module, Any], Any] = operator.call  # model(batch)
    postprocess: Callable[[Any], Any] = identity

    def __attrs_post_init__(self) -> None:
        kind = type(self.config)
        if not isinstance(self.config, Config):
            raise TypeError(f"config: got {kind.__name__}, expected ft.Config(...) or a class derived from it")
        if vars(kind).get("__annotations__") and "__attrs_attrs__" not in vars(kind):
            raise TypeError(f"config: {kind.__name__} is no record; put @attrs.frozen(kw_only=True) above it")
        for field in attrs.fields(Recipe):
            if field.name != "config":
                function(field.name, getattr(self, field.name))

    def __repr__(self) -> str:
        parts = ((field, getattr(self, field.name)) for field in attrs.fields(Recipe))
        changed = (f"{field.name}={called(part)}" for field, part in parts if part is not field.default)
        return f"Recipe({', '.join(changed)})"


def build(recipe: Recipe, config: Any = None, *, load_weights: bool = True) -> Job:
    """Build the parts of a recipe: model, optimizer, data, step, evaluation, hooks, and the state to start from.

    The default generators are seeded with `config.seed` for the model's first weights. With `reference_world_size` the
    config is scaled to the number of processes, see `ft.scale_config`.

    Args:
      recipe: what to build.
      config: settings in place of the recipe's own.
      load_weights: read `config.weights` into the model, if it is not None.
    Raises:
      TypeError: a part returned something of the wrong kind; the config is not one of the recipe's.
      ConfigError: no such device here.
      CheckpointError: the weights can't be read, or are of another model.
    Example:
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean())
      >>> job = build(recipe, Config(max_steps=2))
      >>> ft.fit(job.step_fn, state=job.state, data=job.data, max_steps=2).step
      2
    """
    config = scale_config(_config_of(recipe, config), ranks().world_size)
    device = defaults.device_of(config)
    seed_all(config.seed)  # of this seed the first weights are drawn
    model = recipe.build_model(config)
    _expect(isinstance(model, nn.Module), "build_model", model, "a torch.nn.Module")
    model.to(device)
    if config.weights is not None and load_weights:
        load_params(config.weights, model)
    optimizer = recipe.build_optimizer(config, model)
    step_fn = recipe.build_step(config, model, recipe.loss_fn, optimizer)
    _expect(callable(step_fn), "build_step", step_fn, "a step function")
    data = defaults.as_data(config, recipe.build_data(config))
    state = init_state(model, optimizer, seed=config.seed)
    evaluation = recipe.build_evaluation(config, model)
    _expect(evaluation is None or callable(evaluation), "build_evaluation", evaluation, "ft.evaluation(...) or None")
    parts = {"step_fn": step_fn, "data": data, "state": state, "evaluation": evaluation}
    job = Job(config=config, model=model, optimizer=optimizer, **parts)
    hooks = recipe.build_hooks(job)
    _expect(isinstance(hooks, AnyHook | Iterable), "build_hooks", hooks, "hooks, such as ft.default_hooks(job)")
    return attrs.evolve(job, hooks=(hooks,) if isinstance(hooks, AnyHook) else tuple(hooks))


def run(recipe: Recipe, config: Any = None, *, resume: bool = True, eval_only: bool = False) -> Result:
    """Train a recipe to the end, or go on where an earlier run in its directory stopped; evaluate at the end.

    Data that is no stream is read from its first batch again and what was taken before passed over, so on a resumed
    run it must come in the same order.

    Args:
      recipe: what to train.
      config: settings in place of the recipe's own.
      resume: go on from the newest checkpoint in `config.output_dir`, if there is one.
      eval_only: do not train: evaluate the newest checkpoint, or `config.weights`.
    Returns:
      the last state and the results of the evaluation at its step; none if a stop `at_once` left no time for it.
    Raises:
      CheckpointError: `eval_only` and nothing to evaluate; without `resume`, the directory holds later checkpoints.
      ConfigError: `eval_only` and the recipe has no evaluation; and what `ft.build` raises.
    Example:
      >>> import tempfile
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean(),
      ...                 build_hooks=lambda job: [])
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     run(recipe, Config(output_dir=directory, max_steps=3)).state.step
      3
    """
    config = scale_config(_config_of(recipe, config), ranks().world_size)
    resumed = resume and bool(checkpoints(config.output_dir))
    if resumed and config.weights is not None:
        _log.info("weights %s: not read, %s has checkpoints", config.weights, config.output_dir)
    job = build(recipe, config, load_weights=not resumed)
    if eval_only and job.evaluation is None:
        raise ConfigError("eval_only: the recipe has no evaluation; give it build_evaluation")
    if eval_only and not resumed and config.weights is None:
        where = f"{config.output_dir}: holds no checkpoint" if resume else "eval_only without resume: no checkpoint"
        raise CheckpointError(f"{where} to evaluate, and config.weights is None")
    state = resume_or(job.state, config.output_dir) if resume else job.state
    # `fit` does the same, but `eval_only` leaves it out, and the evaluation asks the state for its ranks.
    state = state.replace(run=Run(ranks=getattr(job.step_fn, "ranks", ALONE)))
    if not eval_only:
        data = defaults.from_position(state.position, job.data)
        state = fit(job.step_fn, job.hooks, state=state, data=data, max_steps=config.max_steps)
    return Result(state=state, results=job.results(state))


def called(part: Any) -> str:
    """Return the name of a part of a recipe if it is a function, else its repr.

    Example:
      >>> called(defaults.build_step), called(3)
      ('build_step', '3')
    """
    return str(getattr(part, "__qualname__", repr(part)))


def _config_of(recipe: Recipe, config: Any) -> Any:
    """Return the recipe's settings, or those given in their place, which must have all of their fields."""
    kind = type(recipe.config)
    if config is not None and not isinstance(config, kind):
        got, expected = (f"{one.__module__}.{one.__qualname__}" for one in (type(config), kind))
        advice = "as the recipe has it; make one by attrs.evolve(recipe.config, ...)"
        raise TypeError(f"config: got {got}, expected {expected}, {advice}")
    return recipe.config if config is None else config


def _expect(accepted: bool, part: str, value: Any, expected: str) -> None:
    if not accepted:
        raise TypeError(f"{part}: returned {type(value).__name__}, expected {expected}")
