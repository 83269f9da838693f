"""The ``network:`` of a tenant: a text or a mapping, read into frozen dataclasses, every mistake with its place.

Pure: nothing is looked up and nothing is resolved here. Rates are bits a second,
sizes bytes, ports 1 to 65535.
"""

import contextlib
import ipaddress
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from isochamber.errors import printable
from isochamber.spec.model import Allowance, Egress, Network, Port, Rate, Subnets

MODES = ("none", "bridge", "host")
QUEUES = ("fq_codel", "fq", "sfq", "fifo")
PERIODS = ("day", "month")
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy")  # of an environment, in either case

Path = tuple[object, ...]
Problem = tuple[Path, str]  # below the value that was read, and "what, what is allowed"

_RATE = re.compile(r"([0-9]{1,9})(bit|kbit|mbit|gbit)")
_RATE_FACTOR = {"bit": 1, "kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
_SLOWEST, _FASTEST = 8_000, 100_000_000_000
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_PORT = re.compile(
    r"(?:(?P<address>\[[^\]]*\]|[^:\[\]/]*):)?(?P<host>[0-9]{1,5}):(?P<inside>[0-9]{1,5})(?:/(?P<protocol>\w+))?"
)
_EGRESS = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\](?:/[0-9]{1,3})?|[^\[\]:/\s]+(?:/[0-9]{1,2})?)"
    r"(?::(?P<low>[0-9]{1,5})(?:-(?P<high>[0-9]{1,5}))?)?(?:/(?P<protocol>[a-z]+))?"
)
_PROTOCOLS = ("tcp", "udp", "icmp", "any")
_SMALLEST_SUBNET4, _SMALLEST_SUBNET6 = 16, 64


class _WrongError(ValueError):
    """What is wrong with one text, and what is allowed."""


def parse_rate(text: object) -> int:
    """Return bits a second for a text such as 256kbit; raises ValueError."""
    match = _RATE.fullmatch(text) if isinstance(text, str) else None
    rate = int(match[1]) * _RATE_FACTOR[match[2]] if match else 0
    if not _SLOWEST <= rate <= _FASTEST:
        raise _WrongError("is no rate, must be 8kbit to 100gbit, such as 256kbit or 2mbit")
    return rate


def parse_port(text: object) -> Port:
    """Return ``[ADDRESS:]HOST:INSIDE[/tcp|udp]``; raises ValueError."""
    match = _PORT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise _WrongError("is no published port, must be [ADDRESS:]HOST:INSIDE[/tcp|/udp], such as 8080:80/tcp")
    numbers = int(match["host"]), int(match["inside"])
    if not all(1 <= number <= 65535 for number in numbers):
        raise _WrongError("is no published port, ports are 1 to 65535")
    protocol = match["protocol"] or "tcp"
    if protocol not in ("tcp", "udp"):
        raise _WrongError(f"{printable(protocol)} is no protocol to publish, allowed: tcp, udp")
    return Port(_host_address(match["address"]), *numbers, protocol)


