"""By which address and network interface this machine is reached from others: its own name often means 127.0.1.1."""

import fcntl
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_ANYWHERE = "192.0.2.1"  # kept for examples by RFC 5737: what is asked is only which way there


def own_address(host: str) -> str | None:
    """Return the address that this machine has on the way to another; sends nothing.

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
    """Return the name of the network interface to another machine, itself one of several; None if it is not found.

    Where the other's name means this machine's loopback, as on the machine of that name, it is that to anywhere.

    Example:
      >>> interface("127.0.0.1") in ("lo", None)
      True
    """
    address = own_address(host)
    if address is not None and _loops(address) and not _loops(host):
        address = own_address(_ANYWHERE)
    if address is None or not sys.platform.startswith("linux"):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


@contextmanager
def gloo_through(host: str) -> Iterator[None]:
    """Let gloo talk through the interface to a machine, unless GLOO_SOCKET_IFNAME says through which."""
    name = "GLOO_SOCKET_IFNAME"
    found = None if name in os.environ else interface(host)
    if found is not None:
        os.environ[name] = found
    try:
        yield
    finally:
        if found is not None:
            os.environ.pop(name, None)


def _loops(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
