"""launch: run a function in several processes, of one machine or more, or where others have started them already."""

import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import attrs
import torch
import torch.distributed as dist

from fntrain.core.check import whole
from fntrain.core.errors import LaunchError
from fntrain.shell.launching.network import gloo_through, own_address

_log = logging.getLogger("fntrain")
# torch._dynamo is what DistributedDataParallel and optimizers import when they are first used, 800 modules.
PRELOAD = [
    "fntrain.shell.launching.forkserver",
    "torch._dynamo",
    "torch.nn.parallel",
    "fntrain",
    "fntrain.shell.launching.launch",
]
GRACE = 2.0  # seconds that the other ranks have to end by themselves when one has failed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def launch(
    fn: Callable[[], object],
    num_processes: int = 1,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    rendezvous: str | None = None,
    max_restarts: int = 0,
    timeout: timedelta = timedelta(minutes=30),
) -> None:
    """Run a function in several processes that form a process group; returns when all have ended.

    Under torchrun, in a task of SLURM's srun, or where a process group is there already, these processes are the ranks
    and the function just runs in this one; alone (one process, one machine) it runs here, without a process group. On
    GPUs each process gets one, by its number on the machine.

    One rank that raises or is killed ends the job within seconds, the others with it. SIGINT, SIGTERM and SIGUSR1 are
    passed on, for `hooks.on_signal`; a second one kills all. Several machines are run by torch's elastic agent.

    Args:
      fn: function without arguments that can be pickled: defined at the top level of a module, or a partial of one.
        A script must call launch under `if __name__ == "__main__":`.
      num_processes: on each machine.
      num_machines, machine_rank: how many, and which one this is.
      rendezvous: "host:port" of the machine of rank 0; needed with several machines. The port must be free there. Each
        machine is reached by the address that it has on the way there, and gloo takes that network interface unless
        GLOO_SOCKET_IFNAME says which: a machine's own name may mean its loopback.
      max_restarts: how often a job that failed is started again; `ft.resume_or` then goes on from the last checkpoint.
      timeout: of every collective.
    Raises:
      ValueError: a number out of range, several machines without a rendezvous.
      TypeError: the function can't be sent to other processes.
      LaunchError: a rank failed; the message has its traceback.
      SystemExit: the ranks ended by a signal, with its status (128 + n).
    Example:
      >>> launch(lambda: print("alone"))
      alone

    Source: detectron2's launch; torch.distributed.elastic
    """
    check_processes(num_processes, num_machines, machine_rank, rendezvous, max_restarts)
    if dist.is_available() and dist.is_initialized():
        fn()
    elif (place := placed(os.environ)) is not None:
        with connected(place, timeout=timeout):
            fn()
    elif num_processes * num_machines == 1 and not max_restarts:
        fn()
    else:
        _check_pickles(fn)
        if num_machines > 1:
            assert rendezvous is not None
            _launch_elastic(fn, num_processes, num_machines, machine_rank, rendezvous, max_restarts, timeout)
        else:
            _launch_here(fn, num_processes, max_restarts, timeout)


def check_processes(
    num_processes: int, num_machines: int, machine_rank: int, rendezvous: str | None, max_restarts: int
) -> None:
    """Raise ValueError for numbers that `launch` can't do."""
    for name, value, low in (
        ("num_processes", num_processes, 1),
        ("num_machines", num_machines, 1),
        ("machine_rank", machine_rank, 0),
        ("max_restarts", max_restarts, 0),
    ):
        whole(name, value, low)
    if machine_rank >= num_machines:
        raise ValueError(f"machine_rank: got {machine_rank}, expected less than num_machines={num_machines}")
    if num_machines > 1 and not re.fullmatch(r".+:\d+", rendezvous or ""):
        raise ValueError(
            f'rendezvous: got {rendezvous!r}, expected "host:port" of the first of {num_machines} machines'
        )


