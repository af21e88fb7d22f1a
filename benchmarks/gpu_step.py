"""How fast is a training step on a GPU, and how much of the machine does it use?

    python benchmarks/gpu_step.py [--cases mlp,resnet18,gpt] [--sizes tiny,middle,saturating] [--batches device|host]
                                  [--precision bf16|fp32] [--peak-tflops N] [--json FILE]
    python benchmarks/gpu_step.py --device cpu --quick    # small models: only to see that the script itself runs

Modes: the loop written by hand, eager, compiled, and captured as a CUDA graph; a loop that reads the loss on the host
at every step, as detectron2's does; ours pure, in place, and by cuda_step in each of its forms. All train a copy of the
same model on the same batches with fused AdamW under the same autocast. Models: an MLP 784-1024-1024-10, ResNet-18 for
32x32 images, a GPT of 124M parameters with context 1024.

A mode is built, run for 10 steps, timed in rounds of many steps between two synchronisations, and torn down before the
next one is built, so that its peak memory is its own. Shown are medians and quartiles over the rounds; the eager loop
is timed again at the end, which shows how much the machine drifted. `--batches device`: batches wait on the device, so
the step alone is timed. `--batches host`: they wait in pinned host memory; loops by hand copy them without blocking,
ours run in `ft.fit`, where cuda_step prefetches.

MFU: FLOPs of forward and backward as torch counts them for the eager model (torch.utils.flop_counter: matrix products,
convolutions, attention), per second, over the device's peak for dense bf16.
Memory: peak of torch.cuda.max_memory_allocated, and of max_memory_reserved, over the whole life of the mode, without
the batches. A graph's memory is its own pool: allocated is what was seen while it was captured, reserved what is kept.
The loss of step 10 must agree with the eager loop's to 5% (or 0.05), and no mode may fail, or the exit status is 1.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from harness import (
    GPT,
    LR,
    Batch,
    MissingError,
    from_shell,
    header,
    loss_fn,
    parser,
    prepare,
    show_header,
    spread,
    tokens,
    write_json,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fntrain as ft

OPTIONS: dict[str, Any] = {"weight_decay": 0.01, "fused": True}
WARM_UP = 10  # steps; the loss of the last is compared
EAGER, AGAIN = "raw, eager", "raw, eager, once more"
# Dense bf16, without sparsity, from the vendor's data sheets; the first name found in the device's decides.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
SIZES = ("tiny", "middle", "saturating")


# --------------------------------------------------------------------------------------------------------------- cases


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(width: int = 64, depth: int = 2) -> nn.Module:
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling, four stages of two blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(4):
        outputs, inputs = width * 2**stage, width * 2 ** max(stage - 1, 0)
        for index in range(depth):
            first = index == 0
            layers.append(Residual(inputs if first else outputs, outputs, stride=2 if first and stage else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, 10))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


@attrs.frozen
class Case:
    """A model with its batches, and what is counted per second."""

    title: str
    model: nn.Module
    batches: list[Batch]
    per_step: int
    unit: str
    autocast: Callable[..., Any]
    precision: str
    device: torch.device
    from_host: bool

    def take(self, steps: int) -> Iterator[Batch]:
        """Batches where the mode finds them."""
        return islice(cycle(self.batches), steps)

    def placed(self, steps: int) -> Iterator[Batch]:
        """Batches on the device; a loop written by hand copies them itself."""
        if not self.from_host:
            yield from self.take(steps)
            return
        for inputs, targets in self.take(steps):
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


def make_case(name: str, size: str, args: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    device, small, which = torch.device(args.device), args.quick, SIZES.index(size)
    if name == "mlp":
        batch = (4, 8, 16)[which] if small else (32, 1024, 16384)[which]
        model, title = mlp(64 if small else 1024), f"MLP, batch {batch}"
        batches = [(torch.randn(batch, 784), torch.randint(0, 10, (batch,))) for _ in range(4)]
        per_step, unit = batch, "samples"
    elif name == "resnet18":
        batch = (2, 4, 8)[which] if small else (16, 128, 1024)[which]
        model, title = resnet18(8 if small else 64), f"ResNet-18, 32x32, batch {batch}"
        batches = [(torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))) for _ in range(4)]
        per_step, unit = batch, "images"
    else:
        batch = (1, 2, 4)[which] if small else (1, 4, 16)[which]
        context, vocabulary = (32, 128) if small else (1024, 50304)
        shape: dict[str, int] = (
            {"width": 64, "depth": 2, "heads": 4} if small else {"width": 768, "depth": 12, "heads": 12}
        )
        model = GPT(vocabulary=vocabulary, context=context, tied=True, **shape)
        title = f"GPT, {sum(p.numel() for p in model.parameters()):,} parameters, batch {batch} x {context}"
        batches = [tokens(batch, context, vocabulary) for _ in range(4)]
        per_step, unit = batch * context, "tokens"
    from_host = args.batches == "host"
    if device.type == "cuda" and from_host:
        batches = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches]
    elif device.type == "cuda":
        batches = [(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    enabled = args.precision == "bf16"
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled)
    return Case(title, model, batches, per_step, unit, autocast, args.precision, device, from_host)


# --------------------------------------------------------------------------------------------------------------- modes


@attrs.frozen
class Mode:
    """`run(n)` goes on for n steps and gives the last one's loss, still on the device."""

    run: Callable[[int], Tensor]


