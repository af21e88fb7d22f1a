"""What each hook costs per step, and all the default ones together, beside the same fold without hooks.

    python benchmarks/hooks.py [--rounds 40] [--steps 1000] [--json FILE]

The step does nothing but report what `supervised_step` reports: a tensor for the loss and three numbers. Hooks that
write, save or evaluate do so never, so that what is left is their cost in all the other steps; the last rows write
every 20 steps, to the console (a file that keeps nothing), JSON lines and TensorBoard. `on_signal` is left out: it runs
in the main thread only, competitors here run in their own; it looks at one attribute.
"""

import tempfile
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Competitor, Times, header, measure, parser, prepare, show_header, spread, write_json
from torch import nn

import fntrain as ft

NEVER = 10**9
NONE, ALL, WRITES = "no hooks", "all default hooks, idle", "all default hooks, writing every 20 steps"


def report(state: ft.TrainState, batch: Any) -> ft.TrainState:
    """A step that only reports."""
    lr = ft.events.MetricName("lr", smooth="latest")
    skipped = ft.events.MetricName("skipped_steps", reduce="max", smooth="sum")
    return state.advance(metrics={"loss": batch, lr: 0.1, "grad_norm": 1.0, skipped: 0.0})


def fold(hooks: Sequence[Any]) -> Competitor:
    """One run that goes on for as many steps as are asked for."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))
    run = ft.states(report, hooks, state=state, data=repeat(torch.ones(())), max_steps=NEVER - 1)

    def advance(steps: int) -> None:
        for _ in range(steps):
            next(run)

    return Competitor(advance, list, run.close)


def default_hooks(directory: Path, every: int) -> list[Any]:
    return [
        ft.hooks.iteration_timer(),
        ft.hooks.evaluate(lambda _: {"loss": 1.0}, every=NEVER),
        ft.hooks.write_metrics(ft.writers.default(directory), every=every),
        ft.hooks.checkpoint(directory, every=NEVER),
    ]


def entries(directory: Path) -> dict[str, Callable[[], list[Any]]]:
    """Every hook alone, then together."""
    hooks, model = ft.hooks, nn.BatchNorm1d(8)
    singles: dict[str, Callable[[], Any]] = {
        "iteration_timer": hooks.iteration_timer,
        "evaluate": lambda: hooks.evaluate(lambda _: {}, every=NEVER),
        "write_metrics": lambda: hooks.write_metrics(ft.writers.console(), every=NEVER),
        "checkpoint": lambda: hooks.checkpoint(directory / "checkpoint", every=NEVER),
        "best_checkpoint": lambda: hooks.best_checkpoint(directory / "best", "eval/loss", mode="min"),
        "reduce_lr_on_plateau": lambda: hooks.reduce_lr_on_plateau("eval/loss", mode="min"),
        "precise_bn": lambda: hooks.precise_bn(model, torch.ones(4, 8), every=NEVER),
        "memory_stats": lambda: hooks.memory_stats(every=NEVER),
        "ema": hooks.ema,
        "early_stopping": lambda: hooks.early_stopping("loss", mode="min", patience=NEVER),
        "stop_when": lambda: hooks.stop_when(lambda _: False, "never"),
        "rollback_on_spike": hooks.rollback_on_spike,
    }
    alone = {name: lambda make=make: [make()] for name, make in singles.items()}
    together = {
        ALL: lambda: default_hooks(directory / "idle", NEVER),
        WRITES: lambda: default_hooks(directory / "writing", 20),
    }
    return {NONE: list, **alone, **together}


def show(times: Times, steps: int) -> None:
    print(f"{len(times[NONE])} rounds of {steps} steps each.\n")
    print("| hooks | us per step | more than without, us |\n|---|---|---|")
    for name, seconds in times.items():
        extra = [1e6 * (mine - its) for mine, its in zip(seconds, times[NONE], strict=True)]
        print(f"| {name} | {1e6 * median(seconds):.2f} | {spread(extra, 2)} |")
    print("\nAim: all default hooks, idle, at most 25 us.", flush=True)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=40)
    made.add_argument("--steps", type=int, default=1000, help="per round")
    args = made.parse_args()
    prepare(args)
    facts = header()
    show_header("Hooks", facts)
    with tempfile.TemporaryDirectory() as directory:
        competitors = {name: fold(make()) for name, make in entries(Path(directory)).items()}
        times = measure(competitors, rounds=args.rounds, steps=args.steps)
    show(times, args.steps)
    write_json(args.json, facts, {"seconds_per_step": times})


if __name__ == "__main__":
    main()
