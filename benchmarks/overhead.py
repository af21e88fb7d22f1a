"""What does a step cost by each road: the loop people write by hand, ours, and those of other libraries?

    python benchmarks/overhead.py [--rounds 40] [--steps 100] [--models mlp,cnn,gpt,gpt25]
                                  [--sections plain,logs,clips,compiled,empty] [--no-peers] [--threads 1] [--json FILE]

Every round runs every competitor of a section for the same number of steps on the same prepared batches, in an order
shuffled anew. Shown are medians over the rounds; a ratio is formed within each round, then its median and quartiles
over the rounds. In each section all that compute the same must end with bitwise the same weights, or the script fails;
those with other kernels (compiled ones) must be close to them after a few steps. AdamW(fused=True) wherever it exists.

There are two denominators: the raw loop as it is usually written, and one tuned as far as we know how. How libraries
that own their loop are timed without their start-up: see harness.py.

- plain: constant learning rate, no clipping, no logs.
- logs: the same, and every 20 steps loss, learning rate and times go to the console, a file of lines, and TensorBoard.
- clips: scheduled learning rate, gradients clipped to norm 1, metrics kept in a list.
- compiled: scheduled learning rate; the whole step as one program, with jax.jit for comparison (the MLP only).
  `--pin 0` holds the whole process, XLA's threads too, to one core.
- empty: a step that does nothing, so that what remains is the fold.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import (
    EVERY,
    LR,
    MAX_NORM,
    OPTIONS,
    SCHEDULE,
    Batch,
    Case,
    Competitor,
    Entry,
    Lent,
    MissingError,
    Times,
    classes,
    from_shell,
    header,
    lent,
    loss_fn,
    make_case,
    measure,
    parser,
    prepare,
    run_section,
    show_header,
    spread,
    table,
    write_json,
)
from torch import Tensor
from torch.autograd import Variable

import fntrain as ft

SECTIONS = ("plain", "logs", "clips", "compiled", "empty")
PLAIN, TUNED = "raw loop", "raw loop, tuned"
LOGS, TUNED_LOGS = "raw loop that logs", "raw loop that logs, tuned"
CLIPS, TUNED_CLIPS = "raw loop, clips and keeps metrics", "raw loop, clips and keeps metrics, tuned"
SCHEDULED, TUNED_SCHEDULED = "raw loop, scheduled lr", "raw loop, scheduled lr, tuned"
COMPILED, JAX = "ours, compile_step", "jax.jit, whole step, donated"
BARE, FIT, HOOKED = "empty step in a bare loop", "fit, empty step, 0 hooks", "fit, empty step, 10 idle hooks"
BASES = {
    "plain": (PLAIN, TUNED),
    "logs": (LOGS, TUNED_LOGS),
    "clips": (CLIPS, TUNED_CLIPS, PLAIN),
    "compiled": (SCHEDULED, TUNED_SCHEDULED, PLAIN, JAX),
}
WAYS = ("pure", "in_place")  # forms of our step


# ---------------------------------------------------------------------------------------------------------- raw loops


def raw_loop(case: Case) -> Competitor:
    model = deepcopy(case.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)

    def run(steps: int) -> None:
        for batch in case.take(steps):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return Competitor(run, lambda: list(model.parameters()))


def raw_loop_lent(case: Case) -> Competitor:
    """The raw loop, fed as the libraries are that own their loop."""
    model = deepcopy(case.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)

    def train(batches: Lent) -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return lent(case, train, lambda _: list(model.parameters()))


def raw_loop_scheduled(case: Case, *, clips: bool = False) -> Competitor:
    model = deepcopy(case.model)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=LR, **OPTIONS)
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
            if clips:
                norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
                log.append({"loss": loss.detach(), "grad_norm": norm, "lr": lr})
            optimizer.step()
            done += 1

    return Competitor(run, lambda: params)


def tuned_step(case: Case) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], Sequence[Tensor]]:
    """As little around torch's kernels as we know how, with the model called as it is.

    No Optimizer.step around the fused kernel, no zero_grad (gradients are dropped), the autograd engine called without
    its wrapper, and for clipping one norm over all gradients and a branch on the host.
    """
    model = deepcopy(case.model)
    params = list(model.parameters())
    data = [param.detach() for param in params]
    first, second = [torch.zeros_like(param) for param in data], [torch.zeros_like(param) for param in data]
    counts = [torch.zeros(()) for _ in params]
    one = torch.ones(())
    backward = Variable._execution_engine.run_backward

    def step(batch: Batch, lr: float = LR, *, clips: bool = False) -> tuple[Tensor, Tensor | None]:
        loss = loss_fn(model, batch)
        backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        grads: list[Any] = [param.grad for param in params]
        norm = None
        if clips:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            factor = MAX_NORM / (norm + 1e-6)
            if factor.item() < 1.0:
                torch._foreach_mul_(grads, factor)
        torch._foreach_add_(counts, 1)
        torch._fused_adamw_(
            data,
            grads,
            first,
            second,
            [],
            counts,
            lr=lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=OPTIONS["weight_decay"],
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        for param in params:
            param.grad = None
        return loss, norm

    return step, params


def tuned_loop(case: Case) -> Competitor:
    step, params = tuned_step(case)

    def run(steps: int) -> None:
        for batch in case.take(steps):
            step(batch)

    return Competitor(run, lambda: params)


def tuned_loop_scheduled(case: Case, *, clips: bool = False) -> Competitor:
    step, params = tuned_step(case)
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        log = []
        for batch in case.take(steps):
            lr = SCHEDULE(done)
            loss, norm = step(batch, lr, clips=clips)
            if clips:
                log.append({"loss": loss.detach(), "grad_norm": norm, "lr": lr})
            done += 1

    return Competitor(run, lambda: params)


def raw_loop_logs(case: Case, directory: Path, *, tuned: bool) -> Competitor:
    """Logs what our default hooks log, as one would by hand: medians of 20 steps; nothing is read in between."""
    from torch.utils.tensorboard import SummaryWriter

    if tuned:
        step, params = tuned_step(case)
    else:
        model = deepcopy(case.model)
        params = list(model.parameters())
        optimizer = torch.optim.AdamW(params, lr=LR, **OPTIONS)

        def step(batch: Batch) -> tuple[Tensor, Tensor | None]:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss, None

    def train(batches: Lent) -> None:
        losses: deque[Tensor] = deque(maxlen=EVERY)
        times: dict[str, deque[float]] = {name: deque(maxlen=EVERY) for name in ("step", "data", "total")}
        done, now = 0, time.perf_counter
        with SummaryWriter(directory) as writer, (directory / "metrics.jsonl").open("a") as file:
            end = now()
            for batch in batches:
                start = now()
                times["data"].append(start - end)
                loss, _ = step(batch)
                losses.append(loss.detach())
                times["step"].append(now() - start)
                times["total"].append(now() - end)
                end = now()
                done += 1
                if done % EVERY == 0:
                    row = {"loss": median(torch.stack(list(losses)).tolist()), "lr": LR}
                    row |= {f"time/{name}": median(values) for name, values in times.items()}
                    print(f"step {done}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
                    file.write(json.dumps({"step": done, **row}) + "\n")
                    file.flush()
                    for name, value in row.items():
                        writer.add_scalar(name, value, done)
                    writer.flush()

    return lent(case, train, lambda _: params)


def compiled_loop(case: Case, *, all_of_it: bool) -> Competitor:
    """torch.compile of the loss, with the fused optimizer as it is or with the optimizer compiled too."""
    model = deepcopy(case.model)
    rate: Any = torch.tensor(LR) if all_of_it else LR
    options = OPTIONS | {"fused": not all_of_it}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **options)
    forward = torch.compile(lambda batch: loss_fn(model, batch))
    update = torch.compile(lambda: optimizer.step()) if all_of_it else optimizer.step
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        for batch in case.take(steps):
            lr = SCHEDULE(done)
            for group in optimizer.param_groups:
                if all_of_it:
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            optimizer.zero_grad()
            forward(batch).backward()  # type: ignore[no-untyped-call]
            update()
            done += 1

    return Competitor(run, lambda: list(model.parameters()))


# --------------------------------------------------------------------------------------------------------------- ours


def our_step(case: Case, way: str = "pure", *, lr: Any = LR, **options: Any) -> tuple[ft.StepFn, ft.TrainState]:
    """`way`: "pure", or a function of ft.shell."""
    wrap = None if way == "pure" else from_shell(way)
    model = deepcopy(case.model)
    optimizer = ft.optimizer(torch.optim.AdamW, lr=lr, **OPTIONS)
    step_fn: ft.StepFn = ft.supervised_step(model, loss_fn, optimizer, **options)
    return (wrap(step_fn) if wrap else step_fn), ft.init_state(model, optimizer, seed=0)


def our_loop(case: Case, *, way: str = "pure", keeps: bool = False, **options: Any) -> Competitor:
    step_fn, state = our_step(case, way, **options)

    def run(steps: int) -> None:
        nonlocal state
        log = []
        for batch in case.take(steps):
            state = step_fn(state, batch)
            if keeps:
                log.append(state.metrics)

    return Competitor(run, lambda: list(state.params.values()))


def our_fit(case: Case, *, hooks: Sequence[Any], way: str = "pure", **options: Any) -> Competitor:
    """One long `fit`, whose hooks stay open from round to round."""
    step_fn, state = our_step(case, way, **options)

    def train(batches: Lent) -> ft.TrainState:
        return ft.fit(step_fn, hooks, state=state, data=batches)

    return lent(case, train, lambda loop: list(loop.result.params.values()))


def idle_hooks() -> list[Any]:
    """Ten hooks whose turn never comes, as most hooks' does not at most steps."""

    def never(state: ft.TrainState) -> None:
        raise AssertionError(f"ran at step {state.step}")

    return [ft.every(10**9, ft.hook(after_step=never, name=f"idle{index}")) for index in range(10)]


