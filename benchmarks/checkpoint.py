"""What does a checkpoint cost: how long does training stand still, how long does it take, against the limits and peers?

    python benchmarks/checkpoint.py [--size-mb 600] [--rounds 9] [--only save,load,busy,memory] [--directory DIR]

The state is a GPT's parameters and AdamW's two moments and count for each, all float32. All cases take turns, in an
order drawn anew every round; the first round, in which memory is touched for the first time, is shown apart. What a
case wrote before is deleted before its clock starts, so each writes new files. Reads are warm for all: every file is
in the page cache. "raw" is what the system can do: write(2) of 64 MiB at a time, or preadv(2), by one thread. Peers
write to the disk too: fsync is added where they have none.

save: the training thread has nothing else to do. "blocked" is how long the call takes, "total" until all is on disk.
load: into fresh memory, or into the tensors of a state that is there.
busy: the training thread goes on with small steps of an MLP: how long the save takes beside them, and how long the
longest step takes and the 99th percentile, beside a save and without one.
memory: each case in a process of its own: the highest resident size while it ran, less the size before. What is mapped
from a file counts as far as it was touched. The asynchronous ones save twice.
"""

import argparse
import gc
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from harness import (
    GPT,
    LR,
    OPTIONS,
    header,
    loss_fn,
    make_case,
    parser,
    prepare,
    show_header,
    silenced,
    spread,
    write_json,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import fntrain as ft
from fntrain.core import tree
from fntrain.core.state import named_leaves
from fntrain.shell.checkpoints import tensor_file
from fntrain.shell.checkpoints.saver import Saver
from fntrain.shell.disk import fsync

Seconds = dict[str, float]  # what they are of -> seconds
Rounds = dict[str, list[Seconds]]  # case -> rounds, the first one too
Case = Callable[[], Seconds]
SECTIONS = ("save", "load", "busy", "memory")
RAW_WRITE, RAW_READ, COPY = "raw write + fsync", "raw read", "one memcpy"
ASYNC, SAVE = "ours, asynchronous", "ours, ft.save"
LOAD, INTO, STRUCTURE = "ours, ft.load", "ours, ft.load(into=)", 'ours, ft.load(into=, verify="structure")'
TORCH_LOAD, LOAD_FILE = "torch.load", "safetensors load_file + copy_"
ALONE = "no save"
TORCH_SAVE, SAVE_FILE, DCP_SAVE = "torch.save + fsync", "safetensors save_file + fsync", "dcp.save"
MAPPED, DCP_LOAD = "torch.load(mmap=True) + copy_", "dcp.load"
DCP_ASYNC, DCP_KEPT = "dcp.async_save", "dcp.async_save, DefaultStager kept"
MEMORY = (
    *(f"{ASYNC}, zlib", f"{SAVE}, zlib", DCP_ASYNC, DCP_KEPT, TORCH_SAVE, SAVE_FILE, DCP_SAVE),
    *(f"{LOAD}, zlib", f"{INTO}, zlib", TORCH_LOAD, MAPPED, LOAD_FILE, DCP_LOAD),
)
CHUNK = 1 << 26  # bytes in one system call of the raw cases, as in ours


# -------------------------------------------------------------------------------------------------------------- state


def make_state(size_mb: int) -> ft.TrainState:
    """About that size in all, in 148 parameters and their moments; a quarter is the embedding."""
    torch.manual_seed(0)
    width = max(8, 8 * round(64 * math.sqrt(size_mb / 600)))
    model = GPT(vocabulary=47 * width, context=256, width=width, depth=12, heads=8, tied=True)
    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    opt_state = {
        name: {"exp_avg": torch.randn_like(param), "exp_avg_sq": torch.rand_like(param), "step": torch.tensor(1.0)}
        for name, param in params.items()
    }
    return ft.TrainState(step=1, position=1, seed=0, params=params, opt_state=opt_state)


def tensors_of(state: ft.TrainState) -> dict[str, Tensor]:
    return {leaf: value for leaf, value in named_leaves(state) if isinstance(value, Tensor)}


def nested(state: ft.TrainState) -> dict[str, Any]:
    """The same tensors in the usual form."""
    return {"model": dict(state.params), "optimizer": {name: dict(entry) for name, entry in state.opt_state.items()}}


# -------------------------------------------------------------------------------------------------------------- cases


@contextmanager
def checksums(crc32: Any) -> Iterator[None]:
    """Let fntrain compute them this way, whatever is installed."""
    found, tensor_file._crc32 = tensor_file._crc32, lambda: crc32  # type: ignore[assignment]
    try:
        yield
    finally:
        tensor_file._crc32 = found


KINDS: dict[str, Any] = {"zlib": zlib.crc32}
with suppress(ImportError):
    KINDS["isal"] = import_module("isal.isal_zlib").crc32


def chosen(name: str) -> AbstractContextManager[None]:
    """What the name of a case says of checksums."""
    kind = name.rpartition(", ")[2]
    return checksums(KINDS[kind]) if kind in KINDS else nullcontext()


def directory(name: str) -> str:
    return ASYNC if name.startswith(ASYNC) else name


def fsync_all(path: Path) -> None:
    for one in [*path.iterdir(), path]:
        fsync(one)


def clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - begin
    del kept  # to give memory back is not part of it
    return seconds


class Bench:
    """A state, tensors to load to, a directory, and what cases keep between rounds."""

    def __init__(self, size_mb: int, root: Path, stack: ExitStack) -> None:
        self.root = root
        self.stack = stack
        self.state = make_state(size_mb)
        self.tensors = tensors_of(self.state)
        self.size = sum(tensor.nbytes for tensor in self.tensors.values())
        self.checked: set[str] = set()
        self.pool = stack.enter_context(ThreadPoolExecutor(1))

    @cached_property
    def target(self) -> ft.TrainState:
        zeros = partial(tree.map_tensors, torch.zeros_like)
        return self.state.replace(params=zeros(self.state.params), opt_state=zeros(self.state.opt_state))

    @cached_property
    def flat(self) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors.values()])

    @cached_property
    def buffer(self) -> Tensor:
        return torch.empty_like(self.flat)

    @cached_property
    def saver(self) -> Saver:
        return self.stack.enter_context(Saver(self.root / ASYNC))

    @cached_property
    def stager(self) -> DefaultStager:
        return DefaultStager(StagingOptions(False, False, False, False))

    def clear(self, name: str) -> Path:
        """The directory of a case, without what it wrote before."""
        path = self.root / name
        path.mkdir(exist_ok=True)
        for one in path.iterdir():
            if one.name != ".lock":
                shutil.rmtree(one) if one.is_dir() else one.unlink()
        os.sync()
        return path

    # ------------------------------------------------------------------------------------------------------- saving

    def saves(self) -> dict[str, Callable[[Path], object]]:
        """Those that return when all is on the disk."""
        state = nested(self.state)

        def torch_save(path: Path) -> None:
            torch.save(state, path / "state.pt")
            fsync_all(path)

        def safetensors(path: Path) -> None:
            save_file(self.tensors, path / "state.safetensors")
            fsync_all(path)

        return {
            RAW_WRITE: self.raw_write,
            **{f"{SAVE}, {kind}": partial(ft.save, self.state) for kind in KINDS},
            TORCH_SAVE: torch_save,
            SAVE_FILE: safetensors,
            DCP_SAVE: lambda path: state_dict_saver.save(state, checkpoint_id=path / "dcp", no_dist=True),
        }

    def raw_write(self, path: Path) -> None:
        data = tree.to_bytes(self.flat)
        with (path / "state").open("wb", buffering=0) as out:
            for at in range(0, data.nbytes, CHUNK):
                out.write(data[at : at + CHUNK])
            os.fsync(out.fileno())

    def begins(self) -> dict[str, Callable[[Path], Future[Any]]]:
        """Those that go on in the background."""
        state = nested(self.state)

        def ours(path: Path) -> Future[None]:
            assert path == self.saver.store.root
            self.saver.save(self.state)
            assert self.saver.pending is not None
            return self.saver.pending

        def dcp_async(path: Path, *, keep: bool = False) -> Future[Any]:
            kept = self.stager if keep else None  # BlockingAsyncStager's cache pins memory, which needs a GPU
            future = state_dict_saver.async_save(state, checkpoint_id=path / "dcp", async_stager=kept, no_dist=True)
            assert isinstance(future, Future)
            return future

        return {
            **{f"{ASYNC}, {kind}": ours for kind in KINDS},
            DCP_ASYNC: dcp_async,
            DCP_KEPT: partial(dcp_async, keep=True),
        }

    def save_cases(self) -> dict[str, Case]:
        def copy() -> Seconds:
            return {"blocked": clock(lambda: self.buffer.copy_(self.flat))}

        def save(name: str, work: Callable[[Path], object]) -> Seconds:
            path = self.clear(name)
            with chosen(name):
                return {"total": clock(lambda: work(path))}

        def begin(name: str, work: Callable[[Path], Future[Any]]) -> Seconds:
            path = self.clear(directory(name))
            with chosen(name):
                start = time.perf_counter()
                future = work(path)
                blocked = time.perf_counter() - start
                future.result()
                return {"blocked": blocked, "total": time.perf_counter() - start}

        return {
            COPY: copy,
            **{name: partial(begin, name, work) for name, work in self.begins().items()},
            **{name: partial(save, name, work) for name, work in self.saves().items()},
        }

    # ------------------------------------------------------------------------------------------------------ loading

    def load_cases(self) -> dict[str, Case]:
        files = self.root / "files"
        files.mkdir(exist_ok=True)
        step = ft.save(self.state, files)
        into, given = nested(self.target), tensors_of(self.target)
        torch._foreach_zero_([*given.values()])  # its memory is there
        torch.save(nested(self.state), files / "state.pt")
        save_file(self.tensors, files / "state.safetensors")
        state_dict_saver.save(nested(self.state), checkpoint_id=files / "dcp", no_dist=True)

        def raw_read() -> None:
            data = tree.to_bytes(self.buffer)
            with (files / "state.safetensors").open("rb", buffering=0) as file:
                for at in range(0, data.nbytes, CHUNK):
                    file.readinto(data[at : at + CHUNK])

        def copied(loaded: Mapping[str, Tensor]) -> None:
            for name, tensor in given.items():
                tensor.copy_(loaded[name])

        def torch_load(*, mmap: bool) -> ft.TrainState | None:
            loaded = torch.load(files / "state.pt", weights_only=True, mmap=mmap)
            state = self.state.replace(params=loaded["model"], opt_state=loaded["optimizer"])
            if not mmap:
                return state
            copied(tensors_of(state))
            return None

        def load(name: str, work: Callable[[], Any]) -> Seconds:
            with chosen(name):
                seconds = clock(work)
                if name not in self.checked and name != RAW_READ:
                    self.checked.add(name)
                    torch._foreach_zero_([*given.values()])
                    if (work() or self.target) != self.state:
                        raise SystemExit(f"{name!r}: did not load what was saved")
            return {"total": seconds}

        def ours(name: str, **options: Any) -> dict[str, Callable[[], object]]:
            return {f"{name}, {kind}": partial(ft.load, step, **options) for kind in KINDS}

        works: dict[str, Callable[[], object]] = {
            RAW_READ: raw_read,
            **ours(LOAD),
            **ours(INTO, into=self.target),
            STRUCTURE: partial(ft.load, step, into=self.target, verify="structure"),
            TORCH_LOAD: partial(torch_load, mmap=False),
            MAPPED: partial(torch_load, mmap=True),
            LOAD_FILE: lambda: copied(load_file(files / "state.safetensors")),
            DCP_LOAD: lambda: state_dict_loader.load(into, checkpoint_id=files / "dcp", no_dist=True),
        }
        return {name: partial(load, name, work) for name, work in works.items()}

    # ----------------------------------------------------------------------------------------- beside training steps

    def busy_cases(self) -> dict[str, Case]:
        step = training()

        def steps_until(done: Callable[[], bool]) -> list[float]:
            taken: list[float] = []
            while len(taken) < 2 or not done():
                begin = time.perf_counter()
                step()
                taken.append(time.perf_counter() - begin)
            return taken

        def stalls(taken: list[float]) -> Seconds:
            return {
                "step": median(taken),
                "99%": quantiles(taken, n=100, method="inclusive")[-1],
                "longest": max(taken),
            }

        def alone() -> Seconds:
            end = time.perf_counter() + 1
            return stalls(steps_until(lambda: time.perf_counter() > end))

        def beside(name: str, begin: Callable[[Path], Future[Any]]) -> Seconds:
            path = self.clear(directory(name))
            with chosen(name):
                start = time.perf_counter()
                future = begin(path)
                blocked = time.perf_counter() - start
                taken = steps_until(future.done)
                total = time.perf_counter() - start
                future.result()
            return {"blocked": blocked, "total": total, **stalls(taken)}

        begins = {RAW_WRITE: lambda path: self.pool.submit(self.raw_write, path), **self.begins()}
        return {ALONE: alone, **{name: partial(beside, name, begin) for name, begin in begins.items()}}