Build = Callable[[Case], Mode]


def placed_model(case: Case, *, channels_last: bool = False) -> nn.Module:
    model = deepcopy(case.model).to(case.device)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def raw(case: Case, *, compiled: str | None = None, reads: bool = False, channels_last: bool = False) -> Mode:
    """`compiled`: a mode of torch.compile. `reads`: as in detectron2, the loss goes to the host at every step and is
    checked there before the update.
    """
    model = placed_model(case, channels_last=channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)

    def forward(batch: Batch) -> Tensor:
        inputs, targets = batch
        if channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return loss_fn(model, (inputs, targets))

    loss_of = torch.compile(forward, mode=compiled) if compiled else forward

    def run(steps: int) -> Tensor:
        log = []
        for batch in case.placed(steps):
            if compiled == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()  # first: gradients may lie in memory that a compiled forward uses again
            with case.autocast():
                loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if reads:
                log.append(loss.detach().cpu().item())
                if not math.isfinite(log[-1]):
                    raise FloatingPointError(f"loss is {log[-1]}")
            optimizer.step()
        return loss.detach().clone()

    return Mode(run)


def captured(case: Case) -> Mode:
    """The whole step as one graph, as torch's documentation shows it: the first 3 steps eager on a side stream."""
    if case.device.type != "cuda":
        raise MissingError("needs CUDA")
    model = placed_model(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, capturable=True, **OPTIONS)
    inputs, targets = (torch.empty_like(tensor, device=case.device) for tensor in case.batches[0])
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    done = 0
    loss = torch.zeros((), device=case.device)

    def step() -> Tensor:
        with case.autocast(cache_enabled=False):  # the cache would outlive the graph's own memory
            value = loss_fn(model, (inputs, targets))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    def run(steps: int) -> Tensor:
        nonlocal done, loss
        for new_inputs, new_targets in case.take(steps):
            inputs.copy_(new_inputs, non_blocking=True)
            targets.copy_(new_targets, non_blocking=True)
            if done < 3:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    optimizer.zero_grad(set_to_none=True)
                    loss = step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                if done == 3:
                    optimizer.zero_grad(set_to_none=True)  # so that gradients are made in the graph's own memory
                    with torch.cuda.graph(graph):
                        loss = step()
                graph.replay()
            done += 1
        return loss

    return Mode(run)


