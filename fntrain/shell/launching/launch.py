"""launch: run a function in several processes, of one machine or more, or where others have started them already."""

import os
import pickle
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fntrain.core.check import whole
from fntrain.shell.launching.local import launch_here
from fntrain.shell.launching.machines import launch_on_machines
from fntrain.shell.launching.network import process_group, rank_from_environment


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
      LaunchError: a rank failed; the message has the traceback of the one that failed first, of all machines.
      SystemExit: the ranks ended by a signal, with its status (128 + n).
    Example:
      >>> launch(lambda: print("alone"))
      alone

    Source: detectron2's launch; torch.distributed.elastic
    """
    check_processes(num_processes, num_machines, machine_rank, rendezvous, max_restarts)
    if dist.is_available() and dist.is_initialized():
        fn()
    elif (rank := rank_from_environment(os.environ)) is not None:
        with process_group(rank, timeout=timeout):
            fn()
    elif num_processes * num_machines == 1 and not max_restarts:
        fn()
    else:
        _check_pickles(fn)
        if num_machines > 1:
            assert rendezvous is not None
            launch_on_machines(fn, num_processes, num_machines, machine_rank, rendezvous, max_restarts, timeout)
        else:
            launch_here(fn, num_processes, max_restarts, timeout)


def check_processes(
    num_processes: int, num_machines: int, machine_rank: int, rendezvous: str | None, max_restarts: int
) -> None:
    """Raise ValueError for numbers that `launch` can't do."""
    whole("num_processes", num_processes, 1)
    whole("num_machines", num_machines, 1)
    whole("machine_rank", machine_rank, 0)
    whole("max_restarts", max_restarts, 0)
    if machine_rank >= num_machines:
        raise ValueError(f"machine_rank: got {machine_rank}, expected less than num_machines={num_machines}")
    if num_machines > 1 and not re.fullmatch(r".+:\d+", rendezvous or ""):
        raise ValueError(
            f'rendezvous: got {rendezvous!r}, expected "host:port" of the first of {num_machines} machines'
        )


def _check_pickles(fn: Any) -> None:
    try:
        pickle.dumps(fn)
    except Exception as error:
        raise TypeError(
            f"fn: can't be sent to other processes: {error}; define it, and the functions of a recipe, at the top "
            "level of a module or the script, or start the ranks by torchrun"
        ) from error
