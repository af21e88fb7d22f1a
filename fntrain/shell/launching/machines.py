"""The ranks of a job on several machines, started by torch's elastic agent, and which rank of all failed first.

Each machine has an agent. It starts the ranks of its machine, and starts all of them again when one has failed. Of a
failure it knows the time to the second only, and nothing of other machines. So each rank appends its failure to one
list, which machine 0 keeps.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch.distributed as dist

from fntrain.core.errors import LaunchError
from fntrain.shell.launching.failures import Failure, described, ended_well, first_failure, how_it_ended, reported
from fntrain.shell.launching.local import forkserver_context
from fntrain.shell.launching.network import own_address, process_group, rank_from_environment
from fntrain.shell.launching.signals import follow_launcher, handled_by

POLL_S = 0.2  # how often an agent looks at its ranks
REPORTS_S = 10.0  # how long a launcher waits for the others, whose ranks may not fail before their next collective
CONNECT_S = 10.0
MAX_TEXT = 1_000_000  # characters of a traceback: a message to a store has at most 8 MB


def launch_on_machines(
    fn: Callable[[], object],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    rendezvous: str,
    max_restarts: int,
    timeout: timedelta,
) -> None:
    """Run a function in processes of this machine that form a group with those of others; see `launch`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError
    from torch.distributed.launcher.api import elastic_launch

    integer = partial(forkserver_context().Value, "i", 0, lock=False)
    launcher = _Launcher(rendezvous, timeout, integer(), integer())
    config = _config(num_processes, num_machines, machine_rank, rendezvous, max_restarts)
    with handled_by(launcher.handle_signal):
        try:
            store = _store(rendezvous, is_host=True) if machine_rank == 0 else None
            statuses = elastic_launch(config, _run_rank)(fn, launcher)
        except (ChildFailedError, RendezvousClosedError) as error:  # closed: another machine has no restart left
            if number := launcher.signal_number.value:
                raise SystemExit(128 + number) from error
            own = _own_failures(getattr(error, "failures", {}), begun=bool(launcher.attempt.value))
            failures = _failures_of_all(launcher, store, own, num_machines)
            raise LaunchError(_message(failures, max_restarts)) from error
        except (RendezvousConnectionError, dist.DistNetworkError) as error:
            raise LaunchError(f"the connection to machine 0 ({rendezvous}) is lost, or never came about") from error
    if leaving := [status for status in statuses.values() if status]:
        raise SystemExit(leaving[0])


def _config(num_processes: int, num_machines: int, machine_rank: int, rendezvous: str, max_restarts: int) -> Any:
    """The agent's settings."""
    from torch.distributed.launcher.api import LaunchConfig

    # With the agents' store shared, torch 2.13 tells a machine that comes back no address, and all wait for ever.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    host = rendezvous.rpartition(":")[0]
    return LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id=f"fntrain-{rendezvous}",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous,
        rdzv_configs={"is_host": False},  # the launcher of machine 0 is the host: its store outlives its agent
        local_addr=host if machine_rank == 0 else own_address(host),  # a machine's name may mean loopback to others
        max_restarts=max_restarts,
        monitor_interval=POLL_S,
        start_method="forkserver",
        signals_to_handle="SIGHUP,SIGQUIT",  # not those handled here: ranks would get them twice
    )


def _store(rendezvous: str, *, is_host: bool = False) -> Any:
    """The store at which the machines meet: a new one if this machine is to keep it, else a connection to it."""
    host, _, port = rendezvous.rpartition(":")
    options = {"is_master": is_host, "wait_for_workers": False, "multi_tenant": True}
    return dist.TCPStore(host, int(port), timeout=timedelta(seconds=CONNECT_S), **options)  # type: ignore[attr-defined]


@attrs.frozen
class _Launcher:
    """What a rank gets from the process that launched it; the integers are in memory shared with that process."""

    rendezvous: str
    timeout: timedelta
    signal_number: Any  # of the signal that came, or 0
    attempt: Any  # the port at which the ranks of the current attempt meet: a new one for each, so it names the attempt

    def handle_signal(self, number: int, _frame: Any) -> None:
        if self.signal_number.value or not multiprocessing.active_children():
            raise SystemExit(128 + number)
        self.signal_number.value = number

    def failures(self, store: Any = None) -> "_Failures":
        """The list of failures of this attempt; raises DistError if machine 0 does not answer."""
        return _Failures(self.attempt.value, store if store is not None else _store(self.rendezvous))