def default_hooks(directory: Path) -> list[Any]:
    return [
        ft.hooks.iteration_timer(),
        ft.hooks.write_metrics(ft.writers.default(directory), every=EVERY),
        ft.hooks.checkpoint(directory, every=10**9),
    ]


def num_rebuilds(case: Case, steps: int = 1000) -> int | None:
    """How many kernels inductor generates, and graphs dynamo traces, in steps 11 to 1010 of a schedule."""
    try:
        competitor = our_loop(case, way="compile_step", lr=SCHEDULE)
    except MissingError:
        return None
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    def built() -> int:
        return int(metrics.generated_kernel_count) + int(counters["stats"]["unique_graphs"])

    competitor.run(10)
    before = built()
    competitor.run(steps)
    return built() - before


# ----------------------------------------------------------------------------------------------------------- sections


def plain(peers: bool) -> dict[str, Entry]:
    entries = {PLAIN: Entry(raw_loop), TUNED: Entry(tuned_loop), "raw loop, batches lent": Entry(raw_loop_lent)}
    for way in WAYS:
        entries |= {
            f"ours, {way}": Entry(partial(our_loop, way=way)),
            f'ours, {way}, on_nonfinite="allow"': Entry(partial(our_loop, way=way, on_nonfinite="allow")),
            f"ours, {way}, fit, 0 hooks": Entry(partial(our_fit, hooks=[], way=way)),
        }
    if peers:
        from peers import bare_entries

        entries |= bare_entries()
    return entries