def training() -> Callable[[], object]:
    """A small step, written by hand."""
    case = make_case("mlp", 1)
    batches = cycle(case.batches)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=LR, **OPTIONS)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(case.model, next(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------------------------- rounds and tables


def measure(cases: Mapping[str, Case], rounds: int) -> Rounds:
    """Every case once in a round, one round more than asked for."""
    found: Rounds = {name: [] for name in cases}
    for index in range(rounds + 1):
        for name in random.Random(index).sample(list(cases), len(cases)):
            gc.collect()
            gc.disable()
            found[name].append(cases[name]())
            gc.enable()
    return found


def seconds(rounds: Rounds, name: str, of: str) -> list[float]:
    """Without the first round."""
    return [one[of] for one in rounds[name][1:]]


def ratios(rounds: Rounds, name: str, of: str, base: str, base_of: str | None = None) -> list[float]:
    pairs = zip(seconds(rounds, name, of), seconds(rounds, base, base_of or of), strict=True)
    return [mine / its for mine, its in pairs]


def lines(title: str, columns: list[str], rows: list[list[str]]) -> str:
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in table), ""])


def table(title: str, rounds: Rounds, size: int, base: str) -> str:
    """Seconds and GB/s; a dash for what a case has not."""
    rows = []
    for name, first in rounds.items():
        row = [name]
        for of in ("blocked", "total"):
            taken = seconds(rounds, name, of) if of in first[0] else []
            row += [f"{median(taken):.4g}" if taken else "-", f"{first[0][of]:.4g}" if taken else "-"]
        row += [f"{size / median(seconds(rounds, name, 'total')) / 1e9:.2f}" if "total" in first[0] else "-"]
        row += [spread(ratios(rounds, name, "total", base), 2) if "total" in first[0] else "-"]
        rows.append(row)
    columns = ["case", "blocked, s", "first", "total, s", "first", "GB/s", f"total / {base}"]
    return lines(title, columns, rows)


