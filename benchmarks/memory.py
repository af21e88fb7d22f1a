"""How much memory does a training step take, ours against the loop written by hand?

    python benchmarks/memory.py [--models mlp,cnn,gpt] [--accumulate 1,4] [--device cpu|cuda] [--json FILE]

CPU: every allocation and release that goes through torch's allocator is counted, in order, by torch.profiler
(profile_memory), from before the model is made until a step is over: tensors, and the scratch memory of kernels that
ask torch for it. The sum of both signs is what is held; its maximum within the fourth step is the peak. That is exact
and gives the same number on every run. Not seen: what libraries take from the system for themselves. The batches, and
the model that all are copied from, existed before and are not counted.
CUDA: torch.cuda.max_memory_allocated over the fourth step, less what the batches take.

"Held" is between two steps: parameters, buffers, optimizer state; in the raw loop also the gradients, which it drops at
the start of the next step. The peak of a step in place should be the raw loop's, and a copy of the buffers.
"""

import argparse
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from itertools import accumulate as running
from types import MappingProxyType
from typing import Any

import attrs
import torch
from harness import (
    LR,
    OPTIONS,
    Batch,
    Case,
    MissingError,
    from_shell,
    header,
    loss_fn,
    make_case,
    parser,
    prepare,
    show_header,
    write_json,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import fntrain as ft

STEPS = 4  # the last of them is measured: optimizer state and programs are there
MARK = "the measured step"


@attrs.frozen
class Use:
    held: int
    peak: int
    allocations: int


Run = Callable[[Batch], object]
Build = Callable[[Case, int, str], Run]
EMPTY: Mapping[str, str] = MappingProxyType({})


def raw(case: Case, parts: int, device: str) -> Run:
    model = deepcopy(case.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)

    def run(batch: Batch) -> None:
        optimizer.zero_grad()
        for inputs, targets in zip(*(tensor.chunk(parts) for tensor in batch), strict=True):
            loss = loss_fn(model, (inputs, targets))
            (loss if parts == 1 else loss / parts).backward()  # type: ignore[no-untyped-call]
            del loss
        optimizer.step()

    return run


def ours(case: Case, parts: int, device: str, *, way: str, options: Mapping[str, str] = EMPTY) -> Run:
    wrap = None if way == "pure" else from_shell(way)
    model = deepcopy(case.model).to(device)
    optimizer = ft.optimizer(torch.optim.AdamW, lr=LR, **OPTIONS)
    step_fn: ft.StepFn = ft.supervised_step(model, loss_fn, optimizer, accumulate=parts)
    step_fn = wrap(step_fn, **options) if wrap else step_fn
    state = ft.init_state(model, optimizer)

    def run(batch: Batch) -> None:
        nonlocal state
        state = step_fn(state, batch)

    return run


def competitors(device: str) -> dict[str, Build]:
    found: dict[str, Build] = {
        "raw loop": raw,
        "ours, pure": partial(ours, way="pure"),
        "ours, in_place": partial(ours, way="in_place"),
        "ours, compile_step": partial(ours, way="compile_step"),
    }
    if device == "cuda":
        found |= {
            f'ours, cuda_step, graph="{graph}"': partial(
                ours, way="cuda_step", options={"device": device, "graph": graph}
            )
            for graph in ("never", "auto")
        }
    return found


def on_cpu(make: Callable[[], Run], batches: list[Batch]) -> Use:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        run = make()
        for batch in batches[:-1]:
            run(batch)
        with record_function(MARK):
            run(batches[-1])
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    start, end = next((event.start_ns(), event.end_ns()) for event in events if event.name() == MARK)
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    before = sum(size for at, size in moves if at < start)
    inside = [size for at, size in moves if start <= at <= end]
    return Use(before, max(running(inside, initial=before)), sum(size > 0 for size in inside))


def on_cuda(make: Callable[[], Run], batches: list[Batch]) -> Use:
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    run = make()
    for batch in batches[:-1]:
        run(batch)
    torch.cuda.synchronize()
    held, before = torch.cuda.memory_allocated() - base, torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.reset_peak_memory_stats()
    run(batches[-1])
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    return Use(held, torch.cuda.max_memory_allocated() - base, allocations)


def num_bytes(model: nn.Module) -> tuple[int, int]:
    return sum(p.nbytes for p in model.parameters()), sum(b.nbytes for b in model.buffers())


def run_case(case: Case, parts: int, device: str) -> dict[str, Use]:
    batches: Any = [tuple(tensor.to(device) for tensor in batch) for batch in case.batches[:STEPS]]
    used, left_out = {}, {}
    for name, make in competitors(device).items():
        try:
            used[name] = (on_cuda if device == "cuda" else on_cpu)(partial(make, case, parts, device), batches)
        except MissingError as missing:
            left_out[name] = str(missing)
    params, buffers = num_bytes(case.model)
    lines = [f"## {case.title}, accumulate={parts}", ""]
    lines += [f"Parameters {params:,} bytes, buffers {buffers:,} bytes.", ""]
    lines += ["| competitor | held, bytes | peak, bytes | peak / raw | peak - raw, bytes | allocations in the step |"]
    lines += ["|---|---|---|---|---|---|"]
    base = used["raw loop"].peak
    for name, one in used.items():
        cells = [f"{one.held:,}", f"{one.peak:,}", f"{one.peak / base:.3f}", f"{one.peak - base:,}"]
        lines.append(f"| {' | '.join([name, *cells, f'{one.allocations:,}'])} |")
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
    print("\n".join(lines) + "\n", flush=True)
    return used


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--models", default="mlp,cnn,gpt", help="comma-separated, of mlp, cnn, gpt, gpt25")
    made.add_argument("--accumulate", default="1,4", help="comma-separated numbers of micro-batches")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = made.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: no CUDA device is available")
    return args


def main() -> None:
    args = options()
    prepare(args)
    facts, raw_numbers = header(), {}
    show_header("Memory per step", facts)
    for name in args.models.split(","):
        case = make_case(name, STEPS)
        for parts in map(int, args.accumulate.split(",")):
            used = run_case(case, parts, args.device)
            raw_numbers[f"{name}, accumulate={parts}"] = {key: attrs.asdict(one) for key, one in used.items()}
    write_json(args.json, facts, {"bytes": raw_numbers})


if __name__ == "__main__":
    main()
