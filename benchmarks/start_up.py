"""Time to start ranks: from the call of launch to the end of their first step, by forkserver and by spawn.

    python benchmarks/start_up.py [NUM_PROCESSES]

Each time is that of a fresh process, in which torch is imported already; "again" is a second job of the same process.
"""

import multiprocessing
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import fntrain as ft
from fntrain.shell.launching.launch import launch
from fntrain.shell.launching.network import ProcessRank, process_group

KINDS = ("launch (forkserver)", "forkserver without preload", "spawn")


def first_step() -> None:
    """What a rank does: a model, DistributedDataParallel, one step."""
    model = torch.nn.Linear(8, 1)
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    step_fn = ft.shell.distribute(ft.supervised_step(model, lambda model, x: model(x).square().mean(), sgd))
    ft.fit(step_fn, state=ft.init_state(model, sgd), data=ft.data.stream(torch.ones(8, 8), 8, seed=0), max_steps=1)


def rank(me: ProcessRank, port: int) -> None:
    """A rank of a plain start."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    with process_group(me, timeout=timedelta(minutes=1), store=store):
        first_step()


def start(kind: str, size: int) -> None:
    """Start ranks and wait for them."""
    if kind == KINDS[0]:
        return launch(first_step, size)
    context: Any = multiprocessing.get_context("spawn" if kind == "spawn" else "forkserver")
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    ranks = [ProcessRank(number, size, number, size) for number in range(size)]
    processes = [context.Process(target=rank, args=(me, store.port)) for me in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return None


def measure(kind: str, size: int) -> None:
    """Print the seconds of the first job of this process, and of the second."""
    for _ in range(2):
        since = time.perf_counter()
        start(kind, size)
        print(time.perf_counter() - since)


def main() -> None:
    """Each kind in a process of its own."""
    size = sys.argv[1] if len(sys.argv) > 1 else "4"
    print(f"{'seconds, ' + size + ' processes':<32}{'first':>8}{'again':>8}")
    for kind in KINDS:
        command = [sys.executable, __file__, size, kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"{kind:<32}" + "".join(f"{float(one):>8.2f}" for one in done.stdout.split()))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[2], int(sys.argv[1]))
    else:
        main()