def ours(case: Case, way: str, *, on_nonfinite: Any = "skip", **options: Any) -> Mode:
    if way == "cuda_step" and case.device.type != "cuda":
        raise MissingError("needs CUDA")
    wrap = None if way == "pure" else from_shell(way)
    if way == "cuda_step":
        options["device"] = str(case.device)
    model = placed_model(case)
    optimizer = ft.optimizer(torch.optim.AdamW, lr=LR, **OPTIONS)
    precision: Any = case.precision
    step_fn: ft.StepFn = ft.supervised_step(model, loss_fn, optimizer, precision=precision, on_nonfinite=on_nonfinite)
    step_fn = wrap(step_fn, **options) if wrap else step_fn
    state = ft.init_state(model, optimizer)

    def run(steps: int) -> Tensor:
        nonlocal state
        if case.from_host and way == "cuda_step":
            state = ft.fit(step_fn, state=state, data=case.take(steps), max_steps=state.step + steps)
        else:
            for batch in case.placed(steps):
                state = step_fn(state, batch)
        return torch.as_tensor(state.metrics["loss"])

    return Mode(run)


def modes(name: str, *, compiles: bool) -> dict[str, Build]:
    graph = partial(ours, way="cuda_step")
    found: dict[str, Build] = {EAGER: raw}
    if compiles:
        found["raw, compiled"] = partial(raw, compiled="default")
        found['raw, compiled, mode="reduce-overhead"'] = partial(raw, compiled="reduce-overhead")
    found |= {
        "raw, captured by hand": captured,
        "detectron2-style, .item() every step": partial(raw, reads=True),
        "ours, pure": partial(ours, way="pure"),
        "ours, in_place": partial(ours, way="in_place"),
        'ours, cuda_step, graph="never"': partial(graph, graph="never"),
        'ours, cuda_step, graph="auto"': partial(graph, graph="auto"),
        'ours, cuda_step, graph="always"': partial(graph, graph="always"),
        'ours, cuda_step, graph="auto", on_nonfinite="allow"': partial(graph, graph="auto", on_nonfinite="allow"),
    }
    if compiles:
        found['ours, cuda_step, graph="auto", compile'] = partial(graph, graph="auto", compile=True)
    if name == "resnet18":
        found["raw, eager, channels_last"] = partial(raw, channels_last=True)
        found['ours, cuda_step, graph="auto", channels_last'] = partial(graph, graph="auto", channels_last=True)
        if compiles:
            found["raw, compiled, channels_last"] = partial(raw, compiled="default", channels_last=True)
            found['ours, cuda_step, graph="auto", compile, channels_last'] = partial(
                graph, graph="auto", compile=True, channels_last=True
            )
    return found | {AGAIN: raw}


# -------------------------------------------------------------------------------------------------------------- timing


@attrs.frozen
class Result:
    seconds: list[float]  # per step, by round
    loss: float
    peak_allocated: int
    peak_reserved: int


def synchronize(case: Case) -> None:
    if case.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_step(case: Case, mode: Mode, steps: int) -> float:
    """By the clock, between two synchronisations: whatever streams a mode uses, its work is done."""
    synchronize(case)
    begin = time.perf_counter()
    mode.run(steps)
    synchronize(case)
    return (time.perf_counter() - begin) / steps


def release() -> None:
    """Give back all that the last mode held: memory, compiled code."""
    if "torch._dynamo" in sys.modules:  # two seconds to import, and nothing to reset before
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_mode(case: Case, build: Build, args: argparse.Namespace) -> Result:
    release()
    cuda = case.device.type == "cuda"
    before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if cuda else (0, 0)
    mode = build(case)
    loss = mode.run(WARM_UP).item()
    guess = seconds_per_step(case, mode, 2 if args.quick else 5)
    steps = 2 if args.quick else min(max(int(args.round_seconds / guess), 5), 1000)
    seconds = [seconds_per_step(case, mode, steps) for _ in range(args.rounds)]
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else before
    return Result(seconds, float(loss), peaks[0] - before[0], peaks[1] - before[1])


def num_flops(case: Case) -> int:
    """Of forward and backward of one batch."""
    model = placed_model(case)
    with FlopCounterMode(display=False) as counter:
        for batch in case.placed(1):
            with case.autocast():
                loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


