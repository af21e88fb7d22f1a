"""main: the command line of a recipe; every field of its config is a flag."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any

import attrs
import torch.distributed as dist
from toolz import valfilter
from torch import Tensor, nn

from fntrain import schedules
from fntrain.core.errors import ConfigError, FntrainError, MissingExtraError
from fntrain.core.fold import fit
from fntrain.core.hook import flatten
from fntrain.core.tree import named_leaves
from fntrain.jobs.config import to_dict
from fntrain.jobs.job import Job, Result
from fntrain.jobs.recipe import Recipe, build, run
from fntrain.shell.launching.launch import check_processes, launch
from fntrain.shell.launching.network import rank_from_environment
from fntrain.shell.setup import log_directory, setup
from fntrain.steps.update import BoundOptimizer


@attrs.frozen(kw_only=True)
class Task:
    """What to do with the recipe. Each field is a flag, and the text below it its help."""

    resume: bool = True
    """Go on from the newest checkpoint in --output-dir, if there is one; if not, a used one is refused."""
    eval_only: bool = False
    """Evaluate the newest checkpoint in --output-dir, or else --weights; do not train."""
    dry_run: bool = False
    """Show what would be trained, and do one step that leaves nothing behind."""


@attrs.frozen(kw_only=True)
class Processes:
    """Where to do it, as `ft.shell.launch` takes it."""

    num_processes: int = 1
    """On this machine, one for each GPU; they share every batch."""
    num_machines: int = 1
    """How many run this command, each with its own --machine-rank."""
    machine_rank: int = 0
    """Which of them this is, from 0."""
    rendezvous: str | None = None
    """host:port of machine 0, if there are several."""
    max_restarts: int = 0
    """How often a job that failed is started again, from its last checkpoint."""

    def __attrs_post_init__(self) -> None:
        try:
            check_processes(**attrs.asdict(self))
        except ValueError as error:
            raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from error


def main(recipe: Recipe, args: Sequence[str] | None = None) -> Result | None:
    """Train a recipe by the settings on the command line, in one process or several, and print the results.

    Flags are the fields of the config (`--lr 0.1`, nested ones by dots), `--no-resume`, `--eval-only`, `--dry-run`,
    `--num-processes` and others of `ft.shell.launch`; see `--help`. Under torchrun or srun it is one of the ranks.
    Logs go to the console and to the run's directory, where the config is kept too. An error of fntrain ends the
    process with status 1 and its message.

    Args:
      recipe: what to train.
      args: in place of sys.argv[1:].
    Returns:
      what `ft.run` returned; None after a dry run, and in all but the process of rank 0.
    Raises:
      MissingExtraError: tyro is not installed.
      SystemExit: 2 for flags that are not right, 1 for an error of fntrain, 128 + n after signal n.
    Example:
      >>> recipe = ft.Recipe(build_model=lambda config: torch.nn.Linear(2, 1),
      ...                    build_data=lambda config: torch.ones(8, 2),
      ...                    loss_fn=lambda model, batch: model(batch).square().mean())
      >>> main(recipe, ["--lr", "0.5", "--dry-run"])
      config
        output_dir            runs/default
      ...
    """
    config, task, processes = _parsed(recipe, args)
    results: list[Result] = []  # stays empty here if the ranks are other processes
    try:
        if task.dry_run:
            print("\n".join(describe(build(recipe, config))))
            return None
        train = partial(_train, recipe, config, task, results)
        several = processes.num_processes * processes.num_machines > 1 or processes.max_restarts > 0
        started = rank_from_environment(os.environ) is not None or dist.is_initialized()
        # Other processes run the whole script again, as a recipe defined in it can often not be pickled.
        script = _running_script() if args is None and several and not started else None
        launch(script or train, **attrs.asdict(processes))
    except FntrainError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    return results[0] if results else None


def _parsed(recipe: Recipe, args: Sequence[str] | None) -> tuple[Any, Task, Processes]:
    """Read the flags; a wrong one ends the process with status 2, as argparse does."""
    try:
        import tyro
    except ImportError as error:
        raise MissingExtraError("ft.main needs tyro: pip install 'fntrain[cli]'") from error

    def flags(config: Any, task: Task, processes: Processes) -> tuple[Any, Task, Processes]:
        """Train, or go on where an earlier run in --output-dir stopped."""
        return config, task, processes

    # tyro makes flags of the annotations; with the name "" it writes --lr rather than --config.lr.
    kinds = {"config": type(recipe.config), "task": Task, "processes": Processes}
    flags.__annotations__ |= {name: Annotated[kind, tyro.conf.arg(name="")] for name, kind in kinds.items()}
    flags.__defaults__ = (recipe.config, Task(), Processes())
    try:
        return tyro.cli(flags, args=args)  # type: ignore[no-any-return]
    except ConfigError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _train(recipe: Recipe, config: Any, task: Task, results: list[Result]) -> None:
    """Train on one rank; the first rank prints and returns the results."""
    try:
        setup(log_directory(config.output_dir))
        result = run(recipe, config, resume=task.resume, eval_only=task.eval_only)
    except FntrainError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if result.state.run.ranks.rank == 0:
        results.append(result)
        stop = result.state.run.stop
        print(f"step {result.state.step}" + (f" ({stop.reason})" if stop else ""))
        for name, value in result.results.items():
            print(f"  {name:<24}{value:.6g}")


def _running_script() -> Callable[[], object] | None:
    """Return a function that runs the script of this process; None in a notebook and wherever else there is no file."""
    main: Any = sys.modules["__main__"]
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if path is None or spec is None:
        return None if path is None else partial(runpy.run_path, path, run_name="__main__")
    return partial(runpy.run_module, spec.name, run_name="__main__", alter_sys=True)


def describe(job: Job) -> list[str]:
    """Describe a job in lines, part by part, with its hooks in order, and do one step of it.

    Nothing is written, but the step is a real one: it changes the model's weights.
    """
    source = job.data.at(0) if hasattr(job.data, "at") else iter(job.data)
    batch = list(islice(source, 1))
    if hasattr(source, "close"):  # ends the workers of a stream
        source.close()
    parts = {
        "config": [_row(name, value) for name, value in _flat(to_dict(job.config))],
        "model": _model(job.model),
        "data": [repr(job.data), *_batch(job, batch)],
        "step": [repr(job.step_fn).replace(repr(job.optimizer), "optimizer(...)")],
        "optimizer": [repr(job.optimizer), *_groups(job.optimizer.bind(dict(job.state.params)))],
        "learning rate": _rates(job),
        "evaluation": [repr(job.evaluation)],
        "hooks": [f"{number}. {hook!r}" for number, hook in enumerate(flatten(job.hooks), start=1)],
    }
    # Last, as it changes the weights: the lines above are of the model before the first step.
    metrics = fit(job.step_fn, state=job.state, data=batch, max_steps=1).metrics
    numbers = valfilter(lambda value: isinstance(value, Tensor | int | float), metrics)
    parts["one step"] = [_row(name, f"{float(value):.6g}") for name, value in numbers.items()]
    return [line for part, lines in parts.items() for line in (part, *(f"  {line}" for line in lines))]


def _row(name: str, value: Any) -> str:
    return f"{name:<22}{value}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings by the names of their flags, without dashes; nested ones with dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _model(model: nn.Module) -> list[str]:
    params = list(model.parameters())
    count, size = _num_params(model), sum(param.nbytes for param in params)
    children = [(f"{name} {type(one).__name__}", f"{_num_params(one):,}") for name, one in model.named_children()]
    first = f"{type(model).__name__}: {count:,} parameters, {size:,} bytes, on {params[0].device}"
    return [first, *(_row(*child) for child in children)]


def _num_params(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _batch(job: Job, batches: Sequence[Any]) -> Iterator[str]:
    if hasattr(job.data, "steps_per_epoch"):
        yield _row("steps per epoch", job.data.steps_per_epoch)
    for batch in batches:
        try:
            leaves = list(named_leaves(batch, "batch"))
        except TypeError:  # the batch is an object of a class that the tree does not know
            leaves = [("batch", batch)]
        for name, leaf in leaves:
            shape = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            yield _row(name, shape)


def _groups(bound: BoundOptimizer) -> list[str]:
    """Return a line for each group of parameters, with the options in which the groups differ."""
    groups = bound.template.param_groups
    differ = [key for key in groups[0] if key != "params" and len({repr(one.get(key)) for one in groups}) > 1]
    lines = []
    for names, one in zip(bound.names, groups, strict=True):
        options = [f"{key}={one[key]!r}" for key in differ]
        lines.append(_row(f"{len(names)} tensors", ", ".join([*options, _few(names)])))
    return [*lines, _row("frozen", _few(sorted(bound.frozen)))] if bound.frozen else lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _rates(job: Job) -> list[str]:
    lr, last = job.optimizer.lr, job.config.max_steps
    if not callable(lr):
        return [f"{float(lr):.6g}"]
    shown = sorted({1 + round((last - 1) * part / 10) for part in range(11)})
    return schedules.table(lambda step: lr(step - 1), shown).splitlines()
