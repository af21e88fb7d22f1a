"""main: the command line of a recipe; every field of its config is a flag."""

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from fntrain.config import to_dict
from fntrain.errors import FntrainError, MissingExtraError
from fntrain.fold import fit
from fntrain.recipe import Job, Recipe, Result, build, run
from fntrain.shell.setup import setup


def main(recipe: Recipe, args: Sequence[str] | None = None) -> Result | None:
    """Train a recipe by the settings on the command line, and print the results.

    Flags are the fields of the config (`--lr 0.1`, nested ones by dots), `--no-resume`, `--eval-only`, `--dry-run`; see
    `--help`. Logs go to the console and to the run's directory, where the config is kept too. An error of fntrain
    ends the process with status 1 and its message.

    Args:
      recipe: what to train.
      args: in place of sys.argv[1:].
    Returns:
      what `ft.run` returned; None after a dry run.
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
    kind = type(recipe.config)

    def train(config: Any, resume: bool = True, eval_only: bool = False, dry_run: bool = False) -> Result | None:
        """Train, or go on where an earlier run in --output-dir stopped.

        Args:
          config: the settings.
          resume: go on from the newest checkpoint.
          eval_only: evaluate the newest checkpoint, or --weights; do not train.
          dry_run: show what would be trained, and do one step that leaves nothing behind.
        """
        if dry_run:
            print("\n".join(describe(build(recipe, config))))
            return None
        setup(config.output_dir, config=to_dict(config))
        result = run(recipe, config, resume=resume, eval_only=eval_only)
        stop = result.state.run.stop
        print(f"step {result.state.step}" + (f" ({stop.reason})" if stop else ""))
        for name, value in result.results.items():
            print(f"  {name:<24}{value:.6g}")
        return result

    train.__annotations__["config"] = Annotated[kind, tyro.conf.arg(name="")]
    train.__defaults__ = (recipe.config, *(train.__defaults__ or ())[-3:])
    try:
        result: Result | None = tyro.cli(train, args=args)
    except FntrainError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    return result


def describe(job: Job) -> list[str]:
    """Say in lines what a job is: settings, model, data, learning rates, hooks in order; and do one step of it.

    Nothing is written, but the step is a real one: the model is one step on.
    """
    lines = ["config"]
    lines += [f"  {name:<22}{value}" for name, value in to_dict(job.config).items()]
    params = list(job.model.parameters())
    count, size = sum(p.numel() for p in params), sum(p.nbytes for p in params)
    trained = sum(p.numel() for p in params if p.requires_grad)
    lines += [
        "model",
        f"  {type(job.model).__name__}: {count:,} parameters, {trained:,} with gradients, {size:,} bytes",
    ]
    lines += [
        f"  {name:<22}{sum(p.numel() for p in child.parameters()):,}" for name, child in job.model.named_children()
    ]
    lines += ["data", f"  {job.data!r}", "optimizer", f"  {job.optimizer!r}", "learning rate"]
    last = job.config.max_steps
    for step in sorted({0, *(round(last * part / 10) for part in range(10)), max(last - 1, 0)}):
        rate = job.optimizer.lr(step) if callable(job.optimizer.lr) else job.optimizer.lr
        lines.append(f"  step {step + 1:<17}{float(rate):.6g}")
    lines += ["hooks", *(f"  {hook!r}" for hook in job.hooks)]
    done = fit(job.step_fn, state=job.state, data=job.data, max_steps=1)
    numbers = {name: value for name, value in done.metrics.items() if isinstance(value, Tensor | int | float)}
    return [*lines, "one step", *(f"  {name:<22}{float(value):.6g}" for name, value in numbers.items())]