class _Failures:
    """The failures of one attempt, of all machines, in the order in which ranks reported them.

    An append is atomic, and a rank appends before its connections close, so a rank that fails because of that appends
    later. The times of failures can't be compared: clocks of machines differ.
    """

    def __init__(self, attempt: int, store: Any) -> None:
        self.store: Any = dist.PrefixStore(f"fntrain/{attempt}", store)  # type: ignore[attr-defined]

    def append(self, failure: Failure) -> None:
        self.store.append("failures", json.dumps(attrs.asdict(failure)) + "\n")

    def read(self) -> list[Failure]:
        if not self.store.check(["failures"]):
            return []
        return [Failure(**json.loads(line)) for line in self.store.get("failures").decode().splitlines()]

    def wait_for_machines(self, event: str, num_machines: int) -> bool:
        """Count this machine as one that has come to an event, and wait a while until all have."""
        counted, deadline = self.store.add(event, 1), time.monotonic() + REPORTS_S
        while counted < num_machines and time.monotonic() < deadline:
            time.sleep(0.05)
            counted = self.store.add(event, 0)
        return bool(counted >= num_machines)


def _own_failures(failed: Mapping[int, Any], begun: bool) -> list[Failure]:
    """What the agent of this machine knows: the rank that failed first here, unless the agent itself ended it."""
    failures = []
    for rank, found in failed.items():
        text = str(found.message) if Path(found.error_file).is_file() else None  # written by _report
        line = how_it_ended(found.exitcode, begun) if text is None else text.rstrip().rpartition("\n")[2]
        failures.append(Failure(rank, found.timestamp, line, text))
    return failures


def _failures_of_all(launcher: _Launcher, store: Any, own: list[Failure], num_machines: int) -> list[Failure]:
    """The failures of all machines in their order; those of this machine alone if machine 0 does not answer."""
    try:
        shared = launcher.failures(store)
        known = {failure.rank for failure in shared.read()}
        for failure in own:
            if failure.rank not in known:
                shared.append(failure)
        complete = shared.wait_for_machines("reported", num_machines)
        failures = shared.read()
    except dist.DistError:
        return own
    with suppress(dist.DistError):  # the list is lost when the launcher of machine 0 ends: wait until all have read it
        if complete:
            shared.wait_for_machines("read", num_machines)
    return failures


def _message(failures: list[Failure], max_restarts: int) -> str:
    if not failures:
        return f"another machine ended the job, {max_restarts} restarts done"
    return described(*first_failure(failures), restarts=f", {max_restarts} restarts done")


def _run_rank(fn: Callable[[], object], launcher: _Launcher) -> int:
    """Run the function as a rank; return the status if a signal stopped it: that is no failure to start again for."""
    follow_launcher(launcher.signal_number)
    me = rank_from_environment(os.environ)
    assert me is not None
    launcher.attempt.value = int(os.environ["MASTER_PORT"])
    report = partial(_report, launcher)
    try:
        with reported(me.rank, report), process_group(me, timeout=launcher.timeout), reported(me.rank, report):
            fn()
    except SystemExit as leaving:
        if not ended_well(code := int(leaving.code or 0)):  # a text is a failure, which was reported
            raise
        return code
    return 0


def _report(launcher: _Launcher, failure: Failure) -> None:
    """In a rank: append its failure to the list of the job, and write it to the file that the agent reads."""
    failure = attrs.evolve(failure, text=(failure.text or "")[-MAX_TEXT:])
    content = {"message": failure.text, "timestamp": int(failure.when)}
    with suppress(OSError):
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
    with suppress(dist.DistError):
        launcher.failures().append(failure)
    # The agent reports the first of its ranks that it finds ended. If another rank was killed, and this one fails only
    # because it lost the connection, this one must end after the agent's next look, or it would be taken for the first.
    time.sleep(2.5 * POLL_S)
