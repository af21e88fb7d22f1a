"""By which address and interface a machine is reached."""

import os
import sys

import pytest

from fntrain.shell.launching import network


def test_the_address_is_that_on_the_way_to_the_other():
    """No name is asked for what it means; a host that is not there has no way to it."""
    assert network.own_address("127.0.0.1") == "127.0.0.1"
    assert network.own_address("no-such-host.invalid") is None
    assert network.interface("no-such-host.invalid") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="interfaces are named on Linux")
def test_a_name_that_means_loopback_here_means_another_to_others(monkeypatch):
    """Debian gives a machine's own name 127.0.1.1: gloo would tell the other machines that; the way out is taken."""
    assert network.interface("127.0.0.1") == "lo"
    ways = {"first": "127.0.1.1", "192.0.2.1": "127.0.0.1"}
    monkeypatch.setattr(network, "own_address", ways.get)
    assert network.interface("first") == "lo"  # of the address that is the way out here
    ways["192.0.2.1"] = None
    assert network.interface("first") is None


def test_gloo_is_told_while_it_is_needed(monkeypatch):
    """What the user says counts; what was set is taken back."""
    monkeypatch.setattr(network, "interface", lambda host: f"to {host}")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with network.gloo_through("first"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "to first"
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    with network.gloo_through("first"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
