"""main: the command line of a recipe; every field of its config is a flag."""

import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any

import attrs
import torch.distributed as dist
from torch import Tensor

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

Flags = tuple[Any, bool, bool, bool, dict[str, Any]]


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
    try:
        import tyro
    except ImportError as error:
        raise MissingExtraError("ft.main needs tyro: pip install 'fntrain[cli]'") from error

    def train(
        config: Any,
        resume: bool = True,
        eval_only: bool = False,
        dry_run: bool = False,
        num_processes: int = 1,
        num_machines: int = 1,
        machine_rank: int = 0,
        rendezvous: str | None = None,
        max_restarts: int = 0,
    ) -> Flags:
        """Train, or go on where an earlier run in --output-dir stopped.

        Args:
          config: the settings.
          resume: go on from the newest checkpoint in --output-dir, if there is one; if not, a used one is refused.
          eval_only: evaluate the newest checkpoint in --output-dir, or else --weights; do not train.
          dry_run: show what would be trained, and do one step that leaves nothing behind.
          num_processes: on this machine, one for each GPU; they share every batch.
          num_machines: how many run this command, each with its own --machine-rank.
          machine_rank: which of them this is, from 0.
          rendezvous: host:port of machine 0, if there are several.
          max_restarts: how often a job that failed is started again, from its last checkpoint.
        """
        ranks = {"num_processes": num_processes, "num_machines": num_machines, "machine_rank": machine_rank}
        return config, resume, eval_only, dry_run, ranks | {"rendezvous": rendezvous, "max_restarts": max_restarts}

    train.__annotations__["config"] = Annotated[type(recipe.config), tyro.conf.arg(name="")]
    train.__defaults__ = (recipe.config, *(train.__defaults__ or ()))
    try:
        config, resume, eval_only, dry_run, processes = tyro.cli(train, args=args)
        try:
            check_processes(**processes)
        except ValueError as error:
            raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from error
    except ConfigError as error:  # one value that can't be, as argparse has it
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        if dry_run:
            print("\n".join(describe(build(recipe, config))))
            return None
        results: list[Result] = []  # stays empty here, if other processes fill theirs
        train_it = partial(_train, recipe, config, resume, eval_only, results)
        several = processes["num_processes"] * processes["num_machines"] > 1 or processes["max_restarts"]
        script = Script.running() if args is None and several else None
        started = rank_from_environment(os.environ) or dist.is_initialized()
        launch(train_it if script is None or started else script, **processes)
    except FntrainError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    return results[0] if results else None


def _train(recipe: Recipe, config: Any, resume: bool, eval_only: bool, results: list[Result]) -> None:
    """What every rank does."""
    try:
        setup(log_directory(config.output_dir))
        result = run(recipe, config, resume=resume, eval_only=eval_only)
    except FntrainError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if result.state.run.ranks.rank == 0:
        results.append(result)
        stop = result.state.run.stop
        print(f"step {result.state.step}" + (f" ({stop.reason})" if stop else ""))
        for name, value in result.results.items():
            print(f"  {name:<24}{value:.6g}")


@attrs.frozen
class Script:
    """The script that runs, to be run by other processes: what a recipe is made of need not be sent to them."""

    path: str
    module: str | None

    @classmethod
    def running(cls) -> "Script | None":
        """The one of this process; None in a notebook and the like."""
        main: Any = sys.modules["__main__"]
        path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
        return None if path is None else cls(path, spec.name if spec is not None else None)

    def __call__(self) -> None:
        if self.module is None:
            runpy.run_path(self.path, run_name="__main__")
        else:
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)


def describe(job: Job) -> list[str]:
    """Say in lines what a job is, part by part, with its hooks in order; and do one step of it.

    Nothing is written, but the step is a real one: the model is one step on.
    """
    params = dict(job.state.params)
    source = job.data.at(0) if hasattr(job.data, "at") else iter(job.data)
    batch = list(islice(source, 1))
    if hasattr(source, "close"):
        source.close()
    parts = {
        "config": [_row(name, value) for name, value in _flat(to_dict(job.config))],
        "model": _model(job),
        "data": [repr(job.data), *_batch(job, batch)],
        "step": [repr(job.step_fn).replace(repr(job.optimizer), "optimizer(...)")],
        "optimizer": [repr(job.optimizer), *_groups(job.optimizer.bind(params))],
        "learning rate": _rates(job),
        "evaluation": [repr(job.evaluation)],
        "hooks": [f"{number}. {hook!r}" for number, hook in enumerate(flatten(job.hooks), start=1)],
    }
    done = fit(job.step_fn, state=job.state, data=batch, max_steps=1)
    numbers = {name: value for name, value in done.metrics.items() if isinstance(value, Tensor | int | float)}
    parts["one step"] = [_row(name, f"{float(value):.6g}") for name, value in numbers.items()]
    return [line for part, lines in parts.items() for line in (part, *(f"  {line}" for line in lines))]


def _row(name: str, value: Any) -> str:
    return f"{name:<22}{value}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names of their flags, without the dashes."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _model(job: Job) -> list[str]:
    params = list(job.model.parameters())
    count, size = sum(p.numel() for p in params), sum(p.nbytes for p in params)
    children = [
        _row(f"{name} {type(child).__name__}", f"{sum(p.numel() for p in child.parameters()):,}")
        for name, child in job.model.named_children()
    ]
    return [f"{type(job.model).__name__}: {count:,} parameters, {size:,} bytes, on {params[0].device}", *children]


def _batch(job: Job, batches: Sequence[Any]) -> Iterator[str]:
    if hasattr(job.data, "steps_per_epoch"):
        yield _row("steps per epoch", job.data.steps_per_epoch)
    for batch in batches:
        try:
            leaves = list(named_leaves(batch, "batch"))
        except TypeError:  # a class of the user's own
            leaves = [("batch", batch)]
        for name, leaf in leaves:
            shape = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            yield _row(name, shape)


def _groups(bound: BoundOptimizer) -> list[str]:
    """The groups of parameters that are updated together, with the options in which they differ."""
    groups = bound.template.param_groups
    differ = [key for key in groups[0] if key != "params" and len({repr(one.get(key)) for one in groups}) > 1]
    lines = [
        _row(f"{len(names)} tensors", ", ".join([f"{key}={one[key]!r}" for key in differ] + [_few(names)]))
        for names, one in zip(bound.names, groups, strict=True)
    ]
    return [*lines, *([_row("frozen", _few(sorted(bound.frozen)))] if bound.frozen else [])]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _rates(job: Job) -> list[str]:
    lr, last = job.optimizer.lr, job.config.max_steps
    if not callable(lr):
        return [f"{float(lr):.6g}"]
    shown = sorted({1 + round((last - 1) * part / 10) for part in range(11)})
    return schedules.table(lambda step: lr(step - 1), shown).splitlines()