def _host_address(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        address = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        raise _WrongError(f"{printable(text)} is no address of the host") from None
    if address.is_unspecified:
        return None
    if address.is_multicast or (address.version == 6 and address.is_loopback):
        raise _WrongError(f"{address} can't be published on, allowed: an address of the host, 127.0.0.1")
    return str(address)


def parse_egress(text: object) -> Egress:
    """Return ``HOST[:PORT[-PORT]][/PROTOCOL]``; HOST is a name, an address, a CIDR block. Raises ValueError."""
    match = _EGRESS.fullmatch(text.lower()) if isinstance(text, str) else None
    if match is None:
        raise _WrongError(
            "is no egress rule, must be HOST[:PORT[-PORT]][/PROTOCOL], such as example.org:443 or 10.0.0.0/8:5432/tcp"
        )
    host, is_name = _egress_host(match["host"])
    low = int(match["low"]) if match["low"] else 0
    high = int(match["high"]) if match["high"] else (low or 65535)
    if (match["low"] and low == 0) or not low <= high <= 65535:
        raise _WrongError("is no egress rule, ports are 1 to 65535, the lower one first")
    protocol = match["protocol"] or ("tcp" if match["low"] else "any")
    if protocol not in _PROTOCOLS:
        raise _WrongError(f"{printable(protocol)} is no protocol, allowed: {', '.join(_PROTOCOLS)}")
    if protocol in ("icmp", "any") and match["low"]:
        raise _WrongError(f"{protocol} has no ports")
    return Egress(host, is_name, low, high, protocol)


def _egress_host(text: str) -> tuple[str, bool]:
    bare = text.replace("[", "").replace("]", "")
    try:
        return str(ipaddress.ip_network(bare)), False
    except ValueError as error:
        if "/" in bare or ":" in bare or re.fullmatch(r"[0-9.]+", bare):
            what = "has host bits set" if "host bits" in str(error) else "is no CIDR block"
            raise _WrongError(f"{printable(bare)} {what}, such as 10.0.0.0/8") from None
    if not _HOST_NAME.fullmatch(bare):
        raise _WrongError(f"{printable(bare)} is no host name")
    return bare, True


def parse_then(text: object) -> int | None:
    """Return the rate of ``slow RATE``, or None for ``cut``; raises ValueError."""
    if text == "cut":
        return None
    if isinstance(text, str) and text.startswith("slow "):
        return parse_rate(text.removeprefix("slow ").strip())
    raise _WrongError("must be cut, or slow and a rate, such as slow 32kbit")


def parse_address(text: object) -> str:
    """Return a resolver's address; raises ValueError."""
    try:
        address = ipaddress.ip_address(text) if isinstance(text, str) else None
    except ValueError:
        address = None
    if (
        address is None
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
    ):
        raise _WrongError("is no resolver a tenant can reach, must be an IPv4 or IPv6 address, not of the loopback")
    return str(address)


def parse(value: Any) -> tuple[Network, list[Problem]]:
    """Return the network that ``value`` (a mode, or a mapping the schema has accepted) asks for, and what is wrong."""
    if not isinstance(value, Mapping):
        return Network(mode=value), []
    return _Reader(value).read()


class _Reader:
    """One mapping, and its problems so far."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self._value = value
        self._problems: list[Problem] = []

    def read(self) -> tuple[Network, list[Problem]]:
        value = self._value
        mode = value.get("mode", "bridge")
        if mode != "bridge":
            self._problems += [((key,), f"{key} needs mode: bridge") for key in value if key != "mode"]
        ports = tuple(self._each("ports", parse_port))
        for index, port in enumerate(ports):
            if any(port.overlaps(other) for other in ports[:index]):
                self._problems.append((("ports", index), f"the port {port.host}/{port.protocol} is published twice"))
        network = Network(
            mode=mode,
            ports=ports,
            egress_all=value.get("egress") == "all",
            egress_dns=self._is_list() and "dns" in value["egress"],
            egress=tuple(self._egress()),
            dns=tuple(self._each("dns", parse_address)),
            peers=tuple(dict.fromkeys(value.get("peers", ()))),
            rate=self._rate(value.get("rate")),
            allowance=self._allowance(value.get("allowance")),
        )
        return network, self._problems

    def _try(self, path: Path, function: Any, text: object) -> Any:
        try:
            return function(text)
        except _WrongError as error:
            self._problems.append((path, f"{printable(text)}: {error}"))
            return None

    def _each(self, key: str, function: Any) -> Iterator[Any]:
        for index, text in enumerate(self._value.get(key, ())):
            parsed = self._try((key, index), function, text)
            if parsed is not None:
                yield parsed

    def _is_list(self) -> bool:
        return isinstance(self._value.get("egress"), list)

    def _egress(self) -> Iterator[Egress]:
        if not self._is_list():
            if self._value.get("egress", "none") not in ("all", "none"):
                self._problems.append((("egress",), "egress: must be all, none, or a list of rules"))
            return
        for index, text in enumerate(self._value["egress"]):
            if text != "dns":
                parsed = self._try(("egress", index), parse_egress, text)
                if parsed is not None:
                    yield parsed

    def _rate(self, value: Mapping[str, Any] | None) -> Rate | None:
        if value is None:
            return None
        up, down = (
            self._try(("rate", key), parse_rate, value[key]) if key in value else None for key in ("up", "down")
        )
        queue = value.get("queue")
        if queue is not None and queue not in QUEUES:
            self._problems.append(
                (("rate", "queue"), f"queue: {printable(queue)} is no discipline, allowed: {', '.join(QUEUES)}")
            )
        return Rate(up, down, queue)

    def _allowance(self, value: Mapping[str, Any] | None) -> Allowance | None:
        from isochamber.spec.validate import parse_size  # noqa: PLC0415 - validate imports this module

        if value is None:
            return None
        if "bytes" not in value:
            self._problems.append((("allowance",), "the key bytes is missing"))
        slow = self._try(("allowance", "then"), parse_then, value.get("then", "cut"))
        return Allowance(parse_size(value.get("bytes", 1)) or 1, value.get("per", "month"), slow)


def between(everyone: Mapping[str, Network]) -> tuple[list[Problem], list[str]]:
    """Return what is wrong between tenants (paths begin with a name), and warnings."""
    problems = list(_overlaps(everyone))
    warnings = []
    for name, network in everyone.items():
        for index, peer in enumerate(network.peers):
            if peer == name or peer not in everyone:
                problems.append(
                    ((name, "network", "peers", index), f"peers: there is no other tenant {printable(peer)}")
                )
            elif name not in everyone[peer].peers:
                warnings.append(f"{name}: peers: {peer} does not name it, so nothing passes between the two")
    return problems, warnings


def _overlaps(everyone: Mapping[str, Network]) -> Iterator[Problem]:
    published: dict[tuple[int, str], list[tuple[str, Port]]] = {}
    for name, network in everyone.items():
        for index, port in enumerate(network.ports):
            others = published.setdefault((port.host, port.protocol), [])
            for other, theirs in others:
                if other != name and port.overlaps(theirs):
                    what = f"the port {port.host}/{port.protocol} of the host is published by {printable(other)} too"
                    yield (name, "network", "ports", index), what
                    break
            others.append((name, port))


def is_on_loopback(url: str) -> bool:
    """Say whether a proxy or mirror, with or without a scheme, names the host's own loopback."""
    try:
        host = urllib.parse.urlsplit(url if "://" in url else f"//{url}").hostname or ""
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def parse_subnets(value: Mapping[str, Any]) -> tuple[Subnets, list[Problem]]:
    """Return the blocks that ``subnets:`` names, and what is wrong."""
    problems: list[Problem] = []
    found: dict[str, str | None] = {"ipv4": None, "ipv6": None}
    for key, kind, longest in (
        ("ipv4", ipaddress.IPv4Network, _SMALLEST_SUBNET4),
        ("ipv6", ipaddress.IPv6Network, _SMALLEST_SUBNET6),
    ):
        if key not in value:
            continue
        try:
            block = kind(value[key])
        except ValueError:
            problems.append(((key,), f"{printable(value[key])} is no {key} CIDR block"))
            continue
        if block.prefixlen > longest or not block.is_private or block.is_link_local or block.is_loopback:
            problems.append(((key,), f"{block} is no private block of at least /{longest}"))
        found[key] = str(block)
    return Subnets(found["ipv4"], found["ipv6"]), problems