def logs(peers: bool, directory: Path) -> dict[str, Entry]:
    def place(name: str) -> Path:
        made = directory / name
        made.mkdir(parents=True, exist_ok=True)
        return made

    entries = {
        PLAIN: Entry(raw_loop),
        LOGS: Entry(lambda case: raw_loop_logs(case, place("raw"), tuned=False)),
        TUNED_LOGS: Entry(lambda case: raw_loop_logs(case, place("tuned"), tuned=True)),
    }
    for way, allow in product(WAYS, (False, True)):
        options: dict[str, Any] = {"on_nonfinite": "allow"} if allow else {}
        name = f"ours, {way}, fit, default hooks" + (', on_nonfinite="allow"' if allow else "")
        hooks = default_hooks(place(f"{way}{allow}"))
        entries[name] = Entry(partial(our_fit, hooks=hooks, way=way, **options))
    if peers:
        from peers import logging_entries

        entries |= logging_entries(place)
    return entries


def clips() -> dict[str, Entry]:
    options: dict[str, Any] = {"lr": SCHEDULE, "clip_grad_norm": MAX_NORM}
    entries = {
        CLIPS: Entry(partial(raw_loop_scheduled, clips=True)),
        TUNED_CLIPS: Entry(partial(tuned_loop_scheduled, clips=True)),
        PLAIN: Entry(raw_loop, exact=False),
    }
    for way in WAYS:
        entries |= {
            f"ours, {way}": Entry(partial(our_loop, way=way, keeps=True, **options)),
            f"ours, {way}, fit, 0 hooks": Entry(partial(our_fit, hooks=[], way=way, **options)),
            f"ours, {way}, fit, 10 idle hooks": Entry(partial(our_fit, hooks=idle_hooks(), way=way, **options)),
        }
    return entries


