"""Published ports: from outside, the host, other tenants and the tenant itself, with the true source address."""

import socket
import subprocess
import time
from typing import Any

import pytest

from isochamber.errors import IsochamberError
from isochamber.net import preflight
from isochamber.spec import network
from tests.net import world as w
from tests.net.world import World


def _outside(world: World, address: str, port: int, probe: str = "tcp", wait: float = w.DEADLINE) -> str:
    return str(w.run_in(world.outside, None, lambda: w.PROBES[probe](address, port, wait=wait)))


def test_a_published_port_is_reached_from_outside_and_sees_the_true_source(world: World) -> None:
    world.tenant("a", ports=["8080:7777/tcp", "8081:7777/udp"])
    world.apply()
    world.serve("a")
    assert _outside(world, w.HOST4, 8080) == f"a {w.OUTSIDE4}"
    assert _outside(world, w.HOST6, 8080) == f"a {w.OUTSIDE6}"
    assert _outside(world, w.HOST4, 8081, "udp") == f"a {w.OUTSIDE4}"
    assert _outside(world, w.HOST6, 8081, "udp") == f"a {w.OUTSIDE6}"
    assert w.tcp(w.HOST4, 8080).split()[0] == "a"  # the host's own programs
    # Not what was not published, nor by the tenant's own address.
    assert _outside(world, w.HOST4, 8082, wait=w.SILENCE) == "ECONNREFUSED"
    assert _outside(world, w.HOST4, 8080, "udp", wait=w.SILENCE) == "ECONNREFUSED"
    w.ip("route", "add", "10.77.0.0/16", "via", w.HOST4, namespace=world.outside)
    assert _outside(world, str(world.member("a").ipv4), 7777, wait=w.SILENCE) == "silence"
    # Taken back, it is closed.
    world.tenant("a")
    world.apply()
    assert _outside(world, w.HOST4, 8080, wait=w.SILENCE) == "ECONNREFUSED"
    assert world.differences() == {}


def test_hairpin_by_a_published_port_is_for_whom_egress_grants_the_hosts_address(world: World) -> None:
    world.tenant("a", ports=["8080:7777"], egress="all")
    world.tenant("open", egress="all")
    world.tenant("listed", egress=[f"{w.HOST4}:8080", f"[{w.HOST6}]:8080"])
    world.tenant("closed")
    world.apply()
    world.serve("a")
    for address, version in ((w.HOST4, "ipv4"), (w.HOST6, "ipv6")):
        for name in ("open", "listed"):
            source = world.entries[name]["net"][version]
            assert _tcp(world, name, address, 8080) == f"a {source}"
        assert _tcp(world, "a", address, 8080).split()[0] == "a"
        got = _tcp(world, "closed", address, 8080, wait=w.SILENCE)
        assert got in ("EHOSTUNREACH", "EACCES", "silence", "ENETUNREACH")
        # What the host has itself stays closed, for all of them.
        for name in ("a", "open", "listed"):
            got = _tcp(world, name, address, w.PORT, wait=w.SILENCE)
            assert got in ("EHOSTUNREACH", "EACCES", "silence", "ENETUNREACH")


def _without_the_route() -> int:
    return subprocess.run(["ip", "route", "del", "unreachable", "127.0.0.0/8"], check=True).returncode


def _tcp(world: World, name: str, address: str, port: int, **options: Any) -> str:
    return str(world.inside(name, lambda: w.tcp(address, port, **options)))


def test_a_port_on_127_0_0_1_is_the_hosts_alone_and_opens_no_way_to_its_loopback(world: World) -> None:
    world.tenant("a", ports=["127.0.0.1:5353:7777/tcp", "127.0.0.1:5353:7777/udp"], egress="all")
    world.tenant("b", egress="all")
    world.apply()
    world.serve("a")
    bridge = world.entries["a"]["net"]["bridge"]
    localnet = f"/proc/sys/net/ipv4/conf/{bridge}/route_localnet"
    with open(localnet) as file:
        assert file.read() == "1\n"
    assert w.tcp("127.0.0.1", 5353).split()[0] == "a"
    assert w.udp("127.0.0.1", 5353).split()[0] == "a"
    assert _outside(world, w.HOST4, 5353, wait=w.SILENCE) == "ECONNREFUSED"
    for name in ("a", "b"):
        for port in (5353, w.PORT):
            got = _tcp(world, name, "127.0.0.1", port, wait=w.SILENCE, device="eth0")
            assert got in ("EHOSTUNREACH", "ENETUNREACH", "EINVAL", "EACCES", "silence"), got
    # The route in the tenant's own namespace is not the only thing that closes it; judged by what the host got.
    came = ("host", str(world.member("b").ipv4))
    assert world.inside("b", _without_the_route, powers=True) == 0
    world.inside("b", lambda: w.udp("127.0.0.1", wait=w.SILENCE, device="eth0"))
    w.nft("delete", "table", "bridge", w.site_of(world).table)
    w.open_the_door(world, "b")
    world.inside("b", lambda: w.udp("127.0.0.1", wait=w.SILENCE, device="eth0"))
    assert came not in world.servers.seen
    # The control: all three guards gone, and a datagram arrives. (An answer from 127.0.0.1 the tenant's kernel drops.)
    w.nft("flush", "ruleset")
    deadline = time.monotonic() + w.DEADLINE
    while came not in world.servers.seen and time.monotonic() < deadline:
        world.inside("b", lambda: w.udp("127.0.0.1", wait=w.SILENCE, device="eth0"))
    assert came in world.servers.seen
    # And it is closed again when nobody publishes there.
    world.tenant("a", egress="all")
    world.apply()
    with open(localnet) as file:
        assert file.read() == "0\n"


def test_a_port_that_another_program_has_is_one_line_and_nothing_is_changed(world: World) -> None:
    grant, _ = network.parse({"ports": ["8080:80/tcp"]})
    preflight.check("a", grant)
    with socket.socket() as taken:
        taken.bind((w.HOST4, 8080))
        taken.listen()
        with pytest.raises(IsochamberError, match="the port 8080/tcp is taken on this host by another program"):
            preflight.check("a", grant)
        preflight.check("a", network.parse({"ports": ["8080:80/udp"]})[0])
    with pytest.raises(IsochamberError, match=r"203\.0\.113\.77 is no address of this host"):
        preflight.check("a", network.parse({"ports": ["203.0.113.77:8080:80"]})[0])
