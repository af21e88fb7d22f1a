"""What do several ranks cost: a step against a hand-written loop, bytes, collectives?

    python benchmarks/scaling.py [--ranks 1,2,4] [--models gpt,cnn,mlp] [--rounds 15] [--steps 500] [--json FILE]

step: in the same processes, in turns, in an order drawn anew every round: `ft.states` over `ft.shell.distribute`, the
same with metrics written every 20 steps, and a loop by hand (forward, backward, fused AdamW, on
DistributedDataParallel with its own hook; with clipping by norm, as ours). The batches of a rank are ready-made. What
a round takes is the time of rank 0 between two barriers.
bytes: what a step hands to collectives, by counting the calls; sums of a step travel with the gradients, the question
whether to stop is one of the fold, on a channel of its own.
collectives: what messages of their own take, and the exchange of a write of metrics.
Start-up is in start_up.py.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness import (
    LR,
    OPTIONS,
    Batch,
    header,
    loss_fn,
    make_case,
    parser,
    prepare,
    show_header,
    spread,
    write_json,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fntrain as ft

CLIP = 1.0
OURS, WRITING, HAND, HAND_CLIPPED = "ours", "ours, metrics written every 20", "by hand", "by hand, clipped"
Run = Callable[[int], None]


class OwnBatches:
    """Ready-made batches, another part for each rank already."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def shard(self, rank: int, world_size: int) -> "OwnBatches":
        del rank, world_size
        return self

    def at(self, position: int) -> Iterator[Batch]:
        return islice(cycle(self.batches), position % len(self.batches), None)


class Collectives(TorchDispatchMode):
    """Calls and bytes by kind, of torch's own reducer too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            calls = self.found.setdefault(func._opname, [0, 0])
            calls[0] += 1
            calls[1] += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def by_hand(name: str, *, clip: bool) -> Run:
    case = make_case(name, 1)
    distributed = dist.is_initialized()
    model: Any = DistributedDataParallel(case.model, gradient_as_bucket_view=True) if distributed else case.model
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=LR, **OPTIONS)
    batches = cycle(case.batches)

    def run(steps: int) -> None:
        for batch in islice(batches, steps):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
            if clip:
                torch.nn.utils.clip_grad_norm_(case.model.parameters(), CLIP)
            optimizer.step()

    return run


def ours(name: str, *, writing: bool = False) -> Run:
    case = make_case(name, 1)
    optimizer = ft.optimizer(torch.optim.AdamW, lr=LR, **OPTIONS)
    step_fn = ft.shell.distribute(ft.supervised_step(case.model, loss_fn, optimizer, clip_grad_norm=CLIP))
    state = ft.init_state(case.model, optimizer)
    hooks = [ft.hooks.write_metrics(ft.writers.memory(), every=20)] if writing else []
    states = ft.states(step_fn, hooks, state=state, data=OwnBatches(case.batches), max_steps=10**9)

    def run(steps: int) -> None:
        for _ in islice(states, steps):
            pass

    return run


def time_steps(name: str, rounds: int, steps: int, out: Path) -> None:
    """In every rank: take turns; rank 0 writes the seconds per step of each round."""
    torch.set_num_threads(1)
    runs = {
        HAND_CLIPPED: by_hand(name, clip=True),
        HAND: by_hand(name, clip=False),
        OURS: ours(name),
        WRITING: ours(name, writing=True),
    }
    steps = max(1, make_case(name, steps).steps)
    here = ft.shell.ranks()
    times: dict[str, list[float]] = {one: [] for one in runs}
    for index in range(rounds + 1):
        for one in random.Random(index).sample(list(runs), len(runs)):
            here.barrier()
            begin = time.perf_counter()
            runs[one](steps)
            here.barrier()
            times[one].append((time.perf_counter() - begin) / steps)
    if here.rank == 0:
        out.write_text(json.dumps({one: seconds[1:] for one, seconds in times.items()}))


def count_bytes(name: str, out: Path) -> None:
    """In every rank: bytes and calls of a step, by what torch.distributed is asked for."""
    torch.set_num_threads(1)
    run = ours(name)
    run(2)
    with Collectives() as counted:
        run(10)
    found = counted.found
    if ft.shell.ranks().rank == 0:
        size = sum(param.nbytes for param in make_case(name, 1).model.parameters())
        out.write_text(
            json.dumps({"gradients": size, **{kind: [n / 10 for n in both] for kind, both in found.items()}})
        )


def time_collectives(out: Path, repeats: int = 200) -> None:
    """In every rank: seconds of the pieces, medians."""
    here = ft.shell.ranks()
    row = [(f"metric{index}", step, 0.5) for index in range(8) for step in range(20)]
    vector = torch.zeros(3, dtype=torch.float64)
    pieces: dict[str, Callable[[], object]] = {
        "a message of 24 bytes": lambda: dist.all_reduce(vector),
        "a question (8 bytes, channel of its own)": lambda: here.max(0),
        "a write (8 metrics of 20 steps)": lambda: here.gather(row),
    }
    found = {}
    for piece, call in pieces.items():
        taken = []
        for _ in range(repeats):
            here.barrier()
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        found[piece] = median(taken)
    if here.rank == 0:
        out.write_text(json.dumps(found))


def in_ranks(size: int, fn: Callable[..., None], *args: Any) -> Any:
    """What rank 0 has written."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "found.json"
        ft.shell.launch(partial(fn, *args, out), size)
        return json.loads(out.read_text())


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in lines), ""])


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--ranks", default="1,2,4")
    options.add_argument("--models", default="gpt,cnn,mlp")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--steps", type=int, default=500, help="of the smallest model; others take fewer")
    args = options.parse_args()
    prepare(args)
    sizes = [int(size) for size in args.ranks.split(",")]
    facts = header()
    show_header("Several ranks", facts)
    numbers: dict[str, Any] = {}
    rows = []
    for name in args.models.split(","):
        for size in sizes:
            times = numbers[f"step {name} {size}"] = in_ranks(size, time_steps, name, args.rounds, args.steps)
            for one in (OURS, WRITING):
                ratios = [
                    [mine / its for mine, its in zip(times[one], times[base], strict=True)]
                    for base in (HAND_CLIPPED, HAND)
                ]
                shown = [f"{1e3 * median(times[one]):.3f}", *(spread(values, 3) for values in ratios)]
                rows.append([name, str(size), one, *shown])
    print(table("Step", ["model", "ranks", "case", "ms / step", f"/ {HAND_CLIPPED}", f"/ {HAND}"], rows), flush=True)
    rows = []
    for name in args.models.split(","):
        found = numbers[f"bytes {name}"] = in_ranks(2, count_bytes, name)
        reduced, shared = found["allreduce_"], found.get("broadcast_", [0, 0])
        rows.append(
            [name, f"{found['gradients']:,}", f"{reduced[1]:,.0f} in {reduced[0]:g} calls", f"{shared[1]:,.0f}"]
        )
    print(table("Bytes of a step", ["model", "gradients", "added up", "buffers shared"], rows), flush=True)
    rows = []
    for size in [size for size in sizes if size > 1]:
        found = numbers[f"collectives {size}"] = in_ranks(size, time_collectives)
        rows += [[str(size), piece, f"{1e6 * seconds:.0f}"] for piece, seconds in found.items()]
    print(table("Collectives", ["ranks", "piece", "us"], rows), flush=True)
    write_json(args.json, facts, numbers)


if __name__ == "__main__":
    main()
