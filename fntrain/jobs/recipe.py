"""Recipe: a training job as a value. Its parts are functions; another job is this one with some of them replaced."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.data import DataLoader

from fntrain import data as streams
from fntrain import hooks as standard
from fntrain import schedules, writers
from fntrain.core.errors import CheckpointError, ConfigError
from fntrain.core.fold import fit
from fntrain.core.hook import AnyHook, Gated, Hook, flatten, hook
from fntrain.core.ranks import ALONE
from fntrain.core.state import Run, StepFn, TrainState
from fntrain.evaluation import flattened
from fntrain.hooks.evaluate import Evaluate as EvaluateHook
from fntrain.jobs.config import Config, scale_config, to_dict
from fntrain.shell.checkpoints.resume import resume_or
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.distributed.connected import ranks
from fntrain.shell.distributed.distribute import distribute
from fntrain.shell.setup import keep_config, log_directory, seed_all
from fntrain.shell.steps.graphs import checked_device, cuda_step
from fntrain.shell.steps.in_place import in_place
from fntrain.shell.weights.load import load_params
from fntrain.steps.module import init_state
from fntrain.steps.optim import Optimizer, group, optimizer
from fntrain.steps.supervised import LossFn, supervised_step

Evaluate = Callable[[TrainState], Mapping[str, Any]]
_log = logging.getLogger("fntrain")


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

    Raises:
      ConfigError: the warm-up takes all steps.
    Example:
      >>> build_optimizer(Config(lr=0.1), nn.Linear(2, 2)).lr(0)
      0.1
    """
    if config.warmup_steps >= config.max_steps:
        raise ConfigError(f"warmup_steps: got {config.warmup_steps}, expected fewer than max_steps={config.max_steps}")
    lr = schedules.warmup_cosine(config.lr, warmup_steps=config.warmup_steps, total_steps=config.max_steps)
    vectors = [group(_is_vector, weight_decay=0.0)] if any(param.ndim < 2 for param in model.parameters()) else []
    return optimizer(torch.optim.AdamW, lr=lr, groups=vectors, weight_decay=config.weight_decay, fused=True)


def build_step(config: Any, model: nn.Module, loss_fn: LossFn, optimizer: Optimizer) -> StepFn:
    """`supervised_step`, run in place, on a GPU as graphs, by several ranks together; the default of a recipe."""
    step_fn = supervised_step(
        model,
        loss_fn,
        optimizer,
        accumulate=config.accumulate,
        clip_grad_norm=config.clip_grad_norm,
        precision=config.precision,
    )
    if ranks().world_size > 1:
        return distribute(step_fn, config.strategy)
    device = next(model.parameters()).device
    return cuda_step(step_fn, device=device) if device.type == "cuda" else in_place(step_fn)


def no_evaluation(_config: Any, _model: nn.Module) -> None:
    """The default of a recipe: nothing is evaluated."""


def build_writers(config: Any) -> Sequence[writers.Writer]:
    """Console, `metrics.jsonl` and TensorBoard files in the run's directory; of a URL in `runs/` of that name."""
    return writers.default(log_directory(config.output_dir), hparams=to_dict(config))