def stall_table(rounds: Rounds) -> str:
    rows = [
        [
            name,
            *(f"{1e3 * median(seconds(rounds, name, of)):.2f}" for of in ("step", "99%", "longest")),
            f"{1e3 * max(seconds(rounds, name, 'longest')):.2f}",
        ]
        for name in rounds
    ]
    columns = ["beside", "median step, ms", "99%", "longest", "longest of all rounds"]
    return lines("Steps beside a save (medians over rounds)", columns, rows)


def memory_table(used: Mapping[str, int], size: int) -> str:
    rows = [[name, f"{extra / 1e6:.0f}", f"{extra / size:.2f}"] for name, extra in used.items()]
    return lines("Peak of extra memory", ["case", "MB", "/ state"], rows)


def targets(found: Mapping[str, Rounds], used: Mapping[str, int], size: int) -> str:
    rows: list[list[str]] = []

    def row(what: str, target: str, met: bool, got: str) -> None:
        rows.append([what, target, got, "yes" if met else "no"])

    def at_most(what: str, limit: float, values: list[float]) -> None:
        row(what, f"<= {limit:g}", median(values) <= limit, spread(values, 2))

    for kind in KINDS:
        if save := found.get("save"):
            ours = f"{ASYNC}, {kind}"
            at_most(f"{ours}: blocked / {COPY}", 1.15, ratios(save, ours, "blocked", COPY))
            for name in (f"{SAVE}, {kind}", ours):
                at_most(f"{name}: total / {RAW_WRITE}", 1.1, ratios(save, name, "total", RAW_WRITE))
        if busy := found.get("busy"):
            name = f"{ASYNC}, {kind}"
            at_most(f"{name}, beside training: total / {RAW_WRITE}", 1.3, ratios(busy, name, "total", RAW_WRITE))
            at_most(f"{name}: longest step, ms", 10, [1e3 * one for one in seconds(busy, name, "longest")])
        if load := found.get("load"):
            name = f"{INTO}, {kind}"
            at_most(f"{name}: / {LOAD_FILE}", 1.15, ratios(load, name, "total", LOAD_FILE))
            for ours in (name, f"{LOAD}, {kind}"):
                values = ratios(load, TORCH_LOAD, "total", ours)
                row(f"{TORCH_LOAD} / {ours}", ">= 4", median(values) >= 4, spread(values, 2))
    for name in (f"{ASYNC}, zlib", f"{SAVE}, zlib", f"{INTO}, zlib"):
        if name in used:
            limit = 1.05 if name.startswith(ASYNC) else 0.05
            row(f"{name}: extra memory / state", f"<= {limit}", used[name] / size <= limit, f"{used[name] / size:.2f}")
    return lines("Targets", ["what", "target", "got", "met"], rows)