# --------------------------------------------------------------------------------------------------------------- table


def peak_flops(args: argparse.Namespace) -> float | None:
    if args.peak_tflops is not None:
        return float(args.peak_tflops) * 1e12
    if args.device != "cuda" or args.precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def row(case: Case, name: str, result: Result, base: Result, flops: int, peak: float | None) -> str:
    seconds = median(result.seconds)
    cells = [
        name,
        spread([1e3 * one for one in result.seconds], 3),
        f"{seconds / median(base.seconds):.3f}",
        f"{case.per_step / seconds:,.0f}",
        "n/a" if peak is None else f"{100 * flops / seconds / peak:.1f}%",
        f"{result.peak_allocated:,}" if case.device.type == "cuda" else "n/a",
        f"{result.peak_reserved:,}" if case.device.type == "cuda" else "n/a",
        f"{result.loss:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def run_case(name: str, size: str, args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Raw results, and whether all that could run did so rightly."""
    case = make_case(name, size, args)
    flops, peak = num_flops(case), peak_flops(args)
    print(f"## {case.title} ({size})\n\n{flops:.4g} FLOPs a step, {args.rounds} rounds.\n")
    print(f"| mode | ms per step | / {EAGER} | {case.unit} per s | MFU | peak allocated | peak reserved | loss at 10 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    good = True
    for mode, build in modes(name, compiles=not args.no_compile).items():
        try:
            results[mode] = result = time_mode(case, build, args)
        except MissingError as missing:
            left_out[mode] = str(missing)
            continue
        except Exception as error:  # the other modes' numbers are worth having
            left_out[mode] = f"FAILED, {type(error).__name__}: {error}".splitlines()[0]
            good = False
            continue
        base = results.get(EAGER, result)
        print(row(case, mode, result, base, flops, peak), flush=True)
        if not math.isclose(result.loss, base.loss, rel_tol=0.05, abs_tol=0.05):
            left_out[mode] = f"listed, but WRONG: loss of step {WARM_UP} is {result.loss}, the raw loop's {base.loss}"
            good = False
    if left_out:
        print("\n" + "\n".join(["Left out:", "", *(f"- {mode}: {reason}" for mode, reason in left_out.items())]))
    print(flush=True)
    raw_numbers = {mode: attrs.asdict(result) for mode, result in results.items()}
    return {"flops": flops, "per_step": case.per_step, "modes": raw_numbers, "left_out": left_out}, good


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--quick", action="store_true", help="small models, few steps: a test of the script")
    made.add_argument("--cases", default="mlp,resnet18,gpt", help="comma-separated")
    made.add_argument("--sizes", default=",".join(SIZES), help="of the batch, comma-separated")
    made.add_argument("--batches", choices=["device", "host"], default="device")
    made.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    made.add_argument("--rounds", type=int, default=10)
    made.add_argument("--round-seconds", type=float, default=0.3, help="a round takes as many steps as fit, 5 to 1000")
    made.add_argument("--peak-tflops", type=float, help="the device's peak, if the script does not know it")
    made.add_argument("--no-compile", action="store_true", help="without the modes that take a minute to compile")
    args = made.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("no CUDA device is available; --device cpu --quick runs the script's other paths")
    for flag, known in (("cases", ("mlp", "resnet18", "gpt")), ("sizes", SIZES)):
        if unknown := set(getattr(args, flag).split(",")) - set(known):
            made.error(f"--{flag}: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    return args


def main() -> None:
    args = options()
    prepare(args)
    facts = header(["triton"])
    show_header("A training step on a GPU" if args.device == "cuda" else "The script's paths on a CPU", facts)
    raw_numbers, good = {}, True
    for name in args.cases.split(","):
        for size in args.sizes.split(","):
            raw_numbers[f"{name}, {size}"], right = run_case(name, size, args)
            good = good and right
    write_json(args.json, facts, {"results": raw_numbers})
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
