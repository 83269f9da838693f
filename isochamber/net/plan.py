"""containers.json -> what the kernel is to hold: frozen dataclasses, decided without looking at any kernel.

One :class:`Member` a tenant with ``network: bridge``, and the :class:`Site` they share:
one bridge a state directory.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from isochamber.build.network import mac
from isochamber.errors import IsochamberError
from isochamber.spec.model import Allowance, Egress, Port, Rate

MAX_PORTS = 1023  # of one bridge: BR_PORT_BITS in the kernel's br_private.h


@dataclass(frozen=True, slots=True)
class Site:
    """What all tenants of a state directory share."""

    bridge: str
    mac: str  # of the bridge
    door: str  # what tenants send to: nobody's, until our rules let a frame through to the bridge
    gateway4: ipaddress.IPv4Interface
    gateway6: ipaddress.IPv6Interface

    @property
    def table(self) -> str:
        """The name of our nftables tables, one in each of the families inet and bridge."""
        return f"isochamber-{self.bridge[2:]}"

    @property
    def ports(self) -> str:
        """What the names of all the bridge's ports begin with."""
        return f"{self.bridge}-"


@dataclass(frozen=True, slots=True)
class Member:
    """One tenant's part: the host's end of its veth is ``port``, its own is eth0."""

    tid: str
    name: str
    uid_base: int
    uid_count: int
    port: str
    mac: str
    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address
    ports: tuple[Port, ...]
    egress_all: bool
    egress_dns: bool
    egress: tuple[Egress, ...]
    dns: tuple[str, ...]
    peers: tuple["Peer", ...]  # those that agree, by name
    rate: Rate | None
    allowance: Allowance | None
    digest: str  # of the entry's net object

    @property
    def number(self) -> str:
        """What its chains, sets and objects are named after."""
        return self.port.rpartition("-")[2]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tenant that agreed to be talked to."""

    tid: str
    name: str
    ipv4: ipaddress.IPv4Address
    ipv6: ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole of a state directory's network."""

    site: Site | None  # None: no tenant has a network
    members: Mapping[str, Member]  # by tid


def make(entries: Iterable[Mapping[str, Any]]) -> Plan:
    """Return the plan of ``entries`` (of containers.json, or shaped like them); raises IsochamberError."""
    granted = [entry for entry in entries if entry.get("net") is not None]
    if not granted:
        return Plan(None, {})
    if len(granted) > MAX_PORTS:
        raise IsochamberError(
            f"{len(granted)} tenants have a network, a bridge of this kernel has {MAX_PORTS} ports",
            stage="net",
            hint="spread them over several state directories",
        )
    by_name = {entry["name"]: entry for entry in granted}
    try:
        return Plan(site(granted[0]["net"]), {entry["tid"]: _member(entry, by_name) for entry in granted})
    except (KeyError, TypeError, ValueError) as error:
        raise IsochamberError(
            f"net in containers.json is damaged: {error!r}", stage="net", hint="delete the file and run ./doit"
        ) from error


def around(entries: Mapping[str, Mapping[str, Any]], tid: str) -> list[Mapping[str, Any]]:
    """Return the entry of ``tid`` and those of its peers: what its own part depends on."""
    own = entries.get(tid)
    wanted = set() if own is None or own.get("net") is None else {own["name"], *own["net"]["peers"]}
    return [entry for entry in entries.values() if entry["name"] in wanted]


def site(net: Mapping[str, Any]) -> Site:
    """Return what one ``net`` object says of the shared part."""
    return Site(
        net["bridge"],
        net["gateway_mac"],
        mac(f"door {net['gateway_mac']}"),
        ipaddress.IPv4Interface(net["gateway4"]),
        ipaddress.IPv6Interface(net["gateway6"]),
    )


def _member(entry: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> Member:
    net = entry["net"]
    rate, allowance = net["rate"], net["allowance"]
    return Member(
        tid=entry["tid"],
        name=entry["name"],
        uid_base=entry["uid_base"],
        uid_count=entry["uid_count"],
        port=net["port"],
        mac=net["mac"],
        ipv4=ipaddress.IPv4Address(net["ipv4"]),
        ipv6=ipaddress.IPv6Address(net["ipv6"]),
        ports=tuple(Port(*port) for port in net["ports"]),
        egress_all=net["egress_all"],
        egress_dns=net["egress_dns"],
        egress=tuple(Egress(*rule) for rule in net["egress"]),
        dns=tuple(net["dns"]),
        peers=tuple(_peers(entry["name"], net["peers"], by_name)),
        rate=None if rate is None else Rate(rate["up"], rate["down"], rate["queue"]),
        allowance=None if allowance is None else Allowance(allowance["bytes"], allowance["per"], allowance["slow"]),
        digest=net["digest"],
    )


def _peers(name: str, wanted: Iterable[str], by_name: Mapping[str, Mapping[str, Any]]) -> Iterable[Peer]:
    for peer in sorted(wanted):
        other = by_name.get(peer)
        if other is not None and name in other["net"]["peers"]:
            net = other["net"]
            yield Peer(other["tid"], peer, ipaddress.IPv4Address(net["ipv4"]), ipaddress.IPv6Address(net["ipv6"]))