def default_hooks(
    job: Job,
    *own: AnyHook,
    before_evaluation: Sequence[AnyHook] = (),
    writers: Sequence[writers.Writer] | None = None,
) -> tuple[AnyHook, ...]:
    """The usual hooks in their order: signals, timer, evaluation, your own, metrics, checkpoints, config.json.

    Args:
      job: what they are for.
      own: hooks that report metrics, or read the evaluation's, or remember; they run after it and before all is
        written and saved.
      before_evaluation: hooks that change what is evaluated, such as `ft.hooks.precise_bn`.
      writers: in place of those of `build_writers`.
    Example:
      >>> recipe = Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: torch.ones(8, 2),
      ...                 loss_fn=lambda model, batch: model(batch).square().mean())
      >>> print(", ".join(str(one.name) for one in build(recipe).named_hooks))
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
        # Last: a run that the others refuse must not leave its settings in a directory that is another's.
        hook(before_train=_KeepConfig(config.output_dir, to_dict(config)), name="keep_config"),
    )


@attrs.frozen
class _KeepConfig:
    """The callback: writes the settings beside the checkpoints, where `ft.predictor` finds them."""

    directory: str
    settings: dict[str, Any] = attrs.field(repr=False)

    def __call__(self, state: TrainState) -> None:
        if state.run.ranks.rank == 0:
            keep_config(self.directory, self.settings)


def _is_vector(_name: str, param: torch.Tensor) -> bool:
    return param.ndim < 2


def _same(value: Any) -> Any:
    return value


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch)


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
        own = vars(type(self.config))
        if own.get("__annotations__") and "__attrs_attrs__" not in own:
            raise TypeError(
                f"config: {type(self.config).__name__} is no record; put @attrs.frozen(kw_only=True) above it"
            )
        for field in attrs.fields(Recipe):
            if field.name != "config" and not callable(getattr(self, field.name)):
                raise TypeError(f"{field.name}: got {type(getattr(self, field.name)).__name__}, expected a function")

    def __repr__(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in attrs.fields(Recipe)}
        own = {field.name for field in attrs.fields(Recipe) if parts[field.name] is not field.default}
        return f"Recipe({', '.join(f'{name}={called(part)}' for name, part in parts.items() if name in own)})"


def build(recipe: Recipe, config: Any = None, *, load_weights: bool = True) -> Job:
    """Make a recipe live: model, optimizer, data, step, evaluation and hooks, and the state before the first step.

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
    device = device_of(config)
    seed_all(config.seed)
    model = recipe.build_model(config)
    if not isinstance(model, nn.Module):
        raise TypeError(f"build_model: returned {type(model).__name__}, expected a torch.nn.Module")
    model.to(device)
    if config.weights is not None and load_weights:
        load_params(config.weights, model)
    optimizer = recipe.build_optimizer(config, model)
    step_fn = _checked("build_step", recipe.build_step(config, model, recipe.loss_fn, optimizer), "a step function")
    job = Job(
        config=config,
        model=model,
        optimizer=optimizer,
        step_fn=step_fn,
        data=_stream(config, recipe.build_data(config)),
        state=init_state(model, optimizer, seed=config.seed),
        evaluation=_checked("build_evaluation", recipe.build_evaluation(config, model), "ft.evaluation(...) or None"),
    )
    hooks = recipe.build_hooks(job)
    if not isinstance(hooks, AnyHook | Iterable):
        raise TypeError(f"build_hooks: returned {type(hooks).__name__}, expected hooks, such as ft.default_hooks(job)")
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
      the last state and the results of the evaluation at its step.
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
    if eval_only:
        if job.evaluation is None:
            raise ConfigError("eval_only: the recipe has no evaluation; give it build_evaluation")
        if not resumed and config.weights is None:
            where = f"{config.output_dir}: holds no checkpoint" if resume else "eval_only without resume: no checkpoint"
            raise CheckpointError(f"{where} to evaluate, and config.weights is None")
    state = resume_or(job.state, config.output_dir) if resume else job.state
    state = state.replace(run=Run(ranks=getattr(job.step_fn, "ranks", ALONE)))
    if not eval_only:
        data = _from(state.position, job.data)
        state = fit(job.step_fn, job.hooks, state=state, data=data, max_steps=config.max_steps)
    return Result(state=state, results=_results(job, state))


def device_of(config: Any) -> torch.device:
    """Return the device that a config asks for.

    Raises:
      ConfigError: there is none of that name here.
    Example:
      >>> device_of(Config(device="cpu"))
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


def called(part: Any) -> str:
    """Return a function's name, or what else stands for a part of a recipe.

    Example:
      >>> called(build_step), called(3)
      ('build_step', '3')
    """
    return str(getattr(part, "__qualname__", repr(part)))


def _results(job: Job, state: TrainState) -> dict[str, float]:
    """What the evaluation says of a state; a hook that has just asked it, of these very weights, has reported it."""
    if job.evaluation is None:
        return {}
    asked = [one.after_step for one in job.named_hooks if isinstance(one.after_step, EvaluateHook)]
    prefixes = [one.prefix for one in asked if one.fn is job.evaluation and one.weights is None]
    results: Mapping[str, Any] = {
        name.removeprefix(prefix): value
        for prefix in prefixes[:1]
        for name, value in state.metrics.items()
        if name.startswith(prefix)
    }
    return {name: float(value) for name, value in flattened(results or job.evaluation(state)).items()}


def _config_of(recipe: Recipe, config: Any) -> Any:
    """The recipe's settings, or those given instead, which must have all of its fields."""
    kind = type(recipe.config)
    if config is not None and not isinstance(config, kind):
        raise TypeError(
            f"config: got {type(config).__module__}.{type(config).__qualname__}, expected {kind.__module__}."
            f"{kind.__qualname__}, as the recipe has it; make one by attrs.evolve(recipe.config, ...)"
        )
    return recipe.config if config is None else config


def _checked(part: str, value: Any, expected: str) -> Any:
    if not callable(value) and not (value is None and expected.endswith("None")):
        raise TypeError(f"{part}: returned {type(value).__name__}, expected {expected}")
    return value


def _stream(config: Any, data: Any) -> Any:
    """What build_data returned, as what `fit` takes."""
    is_data_set = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not (is_data_set or hasattr(data, "at") or isinstance(data, Iterable)):
        raise TypeError(
            f"build_data: returned {type(data).__name__}, expected a data set, a stream, or an iterable of batches"
        )
    if hasattr(data, "at") or not is_data_set or isinstance(data, DataLoader):
        return data
    return streams.stream(data, config.batch_size, seed=config.seed, num_workers=config.num_workers)


def _from(position: int, data: Any) -> Any:
    """Data at a position: what can't start there is read from its first batch, for `build_data` has made it anew."""
    if position == 0 or hasattr(data, "at"):
        return data
    _log.warning(
        "data: %s starts at its first batch; passing over %d, which a stream (ft.data.stream) would not read",
        type(data).__name__,
        position,
    )
    return islice(data, position, None)