def compiled(peers: bool) -> dict[str, Entry]:
    entries = {
        SCHEDULED: Entry(raw_loop_scheduled),
        TUNED_SCHEDULED: Entry(tuned_loop_scheduled),
        PLAIN: Entry(raw_loop, exact=False),
        "torch.compile of the loss": Entry(partial(compiled_loop, all_of_it=False), exact=False, close=True),
        "torch.compile of the loss and of optimizer.step": Entry(
            partial(compiled_loop, all_of_it=True), exact=False, close=True
        ),
        "ours, in_place": Entry(partial(our_loop, way="in_place", lr=SCHEDULE)),
        COMPILED: Entry(partial(our_loop, way="compile_step", lr=SCHEDULE), exact=False, close=True),
    }
    if peers:
        from jax_step import jax_loop

        entries[JAX] = Entry(jax_loop, exact=False, close=True)
    return entries


def run_model(case: Case, section: str, rounds: int, *, peers: bool) -> Times:
    with TemporaryDirectory() as directory:
        made: dict[str, Callable[[], dict[str, Entry]]] = {
            "plain": partial(plain, peers),
            "logs": partial(logs, peers, Path(directory)),
            "clips": clips,
            "compiled": partial(compiled, peers),
        }
        entries = made[section]()
        times, left_out = run_section(entries, case, rounds=rounds)
    print(table(f"{case.title}: {section}", times, BASES[section], left_out, steps=case.steps), flush=True)
    if section == "compiled" and (rebuilds := num_rebuilds(case)) is not None:
        print(f"compile_step: {rebuilds} kernels or graphs built anew in 1000 scheduled steps.\n", flush=True)
    return times


# ------------------------------------------------------------------------------------------------------ an empty step


def advance(state: ft.TrainState, batch: Batch) -> ft.TrainState:
    """The step that does nothing."""
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


def run_empty(rounds: int, steps: int) -> Times:
    batches = [classes(64)]
    competitors = {
        BARE: empty_loop(batches),
        FIT: empty_fold(batches, []),
        HOOKED: empty_fold(batches, idle_hooks()),
    }
    times = measure(competitors, rounds=rounds, steps=steps)
    lines = ["## An empty step: the fold alone", "", f"{rounds} rounds of {steps} steps each.", ""]
    lines += ["| competitor | us per step | more than the bare loop, us |", "|---|---|---|"]
    for name, seconds in times.items():
        extra = [1e6 * (mine - its) for mine, its in zip(seconds, times[BARE], strict=True)]
        lines.append(f"| {name} | {1e6 * median(seconds):.2f} | {spread(extra, 2)} |")
    print("\n".join(lines) + "\n", flush=True)
    return times


# --------------------------------------------------------------------------------------------------------------- main


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=40)
    made.add_argument("--steps", type=int, default=100, help="per round: MLP all, CNN 1/5, GPT 1/50, GPT 25M 1/100")
    made.add_argument("--models", default="mlp,cnn,gpt", help="comma-separated, of mlp, cnn, gpt, gpt25")
    made.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    made.add_argument("--no-peers", action="store_true", help="without other libraries, installed or not")
    args = made.parse_args()
    if unknown := set(args.sections.split(",")) - set(SECTIONS):
        made.error(f"--sections: got {', '.join(sorted(unknown))}, expected some of {', '.join(SECTIONS)}")
    return args


def main() -> None:
    args = options()
    prepare(args)
    facts = header(["lightning", "accelerate", "pytorch-ignite", "torchtnt", "jax", "jaxlib"])
    show_header("Overhead per step", facts)
    sections, raw = args.sections.split(","), {}
    for name in args.models.split(","):
        case = make_case(name, args.steps)
        for section in sections:
            if section != "empty":
                raw[f"{name}, {section}"] = run_model(case, section, args.rounds, peers=not args.no_peers)
    if "empty" in sections:
        raw["empty"] = run_empty(args.rounds, args.steps * 10)
    write_json(args.json, facts, {"seconds_per_step": raw})


if __name__ == "__main__":
    main()
