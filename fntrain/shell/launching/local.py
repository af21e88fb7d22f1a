"""The processes of one machine: start them, watch them, end all when one fails, and start them again if asked to."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import attrs
import torch.distributed as dist

from fntrain.core.errors import LaunchError
from fntrain.shell.launching.failures import Failure, described, ended_well, first_failure, how_it_ended, reported
from fntrain.shell.launching.network import ProcessRank, process_group
from fntrain.shell.launching.signals import follow_launcher, handled_by

_log = logging.getLogger("fntrain")
# DistributedDataParallel and optimizers import torch._dynamo, 800 modules, when they are first used.
PRELOAD = [
    "fntrain.shell.launching.forkserver",
    "torch._dynamo",
    "fntrain.shell.distributed.distribute",
    "fntrain.shell.launching.launch",
]
GRACE_S = 2.0  # how long the other ranks may take to end by themselves when one has failed
KILLED_S = 10.0  # within which a process must be gone after SIGKILL


def launch_here(fn: Callable[[], object], num_processes: int, max_restarts: int, timeout: timedelta) -> None:
    """Run a function in processes of this machine; see `launch`."""
    for restarts in range(max_restarts):
        try:
            return LocalJob(fn, num_processes, timeout).run()
        except LaunchError as error:
            _log.warning("%s\nthe job is started again, for the %d. time of %d", error, restarts + 1, max_restarts)
    return LocalJob(fn, num_processes, timeout).run()


def forkserver_context() -> Any:
    """Return the multiprocessing context of a job: ranks are forked from one process that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class LocalJob:
    """One attempt of a job: its processes, what they have reported, and the signals that the launcher got."""

    def __init__(self, fn: Callable[[], object], num_processes: int, timeout: timedelta) -> None:
        self.fn = fn
        self.num_processes = num_processes
        self.timeout = timeout
        self.context = forkserver_context()
        self.signal_number = self.context.Value("i", 0, lock=False)  # of the latest signal; ranks read it
        self.num_signals = 0
        self.processes: list[Any] = []
        self.pipes: dict[int, Connection] = {}
        self.begun: set[int] = set()  # ranks whose process has come as far as our code
        self.failures: list[Failure] = []
        self.terminated: set[int] = set()  # ranks that the launcher ended, because another had failed

    def run(self) -> None:
        store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        with handled_by(self.handle_signal):
            try:
                for rank in range(self.num_processes):
                    self.start(rank, store.port)
                self.watch()
            finally:
                self.end()
        self.raise_outcome()

    def handle_signal(self, number: int, _frame: Any) -> None:
        self.num_signals += 1
        self.signal_number.value = number

    def start(self, rank: int, port: int) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        me = ProcessRank(rank, self.num_processes, rank, self.num_processes)
        environment = os.environ | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.num_processes)}
        arguments = (self.fn, me, _Launcher(port, sender, self.signal_number, self.timeout, environment))
        process = self.context.Process(target=_run_rank, args=arguments, name=f"rank {rank}", daemon=False)
        process.start()
        sender.close()
        self.processes.append(process)
        self.pipes[rank] = receiver

    @property
    def running(self) -> list[Any]:
        return [process for process in self.processes if process.exitcode is None]

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def watch(self) -> None:
        """Wait until all have ended, one has failed, or a second signal came."""
        while self.running and self.num_signals < 2:
            self.receive(0.2)
            if not all(ended_well(code) for code in self.codes if code is not None):
                return

    def receive(self, seconds: float) -> None:
        """Wait until a rank sends something or ends, and read it: a rank waits while its pipe is full."""
        # Given an empty list, which it is if the last rank has ended just now, `wait` would wait the whole time.
        if sources := [*(process.sentinel for process in self.running), *self.pipes.values()]:
            wait(sources, timeout=seconds)
        for rank, pipe in list(self.pipes.items()):
            try:
                while pipe.poll():
                    message = pipe.recv()
                    self.begun.add(rank)
                    self.failures += [message] if message is not None else []
            except (EOFError, OSError):  # the rank has ended
                self.pipes.pop(rank).close()

    def end(self) -> None:
        """End the ranks that still run: by SIGTERM, then by SIGKILL; at once by SIGKILL after a second signal."""
        if self.num_signals < 2:
            self.join(GRACE_S / 4 if any(self.codes) else 0.0)  # when one has failed, others fail by themselves
            self.stop("terminate", GRACE_S)
        self.stop("kill", KILLED_S)
        for process in self.running:
            _log.warning("%s (pid %d) has not ended 10 s after SIGKILL: left behind", process.name, process.pid)
        self.receive(0.0)
        for pipe in self.pipes.values():
            pipe.close()

    def stop(self, method: str, seconds: float) -> None:
        for process in self.running:
            self.terminated.add(self.processes.index(process))
            getattr(process, method)()
        self.join(seconds)

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running and (left := deadline - time.monotonic()) > 0:
            self.receive(left)

    def raise_outcome(self) -> None:
        """Raise LaunchError if a rank failed, SystemExit if a signal ended the job; return if all is done."""
        codes, number = self.codes, self.signal_number.value
        failed = {rank: code for rank, code in enumerate(codes) if not ended_well(code)}
        known = self.terminated.union(failure.rank for failure in self.failures)
        silent = {rank: code for rank, code in failed.items() if rank not in known}  # ended by themselves, unreported
        if self.num_signals > 1 or (self.num_signals and (not failed or -number in silent.values())):
            raise SystemExit(128 + number)
        failures = sorted(self.failures, key=lambda failure: failure.when)
        failures += [Failure(rank, 0.0, how_it_ended(code, rank in self.begun), None) for rank, code in silent.items()]
        if failures:
            raise LaunchError(self.describe(failures, failed))
        if statuses := [code for code in codes if code]:
            raise SystemExit(statuses[0])

    def describe(self, failures: list[Failure], failed: Iterable[int]) -> str:
        first, others = first_failure(failures)
        of = f" of {self.num_processes}"
        if first.text is None:
            return described(first, others, of=of)
        rest = [rank for rank in failed if rank != first.rank]
        return described(first, [], of=of) + (f"\nranks {rest} were ended, or failed after it" if rest else "")


@attrs.frozen
class _Launcher:
    """What a rank gets from the process that launched it."""

    port: int  # of the store by which the ranks find each other
    pipe: Connection  # to the launcher: the rank sends None when it has begun, a Failure if it fails
    signal_number: Any
    timeout: timedelta
    environment: Mapping[str, str]


def _run_rank(fn: Callable[[], object], me: ProcessRank, launcher: _Launcher) -> None:
    """Run the function; the main function of a rank's process."""
    launcher.pipe.send(None)
    follow_launcher(launcher.signal_number)
    os.environ.clear()  # the process that ranks are forked from has the environment of the first job
    os.environ.update(launcher.environment)

    def report(failure: Failure) -> None:
        with suppress(OSError):
            launcher.pipe.send(failure)

    with reported(me.rank, report):
        store = dist.TCPStore("127.0.0.1", launcher.port, is_master=False)  # type: ignore[attr-defined]
        # The inner one reports an error of fn before the connections close, which makes the other ranks fail.
        with process_group(me, timeout=launcher.timeout, store=store), reported(me.rank, report):
            fn()
