"""What the timing scripts share: models with their batches, competitors that take turns, tables, the facts of a run.

A competitor is built once and then run n steps at a time, many times over. A framework that owns its loop can't be
called that way, so it runs in a thread of its own for one long training (`Lent`): its batches come from an iterable
that waits at the end of every round until the next one is granted. Start-up falls before the first round, which is not
counted, and nothing runs between the rounds. All others run in a thread of their own too, so that all are alike, and a
raw loop whose batches are lent is listed, to show that lending costs nothing.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from statistics import median, quantiles
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fntrain as ft

Batch = tuple[Tensor, Tensor]
Times = dict[str, list[float]]  # competitor -> seconds per step, one number per round
LR = 1e-3
OPTIONS: dict[str, Any] = {"weight_decay": 0.01, "fused": True}
SCHEDULE = ft.schedules.warmup_cosine(1e-3, warmup_steps=100, total_steps=1_000_000)
MAX_NORM = 1.0
EVERY = 20  # steps between two lines of a log


class MissingError(Exception):
    """A competitor can't run here; the text says why."""


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
    """Decoder; by default 3.2M parameters: 4 blocks of width 256, 4 heads, 96 characters, context 128."""

    def __init__(
        self,
        *,
        vocabulary: int = 96,
        context: int = 128,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.head.weight, std=0.02)
            self.tokens.weight = self.head.weight

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


