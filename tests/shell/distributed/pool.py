"""Ranks that stay: processes with a process group, to which tests send functions; started once per number of ranks."""

import multiprocessing
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch.distributed as dist

from fntrain.shell.launching.local import PRELOAD
from fntrain.shell.launching.network import ProcessRank, process_group

TIMEOUT = 300.0


class Pool:
    """Some ranks; `run` calls a function in each and returns what they gave, in order."""

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.size = size
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (ProcessRank(rank, size, rank, size), self.store.port, there)
            self.processes.append(
                context.Process(target=serve, args=arguments, name=f"ranks-of-tests-{rank}", daemon=True)
            )
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def run(self, fn, *args, timeout=TIMEOUT):
        """Call fn(*args) in all ranks; an error in one is raised here, and ends the ranks."""
        for pipe in self.pipes:
            pipe.send((fn, args))
        results, left, deadline = {}, dict(enumerate(self.pipes)), time.monotonic() + timeout
        while left:
            ready = wait(list(left.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(left)} did not answer within {timeout} s")
            for rank in [rank for rank, pipe in left.items() if pipe in ready]:
                try:
                    kind, value = left.pop(rank).recv()
                except EOFError:
                    kind, value = "error", "ended without a word"
                if kind == "error":
                    self.close()
                    raise RuntimeError(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


def serve(me, port, pipe):
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with process_group(me, timeout=timedelta(seconds=TIMEOUT), store=store):
        while True:
            fn, args = pipe.recv()
            try:
                pipe.send(("result", fn(*args)))
            except BaseException:
                pipe.send(("error", traceback.format_exc()))
