"""What do the pure step and the fold cost per step, against the loop people write by hand?

    python benchmarks/overhead.py [--rounds 40] [--steps 100] [--models mlp,cnn,gpt,empty] [--threads 1] [--json FILE]

Every round runs every competitor for the same number of steps on the same prepared batches, in an order that rotates.
Shown are medians over the rounds; a ratio is formed within each round, then its median and quartiles over the rounds.
At the end competitors that compute the same must hold bitwise the same weights, or the script fails.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fntrain as ft

Batch = tuple[Tensor, Tensor]
Times = dict[str, list[float]]  # competitor -> seconds per step, one number per round
OPTIONS: dict[str, Any] = {"weight_decay": 0.01, "fused": True}
SCHEDULE = ft.schedules.warmup_cosine(1e-3, warmup_steps=100, total_steps=1_000_000)
MAX_NORM = 1.0
PLAIN = "raw loop"
LOGGED = "raw loop, clips and logs"
ALLOW = 'pure step, no clipping, on_nonfinite="allow"'
BARE = "pure step in a bare loop"
FIT = "fit, pure step, 0 hooks"
HOOKED = "fit, pure step, 10 idle hooks"


# ------------------------------------------------------------------------------------------------- models and batches


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + torch.as_tensor(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Decoder of 3.2M parameters: 4 blocks of width 256, 4 heads, 96 characters, context 128."""

    def __init__(self, vocabulary: int = 96, context: int = 128, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.as_tensor(self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """The network of recipes/digits.py without its dropout, which a raw loop would draw differently."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    pool, head = nn.MaxPool2d(2), nn.Linear(64 * 2 * 2, 10)
    return nn.Sequential(*block(1, 32), *block(32, 32), pool, *block(32, 64), pool, nn.Flatten(), head)


def classes(*shape: int) -> Batch:
    return torch.randn(32, *shape), torch.randint(0, 10, (32,))


def tokens(sequences: int = 4, length: int = 128) -> Batch:
    drawn = torch.randint(0, 96, (sequences, length + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@attrs.frozen
class Case:
    """A model with its batches; every competitor gets a copy of the one and all of the other."""

    title: str
    model: nn.Module
    batches: list[Batch]
    steps: int

    def take(self, steps: int) -> Iterator[Batch]:
        return islice(cycle(self.batches), steps)


def case(name: str, steps: int) -> Case:
    """Make a case; slower models take fewer of the steps per round."""
    torch.manual_seed(0)
    if name == "mlp":
        return Case("MLP 64-64-10, batch 32", mlp(), [classes(64) for _ in range(16)], steps)
    if name == "cnn":
        return Case("CNN of the digits recipe, batch 32", cnn(), [classes(1, 8, 8) for _ in range(16)], steps // 5 or 1)
    model = GPT()
    size = sum(param.numel() for param in model.parameters())
    return Case(f"GPT, {size:,} parameters, 512 tokens", model, [tokens() for _ in range(16)], steps // 50 or 1)


# -------------------------------------------------------------------------------------------------------- competitors


@attrs.frozen
class Competitor:
    """`run(n)` goes on for n steps; `weights()` are those reached."""

    run: Callable[[int], None]
    weights: Callable[[], Sequence[Tensor]]


def raw_loop(case: Case) -> Competitor:
    model = deepcopy(case.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **OPTIONS)

    def run(steps: int) -> None:
        for batch in case.take(steps):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return Competitor(run, lambda: list(model.parameters()))


def raw_loop_logged(case: Case) -> Competitor:
    model = deepcopy(case.model)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-3, **OPTIONS)
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        log = []
        for batch in case.take(steps):
            lr = SCHEDULE(done)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()
            log.append({"loss": loss.detach(), "grad_norm": norm, "lr": lr})
            done += 1

    return Competitor(run, lambda: params)


def pure_loop(case: Case, *, clips: bool = True) -> Competitor:
    step_fn, state = pure_step(case, clips=clips)

    def run(steps: int) -> None:
        nonlocal state
        log = []
        for batch in case.take(steps):
            state = step_fn(state, batch)
            log.append(state.metrics)

    return Competitor(run, lambda: list(state.params.values()))


def fold(case: Case, hooks: list[Any]) -> Competitor:
    step_fn, state = pure_step(case)

    def run(steps: int) -> None:
        nonlocal state
        state = ft.fit(step_fn, hooks, state=state, data=case.take(steps), max_steps=state.step + steps)

    return Competitor(run, lambda: list(state.params.values()))


def pure_step(case: Case, *, clips: bool = True) -> tuple[ft.StepFn, ft.TrainState]:
    model = deepcopy(case.model)
    optimizer = ft.optimizer(torch.optim.AdamW, lr=SCHEDULE if clips else 1e-3, **OPTIONS)
    if clips:
        step_fn = ft.supervised_step(model, loss_fn, optimizer, clip_grad_norm=MAX_NORM)
    else:
        step_fn = ft.supervised_step(model, loss_fn, optimizer, on_nonfinite="allow")
    return step_fn, ft.init_state(model, optimizer, seed=0)


def idle_hooks() -> list[Any]:
    """Ten hooks whose turn never comes, as most hooks' does not at most steps."""

    def never(state: ft.TrainState) -> None:
        raise AssertionError(f"ran at step {state.step}")

    return [ft.every(10**9, ft.hook(after_step=never, name=f"idle{index}")) for index in range(10)]


def advance(state: ft.TrainState, batch: Batch) -> ft.TrainState:
    """The step that does nothing, so that what remains is the fold."""
    del batch
    return state.advance()


def empty_loop(batches: list[Batch]) -> Competitor:
    state = ft.TrainState(step=0, position=0, seed=0, params={})

    def run(steps: int) -> None:
        nonlocal state
        for batch in islice(cycle(batches), steps):
            state = advance(state, batch)

    return Competitor(run, list)


def empty_fold(batches: list[Batch], hooks: list[Any]) -> Competitor:
    state = ft.TrainState(step=0, position=0, seed=0, params={})

    def run(steps: int) -> None:
        nonlocal state
        data = islice(cycle(batches), steps)
        state = ft.fit(advance, hooks, state=state, data=data, max_steps=state.step + steps)

    return Competitor(run, list)


# ------------------------------------------------------------------------------------------------------------- timing


def measure(competitors: dict[str, Competitor], *, rounds: int, steps: int) -> Times:
    """Seconds per step by competitor and round, after one round to warm up; no garbage collection inside."""
    names = list(competitors)
    times: Times = {name: [] for name in names}
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            gc.freeze()
            gc.disable()
            start = time.perf_counter()
            competitors[name].run(steps)
            seconds = (time.perf_counter() - start) / steps
            gc.enable()
            gc.unfreeze()
            if index > 0:
                times[name].append(seconds)
    return times


def run_model(case: Case, rounds: int) -> Times:
    competitors = {
        PLAIN: raw_loop(case),
        LOGGED: raw_loop_logged(case),
        ALLOW: pure_loop(case, clips=False),
        BARE: pure_loop(case),
        FIT: fold(case, []),
        HOOKED: fold(case, idle_hooks()),
    }
    times = measure(competitors, rounds=rounds, steps=case.steps)
    check_equal(competitors, PLAIN, ALLOW)
    for name in (BARE, FIT, HOOKED):
        check_equal(competitors, LOGGED, name)
    return times


def check_equal(competitors: dict[str, Competitor], one: str, other: str) -> None:
    pairs = zip(competitors[one].weights(), competitors[other].weights(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise SystemExit(f"{one!r} and {other!r} ended with different weights: they did not do the same work")


def run_empty(rounds: int, steps: int) -> Times:
    batches = [classes(64)]
    competitors = {
        BARE: empty_loop(batches),
        FIT: empty_fold(batches, []),
        HOOKED: empty_fold(batches, idle_hooks()),
    }
    return measure(competitors, rounds=rounds, steps=steps)


# ------------------------------------------------------------------------------------------------------------- tables


def ratio(times: Times, name: str, base: str) -> str:
    """Median and quartiles of the per-round ratios."""
    ratios = [mine / its for mine, its in zip(times[name], times[base], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{median(ratios):.3f} ({low:.3f} to {high:.3f})"


def extra_us(times: Times, name: str, base: str) -> str:
    extra = [1e6 * (mine - its) for mine, its in zip(times[name], times[base], strict=True)]
    low, _, high = quantiles(extra, n=4) if len(extra) > 1 else extra * 3
    return f"{median(extra):.2f} ({low:.2f} to {high:.2f})"


def table(title: str, times: Times, *, steps: int) -> str:
    rounds = len(times[PLAIN])
    lines = [f"## {title}", "", f"{rounds} rounds of {steps} steps each.", ""]
    lines += [f"| competitor | ms per step | / {PLAIN} | / {LOGGED} |", "|---|---|---|---|"]
    for name, seconds in times.items():
        ratios = [ratio(times, name, base) for base in (PLAIN, LOGGED)]
        lines.append(f"| {name} | {1e3 * median(seconds):.3f} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def empty_table(times: Times, *, steps: int) -> str:
    rounds = len(times[BARE])
    lines = ["## An empty step: the fold alone", "", f"{rounds} rounds of {steps} steps each.", ""]
    lines += ["| competitor | us per step | more than the bare loop, us |", "|---|---|---|"]
    for name, seconds in times.items():
        shown = name.replace("pure step", "empty step")
        lines.append(f"| {shown} | {1e6 * median(seconds):.2f} | {extra_us(times, name, BARE)} |")
    return "\n".join(lines) + "\n"


def header() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "hardware": f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} used",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, fntrain {commit()}",
        "command": " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit measured; `+` marks a tree with changes."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+"]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return f"at {result.stdout.strip()}" if result.returncode == 0 else "not in git"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100, help="per round on the MLP; CNN a 5th, GPT a 50th, empty x10")
    parser.add_argument("--models", default="mlp,cnn,gpt,empty", help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write raw seconds per step here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts, raw = header(), {}
    print("# Overhead per step\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n", flush=True)
    for name in args.models.split(","):
        if name == "empty":
            raw[name] = run_empty(args.rounds, args.steps * 10)
            print(empty_table(raw[name], steps=args.steps * 10), flush=True)
        elif name in ("mlp", "cnn", "gpt"):
            one = case(name, args.steps)
            raw[name] = run_model(one, args.rounds)
            print(table(one.title, raw[name], steps=one.steps), flush=True)
        else:
            parser.error(f"--models: got {name!r}, expected some of mlp, cnn, gpt, empty")
    if args.json:
        args.json.write_text(json.dumps({**facts, "seconds_per_step": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