def tokens(sequences: int = 4, length: int = 128, vocabulary: int = 96) -> Batch:
    drawn = torch.randint(0, vocabulary, (sequences, length + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@attrs.frozen
class Case:
    """A model with its batches; every competitor gets a copy of the one and all of the other."""

    name: str
    title: str
    model: nn.Module
    batches: list[Batch]
    steps: int

    def take(self, steps: int) -> Iterator[Batch]:
        return islice(cycle(self.batches), steps)


MODELS = ("mlp", "cnn", "gpt", "gpt25")


def make_case(name: str, steps: int) -> Case:
    """Make a case; slower models take fewer of the steps per round."""
    torch.manual_seed(0)
    if name == "mlp":
        return Case(name, "MLP 64-64-10, batch 32", mlp(), [classes(64) for _ in range(16)], steps)
    if name == "cnn":
        batches = [classes(1, 8, 8) for _ in range(16)]
        return Case(name, "CNN of the digits recipe, batch 32", cnn(), batches, steps // 5 or 1)
    if name not in MODELS:
        raise SystemExit(f"--models: got {name!r}, expected some of {', '.join(MODELS)}")
    model = GPT() if name == "gpt" else GPT(width=512, depth=8, heads=8)
    size = sum(param.numel() for param in model.parameters())
    steps = steps // (50 if name == "gpt" else 100) or 1
    return Case(name, f"GPT, {size:,} parameters, 512 tokens", model, [tokens() for _ in range(16)], steps)


# -------------------------------------------------------------------------------------------------------- competitors


def _nothing() -> None:
    pass


@attrs.frozen
class Competitor:
    """`run(n)` goes on for n steps; `weights()` are those reached, asked for after `finish()`."""

    run: Callable[[int], object]
    weights: Callable[[], Sequence[Tensor]]
    finish: Callable[[], object] = _nothing
    own_thread: bool = False  # `run` hands its work to a thread of its own


@attrs.frozen
class Entry:
    """How to build a competitor. `exact`: must end with bitwise the weights of its section's first exact entry.

    `close`: computes the same with other kernels, so it must be near that entry after a few steps; neither: other work.
    """

    build: Callable[[Case], Competitor]
    exact: bool = True
    close: bool = False


class Worker:
    """A thread that trains in rounds: `run(n)` grants it n more steps and waits until they are done."""

    def __init__(self, train: Callable[["Worker"], object]) -> None:
        self.train = train
        self.granted: SimpleQueue[int] = SimpleQueue()
        self.answers: SimpleQueue[BaseException | None] = SimpleQueue()
        self.threads = torch.get_num_threads()
        self.thread: threading.Thread | None = None
        self.ended = False
        self.result: Any = None

    def run(self, steps: int) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()
            self._wait()  # all that comes before the first step is start-up
        self.granted.put(steps)
        self._wait()

    def finish(self) -> None:
        """Grant nothing more, so that the training ends in its own way."""
        if self.thread is not None and self.thread.is_alive():
            self.granted.put(0)
            self._wait()
            self.thread.join()

    def grants(self) -> Iterator[int]:
        """For the thread: how many steps to do next, until there are none."""
        while not self.ended:
            self.answers.put(None)
            steps = self.granted.get()
            self.ended = steps == 0
            if not self.ended:
                yield steps

    def _wait(self) -> None:
        error = self.answers.get()
        if error is not None:
            raise error

    def _work(self) -> None:
        torch.set_num_threads(self.threads)  # the setting belongs to a thread
        try:
            self.result = self.train(self)
        except BaseException as error:
            self.answers.put(error)
        else:
            self.answers.put(None)


class Lent(Worker):
    """Batches for a framework that owns its loop; it is in its own thread, and takes as many as are granted."""

    def __init__(self, case: Case, train: Callable[["Lent"], object]) -> None:
        super().__init__(lambda _: train(self))
        self.case = case

    def __iter__(self) -> Iterator[Batch]:
        for steps in self.grants():
            yield from self.case.take(steps)


class Sized(Lent):
    """With a length, for a framework that would otherwise take a batch ahead to learn where the data ends."""

    def __len__(self) -> int:
        return 10**9


def lent(
    case: Case, train: Callable[[Lent], object], weights: Callable[[Lent], Sequence[Tensor]], *, sized: bool = False
) -> Competitor:
    loop = Sized(case, train) if sized else Lent(case, train)
    return Competitor(loop.run, lambda: weights(loop), loop.finish, own_thread=True)


def in_own_thread(competitor: Competitor) -> Competitor:
    if competitor.own_thread:
        return competitor

    def train(worker: Worker) -> None:
        for steps in worker.grants():
            competitor.run(steps)
        competitor.finish()

    worker = Worker(train)
    return Competitor(worker.run, competitor.weights, worker.finish, own_thread=True)


def from_shell(name: str) -> Callable[..., Any]:
    """`ft.shell.in_place` and its like."""
    found = getattr(ft.shell, name, None)
    if found is None:
        raise MissingError(f"this version of fntrain has no ft.shell.{name}")
    return found  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------- timing


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """What competitors print goes to a file that keeps nothing, at the price of a write to it."""
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def build(entries: Mapping[str, Entry], case: Case) -> tuple[dict[str, Competitor], dict[str, str]]:
    """The competitors that can run here, and why the others can't."""
    built, left_out = {}, {}
    for name, entry in entries.items():
        try:
            built[name] = entry.build(case)
        except MissingError as missing:
            left_out[name] = str(missing)
    return built, left_out


def measure(competitors: Mapping[str, Competitor], *, rounds: int, steps: int) -> Times:
    """Seconds per step by competitor and round, after one round to warm up; no garbage collection inside."""
    names = list(competitors)
    times: Times = {name: [] for name in names}
    competitors = {name: in_own_thread(competitor) for name, competitor in competitors.items()}
    with silenced():
        for name in names:
            competitors[name].run(steps)
        gc.collect()
        gc.freeze()  # what is there by now stays: later collections look at new objects only
        for index in range(rounds):
            # A fixed order would give each the same predecessor, and what that leaves in the caches, every time.
            for name in random.Random(index).sample(names, len(names)):
                gc.collect()
                gc.disable()
                start = time.perf_counter()
                competitors[name].run(steps)
                times[name].append((time.perf_counter() - start) / steps)
                gc.enable()
        gc.unfreeze()
        for competitor in competitors.values():
            competitor.finish()
    return times


def run_section(entries: Mapping[str, Entry], case: Case, *, rounds: int) -> tuple[Times, dict[str, str]]:
    """Times of all that can run, after checks that they did the same work; and what was left out, and why."""
    competitors, left_out = build(entries, case)
    times = measure(competitors, rounds=rounds, steps=case.steps)
    exact = [name for name in competitors if entries[name].exact]
    for name in exact[1:]:
        check_equal(competitors, exact[0], name)
    check_close({name: entries[name] for name in competitors}, exact[0], case)
    return times, left_out


def check_equal(competitors: Mapping[str, Competitor], one: str, other: str) -> None:
    pairs = zip(competitors[one].weights(), competitors[other].weights(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise SystemExit(f"{one!r} and {other!r} ended with different weights: they did not do the same work")


def check_close(entries: Mapping[str, Entry], base: str, case: Case, steps: int = 5) -> None:
    """Other kernels round differently, and training amplifies that; so fresh ones are compared after a few steps.

    AdamW divides a gradient by its own size, so where a gradient is 0 but for rounding, even the sign of the update is
    chance: a weight may be off by the sum of the learning rates, most must agree.
    """
    names = [name for name, entry in entries.items() if entry.close]
    reached = {}
    for name in [base, *names] if names else []:
        competitor = entries[name].build(case)
        with silenced():
            competitor.run(steps)
            competitor.finish()
        reached[name] = torch.cat([weight.detach().flatten() for weight in competitor.weights()])
    for name in names:
        gap = (reached[name] - reached[base]).abs()
        if gap.max() > 3 * steps * LR or (gap > 0.01 * LR).float().mean() > 0.02:
            raise SystemExit(f"{base!r} and {name!r} are {gap.max():.1e} apart after {steps} steps: not the same work")


# ------------------------------------------------------------------------------------------------------------- tables


def ratio(times: Times, name: str, base: str) -> str:
    """Median and quartiles of the per-round ratios."""
    return spread([mine / its for mine, its in zip(times[name], times[base], strict=True)], 3)


def spread(values: Sequence[float], digits: int) -> str:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return f"{median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(title: str, times: Times, bases: Sequence[str], left_out: Mapping[str, str], *, steps: int) -> str:
    bases = [base for base in bases if base in times]
    rounds = len(next(iter(times.values())))
    lines = [f"## {title}", "", f"{rounds} rounds of {steps} steps each.", ""]
    lines += [
        f"| competitor | ms per step | {' | '.join(f'/ {base}' for base in bases)} |",
        "|---" * (2 + len(bases)) + "|",
    ]
    for name, seconds in times.items():
        ratios = [ratio(times, name, base) for base in bases]
        lines.append(f"| {name} | {1e3 * median(seconds):.3f} | {' | '.join(ratios)} |")
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- facts of the run


def header(packages: Iterable[str] = ()) -> dict[str, str]:
    """What any number must be read with; `packages` are named with their versions where installed."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"fntrain {commit()}"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": ", ".join(versions),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def hardware() -> str:
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} used"


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


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=1, help="torch's, on the CPU")
    made.add_argument("--pin", type=int, metavar="CORE", help="keep the whole process, all its threads, on one core")
    made.add_argument("--json", type=Path, help="write the raw numbers here")
    return made


def prepare(args: argparse.Namespace) -> None:
    """Set what must be set before anything is timed, or imported that starts threads."""
    torch.set_num_threads(args.threads)
    if args.pin is not None:
        os.sched_setaffinity(0, {args.pin})


def show_header(title: str, facts: Mapping[str, str]) -> None:
    print(f"# {title}\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n", flush=True)


def write_json(path: Path | None, facts: Mapping[str, str], numbers: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({**facts, **numbers}, indent=1) + "\n")