# -------------------------------------------------------------------------------------------------------------- memory


def status(field: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak_of(name: str, size_mb: int, root: Path) -> int:
    """Bytes beyond the state at the highest point; a small run first, so that modules and threads are there."""
    for size in (2, size_mb):
        (root / str(size)).mkdir()
        with ExitStack() as stack:
            bench = Bench(size, root / str(size), stack)
            cases = bench.load_cases() if "load" in name else bench.save_cases()
            bench.checked.add(name)
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is the present one
            before = status("VmRSS")
            for _ in range(2 if "async" in name else 1):
                cases[name]()
            extra = status("VmHWM") - before
        shutil.rmtree(root / str(size))
    return extra


def measure_memory(names: list[str], args: argparse.Namespace, root: Path) -> dict[str, int]:
    used = {}
    for name in names:
        with tempfile.TemporaryDirectory(dir=root) as own:
            command = [
                sys.executable,
                __file__,
                "--memory-of",
                name,
                "--size-mb",
                str(args.size_mb),
                "--directory",
                own,
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise SystemExit(f"{name!r}: {result.stderr}")
            used[name] = int(result.stdout.split()[-1])
    return used


# ----------------------------------------------------------------------------------------------------------------- main


def disk(path: Path) -> str:
    command = ["df", "--output=source,fstype", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(result.stdout.splitlines()[-1].split()) if result.returncode == 0 else "unknown"


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--size-mb", type=int, default=600, help="of the state, about")
    made.add_argument("--rounds", type=int, default=9, help="after the first")
    made.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections")
    made.add_argument("--directory", type=Path, help="where to write; the default is a temporary one")
    made.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = made.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - {*SECTIONS}:
        made.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(SECTIONS)}")
    return args


def main() -> None:
    args = options()
    prepare(args)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
    with tempfile.TemporaryDirectory(dir=args.directory) as made, ExitStack() as stack:
        root = Path(made)
        if args.memory_of:
            with silenced():
                extra = peak_of(args.memory_of, args.size_mb, root)
            print(extra)
            return
        bench = Bench(args.size_mb, root, stack)
        facts = header(["safetensors", "isal"])
        facts["hardware"] += f"; {disk(root)}"
        facts["state"] = f"{bench.size:,} bytes in {len(bench.tensors)} tensors; {args.rounds} rounds after the first"
        show_header("Checkpoints", facts)
        found: dict[str, Rounds] = {}
        makers = {
            "save": (bench.save_cases, "Save", RAW_WRITE),
            "load": (bench.load_cases, "Load", LOAD_FILE),
            "busy": (bench.busy_cases, "Save beside training", RAW_WRITE),
        }
        for section, (make, title, base) in makers.items():
            if section in args.only:
                with silenced():
                    found[section] = measure(make(), args.rounds)
                shown = {name: one for name, one in found[section].items() if name != ALONE}
                print(table(title, shown, bench.size, base), flush=True)
        if "busy" in found:
            print(stall_table(found["busy"]), flush=True)
        used = {}
        if "memory" in args.only:
            used = measure_memory([*MEMORY], args, root)
            print(memory_table(used, bench.size))
        print(targets(found, used, bench.size))
    write_json(args.json, facts, {"seconds": found, "extra_bytes": used})


if __name__ == "__main__":
    main()