@attrs.frozen
class Placed:
    """Which rank a process is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str | None  # of rank 0; None: in the environment, as torch reads it


def placed(environment: Mapping[str, str]) -> Placed | None:
    """Read which rank this process is, as torchrun or SLURM say it; None if neither started it.

    Example:
      >>> placed({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}).rank
      1
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local, many = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
        return Placed(rank, size, int(local), int(many), None)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun, not in the batch script around it
    if tasks == "1" or "SLURM_PROCID" not in environment:
        return None
    first = first_host(environment["SLURM_STEP_NODELIST"])
    port = environment.get("MASTER_PORT", 20000 + int(environment["SLURM_JOB_ID"]) % 10000)
    per_node = int(environment["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0].partition(",")[0])
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Placed(rank, int(tasks), local, per_node, f"{first}:{port}")


def first_host(hosts: str) -> str:
    """Return the first of SLURM's list of hosts.

    Example:
      >>> first_host("gpu[07-09,12],login"), first_host("a1,b2")
      ('gpu07', 'a1')
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST: got {hosts!r}, expected hosts")
    return "".join(part or "" for part in match.groups())


@contextmanager
def connected(place: Placed, *, timeout: timedelta, store: Any = None) -> Iterator[None]:
    """Join the process group as this rank, on a GPU of its own where there are enough, and leave it."""
    many = torch.cuda.device_count()
    on_gpu = many >= place.local_world_size
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    elif many and place.rank == 0:
        _log.warning(
            "this process sees %d GPUs for %d processes of its machine: they talk by way of the host (gloo), which is "
            "slow, and may share a GPU; let every process see all GPUs (SLURM: --gpus-per-node, no --gpus-per-task)",
            many,
            place.local_world_size,
        )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
    at: dict[str, Any] = {"store": store} if store is not None else {}
    if place.address is not None:
        at["init_method"] = f"tcp://{place.address}"
    if at:
        at |= {"rank": place.rank, "world_size": place.world_size}
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    several = place.world_size > place.local_world_size
    first = os.environ.get("MASTER_ADDR", "") if place.address is None else place.address.rpartition(":")[0]
    with gloo_through(first) if several else nullcontext():
        dist.init_process_group(backend, timeout=timeout, **at)
        try:
            yield
        except Exception:
            if not on_gpu:  # NCCL would wait for ranks that wait for this one
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _check_pickles(fn: Any) -> None:
    try:
        pickle.dumps(fn)
    except Exception as error:
        raise TypeError(
            f"fn: can't be sent to other processes: {error}; define it, and the functions of a recipe, at the top "
            "level of a module or the script, or start the ranks by torchrun"
        ) from error


# -------------------------------------------------------------------------------------------------------- one machine


@attrs.frozen
class Failure:
    """What a rank says when it raises."""

    rank: int
    when: float
    line: str
    text: str


def _launch_here(fn: Callable[[], object], num_processes: int, max_restarts: int, timeout: timedelta) -> None:
    for restarts in range(max_restarts + 1):
        try:
            return _Job(fn, num_processes, timeout).run()
        except LaunchError as error:
            if restarts == max_restarts:
                raise
            _log.warning("%s\nthe job is started again, for the %d. time of %d", error, restarts + 1, max_restarts)
    return None


class _Job:
    """The ranks of one machine, started from here, and what becomes of them."""

    def __init__(self, fn: Callable[[], object], num_processes: int, timeout: timedelta) -> None:
        self.fn = fn
        self.num_processes = num_processes
        self.timeout = timeout
        self.context = _forkserver()
        self.signal = self.context.Value("i", 0, lock=False)  # the number of the one that came; the ranks look at it
        self.signals = 0
        self.processes: list[Any] = []
        self.pipes: dict[int, Connection] = {}
        self.begun: set[int] = set()
        self.failures: list[Failure] = []
        self.ended_here: set[int] = set()  # by us, when another had failed

    def run(self) -> None:
        store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        with _heeding_signals(self.handle):
            try:
                for rank in range(self.num_processes):
                    here, there = self.context.Pipe(duplex=False)
                    place = Placed(rank, self.num_processes, rank, self.num_processes, None)
                    arguments = (self.fn, place, self.timeout, store.port, there, self.signal, dict(os.environ))
                    process = self.context.Process(target=_rank, args=arguments, name=f"rank {rank}", daemon=False)
                    process.start()
                    there.close()
                    self.processes.append(process)
                    self.pipes[rank] = here
                self.watch()
            finally:
                self.end()
        self.report()

    def handle(self, number: int, _frame: Any) -> None:
        self.signals += 1
        self.signal.value = number

    @property
    def running(self) -> list[Any]:
        return [process for process in self.processes if process.exitcode is None]

    def watch(self) -> None:
        """Wait until all have ended, or one has failed."""
        while self.running and self.signals < 2:
            self.hear(0.2)
            if any(not _fine(process.exitcode) for process in self.processes if process.exitcode is not None):
                return

    def hear(self, seconds: float) -> None:
        """Wait for a rank to say something or end; what it says may be more than a pipe holds."""
        if waited := [*(process.sentinel for process in self.running), *self.pipes.values()]:
            wait(waited, timeout=seconds)  # for nothing it would wait all the same, if the last has ended just now
        for rank, pipe in list(self.pipes.items()):
            try:
                while pipe.poll():
                    said = pipe.recv()
                    self.begun.add(rank)
                    self.failures += [said] if said is not None else []
            except (EOFError, OSError):  # it has ended
                self.pipes.pop(rank).close()

    def end(self) -> None:
        """End those that still run: by SIGTERM, then by SIGKILL."""
        failed = any(process.exitcode not in (None, 0) for process in self.processes)
        self.join(GRACE / 4 if failed and self.signals < 2 else 0.0)  # they fail by themselves
        for stop, seconds in (("terminate", GRACE), ("kill", 10.0)):
            if stop == "kill" or self.signals < 2:
                for process in self.running:
                    self.ended_here.add(self.processes.index(process))
                    getattr(process, stop)()
                self.join(seconds)
        for process in self.running:
            _log.warning("%s (pid %d) has not ended 10 s after SIGKILL: left behind", process.name, process.pid)
        self.hear(0.0)
        for pipe in self.pipes.values():
            pipe.close()

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running and (left := deadline - time.monotonic()) > 0:
            self.hear(left)

    def report(self) -> None:
        """Raise what the job came to, if not to its end."""
        codes = [process.exitcode for process in self.processes]
        told = {failure.rank: failure for failure in self.failures}
        # The others fail because one did. A rank that was killed can't say so, and was first.
        ended = [rank for rank, code in enumerate(codes) if not _fine(code)]
        silent = [rank for rank in ended if rank not in told and rank not in self.ended_here]
        number = self.signal.value
        if self.signals > 1 or (self.signals and (not ended or any(codes[rank] == -number for rank in silent))):
            raise SystemExit(128 + number)
        if silent:
            raise LaunchError(
                f"rank {silent[0]} of {len(codes)} {_how(codes[silent[0]], silent[0] in self.begun)}"
                + "".join(f"\nrank {one.rank} then said: {one.line}" for one in told.values())
            )
        if told:
            first = min(told.values(), key=lambda failure: failure.when)
            others = [rank for rank in ended if rank != first.rank]
            ended_too = f"\nranks {others} were ended, or failed after it" if others else ""
            raise LaunchError(f"rank {first.rank} of {len(codes)} failed:\n{first.text.rstrip()}{ended_too}")
        if leaving := [code for code in codes if code]:
            raise SystemExit(leaving[0])


def _forkserver() -> Any:
    """Ranks are forked from one process that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@contextmanager
def _heeding_signals(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Python has signals in the main thread only; launched from another, a job gets none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _fine(code: int | None) -> bool:
    """Whether a rank has ended as it should: done, or stopped by a signal after it had saved."""
    return code == 0 or (code is not None and code > 128)


def _how(code: int | None, begun: bool) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if begun:
        return f"ended with status {code} without a word"
    return (
        f"ended with status {code} before it began: its error is above; ranks import the script, which must call "
        'launch under `if __name__ == "__main__":`'
    )


def _rank(
    fn: Callable[[], object],
    place: Placed,
    timeout: timedelta,
    port: int,
    pipe: Connection,
    asked: Any,
    environment: Mapping[str, str],
) -> None:
    """The main function of a rank's process."""
    pipe.send(None)
    _end_with_parent()
    _heed(asked)
    os.environ.clear()  # it has that of the first launch
    os.environ.update(environment, LOCAL_RANK=str(place.local_rank), LOCAL_WORLD_SIZE=str(place.local_world_size))
    with _telling(pipe, place.rank):
        store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
        # What fn raises is told before the connection is closed, which makes the others fail.
        with connected(place, timeout=timeout, store=store), _telling(pipe, place.rank):
            fn()


@contextmanager
def _telling(pipe: Connection, rank: int) -> Iterator[None]:
    """Tell the launcher of an error and end at once: what Python does in the end may wait for ranks that wait too."""
    try:
        yield
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            raise
        line = text = str(leaving.code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BaseException as error:
        line, text = traceback.format_exception_only(error)[0].rstrip(), traceback.format_exc()
    else:
        return
    with suppress(OSError):
        pipe.send(Failure(rank, time.time(), line, text))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _heed(asked: Any) -> None:
    """In a rank: give this process the signal that the launcher got, unless it has got that itself."""
    from fntrain.hooks.signal import arrived

    def watch() -> None:
        while not (number := asked.value):
            time.sleep(0.1)
        time.sleep(0.3)
        if number not in arrived:
            os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def _end_with_parent() -> None:
    """In a rank: end at once if the process that launched it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------------- several machines


def _launch_elastic(
    fn: Callable[[], object],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    rendezvous: str,
    max_restarts: int,
    timeout: timedelta,
) -> None:
    """By torch's elastic agent: it starts the ranks of this machine, and all of them again when one has failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    asked = _forkserver().Value("i", 0, lock=False)
    # With the agents' store shared, torch 2.13 tells a machine that comes back no address, and all wait for ever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    def handle(number: int, _frame: Any) -> None:
        if asked.value or not multiprocessing.active_children():
            raise SystemExit(128 + number)
        asked.value = number

    host = rendezvous.rpartition(":")[0]
    config = LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id=f"fntrain-{rendezvous}",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous,
        rdzv_configs={"is_host": machine_rank == 0},
        local_addr=host if machine_rank == 0 else own_address(host),  # its name may mean another to the others
        max_restarts=max_restarts,
        monitor_interval=0.2,
        start_method="forkserver",
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are handled here: the agent passes on what ranks have got
    )
    with _heeding_signals(handle):
        try:
            statuses = elastic_launch(config, _elastic_rank)(fn, timeout, asked)
        except ChildFailedError as error:
            if asked.value:
                raise SystemExit(128 + asked.value) from error
            rank, failure = error.get_first_failure()
            raise LaunchError(f"rank {rank} failed, {max_restarts} restarts done:\n{failure.message}") from error
        except RendezvousConnectionError as error:
            raise LaunchError(f"the connection to machine 0 ({rendezvous}) is lost, or never came about") from error
    if leaving := [status for status in statuses.values() if status]:
        raise SystemExit(leaving[0])


def _elastic_rank(fn: Callable[[], object], timeout: timedelta, asked: Any) -> int:
    """Run it as a rank; returns its status after a signal, which is not to be started again."""
    from torch.distributed.elastic.multiprocessing.errors import record

    _end_with_parent()
    _heed(asked)

    @record
    def run() -> None:
        place = placed(os.environ)
        assert place is not None
        with connected(place, timeout=timeout):
            fn()

    try:
        run()
    except SystemExit as leaving:
        code = 0 if leaving.code is None else leaving.code
        if not isinstance(code, int) or not _fine(code):
            raise
        return code
    return 0
