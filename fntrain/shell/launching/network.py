"""Which rank a process is, and how it joins the others: by which address and interface they reach this machine.

A machine's own name often resolves to 127.0.1.1, an address by which every other machine reaches itself.
"""

import fcntl
import ipaddress
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist

_log = logging.getLogger("fntrain")
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_ANYWHERE = "192.0.2.1"  # reserved for examples by RFC 5737: nothing is sent there, only the route is looked up


@attrs.frozen
class ProcessRank:
    """Which rank a process is, in the job and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str | None = None  # "host:port" of rank 0; None if torch finds it in the environment, or in a store


def rank_from_environment(environment: Mapping[str, str]) -> ProcessRank | None:
    """Read which rank this process is from the variables of torchrun or SLURM; None if neither started it.

    Example:
      >>> torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
      >>> rank_from_environment(torchrun).rank
      1
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank, local_size = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
        return ProcessRank(rank, size, int(local_rank), int(local_size))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun, not in the batch script around it
    if tasks == "1" or "SLURM_PROCID" not in environment:
        return None
    first = first_host(environment["SLURM_STEP_NODELIST"])
    port = environment.get("MASTER_PORT", 20000 + int(environment["SLURM_JOB_ID"]) % 10000)
    per_node = int(environment["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0].partition(",")[0])
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return ProcessRank(rank, int(tasks), local, per_node, f"{first}:{port}")


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
def process_group(me: ProcessRank, *, timeout: timedelta, store: Any = None) -> Iterator[None]:
    """Join the process group as this rank, on a GPU of its own where there are enough, and leave it at the end."""
    on_gpu = _choose_gpu(me)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // me.local_world_size))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    first, init_method = os.environ.get("MASTER_ADDR", ""), None
    if me.address is not None:
        first, init_method = me.address.rpartition(":")[0], f"tcp://{me.address}"
    with gloo_through(first) if me.world_size > me.local_world_size else nullcontext():
        dist.init_process_group(backend, init_method, timeout, me.world_size, me.rank, store)
        try:
            yield
        except Exception:
            if not on_gpu:  # NCCL would wait for ranks that wait for this one
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _choose_gpu(me: ProcessRank) -> bool:
    """Give this rank a GPU by its number on the machine, if each of its ranks can have one."""
    found = torch.cuda.device_count()
    if found >= me.local_world_size:
        torch.cuda.set_device(me.local_rank)
        return True
    if found and me.rank == 0:
        _log.warning(
            "this process sees %d GPUs for %d processes of its machine: they talk by way of the host (gloo), which is "
            "slow, and may share a GPU; let every process see all GPUs (SLURM: --gpus-per-node, no --gpus-per-task)",
            found,
            me.local_world_size,
        )
    return False


def own_address(host: str) -> str | None:
    """Return the address from which this machine would send to another; sends nothing.

    Example:
      >>> own_address("127.0.0.1")
      '127.0.0.1'
    """
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface(host: str) -> str | None:
    """Return the name of the network interface through which another machine is reached; None if it is not found.

    If the other's name means the loopback here, as on the machine of that name, it is the one of the default route.

    Example:
      >>> interface("127.0.0.1") in ("lo", None)
      True
    """
    address = own_address(host)
    if address is not None and _is_loopback(address) and not _is_loopback(host):
        address = own_address(_ANYWHERE)
    if address is None or not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


@contextmanager
def gloo_through(host: str) -> Iterator[None]:
    """Let gloo use the interface through which a machine is reached, unless GLOO_SOCKET_IFNAME names another."""
    name = "GLOO_SOCKET_IFNAME"
    found = None if name in os.environ else interface(host)
    if found is not None:
        os.environ[name] = found
    try:
        yield
    finally:
        if found is not None:
            os.environ.pop(name, None)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
