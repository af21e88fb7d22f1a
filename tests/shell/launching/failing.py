"""One of two machines, of two ranks each, on which one job after another fails: python failing.py MACHINE PORT ...

There are as many jobs as ports. Says as JSON what each launch raised; the broken kind leaves out the list of failures
that all machines share.
"""

import json
import os
import signal
import sys
from functools import partial

import torch
import torch.distributed as dist

import fntrain as ft
from fntrain.shell.launching import machines
from fntrain.shell.launching.local import PRELOAD

JOBS = [(1, "raises"), (2, "is killed"), (3, "raises")]


def fail(rank, how):
    """One rank fails, and the others lose their connection to it."""
    if dist.get_rank() == rank:
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"of rank {rank}")
    dist.all_reduce(torch.ones(1))


def unreachable(launcher, store=None):
    raise dist.DistStoreError("left out")


if __name__ == "__main__":
    machine, *ports = sys.argv[1:]
    PRELOAD.remove("torch._dynamo")  # nothing is trained here, and its import takes longer than a job
    if "broken" in ports:
        ports.remove("broken")
        machines._Launcher.failures = unreachable
    for port, job in zip(ports, JOBS, strict=False):
        try:
            ft.shell.launch(
                partial(fail, *job), 2, num_machines=2, machine_rank=int(machine), rendezvous=f"127.0.0.1:{port}"
            )
        except ft.LaunchError as error:
            print("raised", json.dumps(str(error)), flush=True)
