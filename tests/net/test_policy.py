"""Every cell of the policy: who reaches whom, by TCP, UDP and ICMP, over IPv4 and IPv6, tested by connecting."""

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.net import world as w
from tests.net.world import World

# tenant -> its grant
GRANTS: dict[str, dict[str, Any]] = {
    "open": {"egress": "all", "peers": ["friend", "onesided"]},
    "friend": {"peers": ["open"]},
    "onesided": {},
    "listed": {"egress": [f"{w.OUTSIDE4}:{w.PORT}/tcp", f"{w.OUTSIDE4}:{w.PORT}/udp", f"{w.OUTSIDE4}/icmp",
                          f"[{w.OUTSIDE6}]:{w.PORT}/tcp", f"[{w.OUTSIDE6}]:{w.PORT}/udp", f"[{w.OUTSIDE6}]/icmp"]},
    "closed": {},
}  # fmt: skip

TARGETS = ("itself", "host", "gateway", "host loopback", "friend", "onesided", "outside", "elsewhere", "metadata")

# tenant -> what it reaches; everything else is refused
REACHES = {
    "open": {"itself", "friend", "outside", "elsewhere"},
    "friend": {"itself"},
    "onesided": {"itself"},
    "listed": {"itself", "outside"},
    "closed": {"itself"},
}


@pytest.fixture(scope="module")
def built(outer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with w.fresh_host(tmp_path_factory.mktemp("policy") / "state") as made:
        for name, grant in GRANTS.items():
            made.tenant(name, **grant)
        made.apply()
        for name in GRANTS:
            made.serve(name)
        yield made


def _address(built: World, tenant: str, target: str, version: int) -> tuple[str, str | None]:
    """Return the target's address, and the device to be bound to: a tenant may try to leave by eth0."""
    four = version == 4
    site = built.entries["open"]["net"]
    if target in ("itself", "friend", "onesided"):
        net = built.entries[tenant if target == "itself" else target]["net"]
        return net[f"ipv{version}"], None
    return {
        "host": (w.HOST4 if four else w.HOST6, None),
        "gateway": (site[f"gateway{version}"].split("/")[0], None),
        "host loopback": ("127.0.0.1" if four else "::1", "eth0"),
        "outside": (w.OUTSIDE4 if four else w.OUTSIDE6, None),
        "elsewhere": (w.ELSEWHERE4 if four else w.ELSEWHERE6, None),
        "metadata": (w.METADATA4 if four else w.METADATA6, None),
    }[target]


def _probe_all(built: World, tenant: str, address: str, wait: float, device: str | None) -> dict[str, str]:
    probes = w.PROBES.items()
    got = built.inside(tenant, lambda: {kind: probe(address, wait=wait, device=device) for kind, probe in probes})
    return dict(got)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tenant", GRANTS)
def test_a_tenant_reaches_what_it_was_granted_and_nothing_else(
    built: World, tenant: str, target: str, version: int
) -> None:
    address, device = _address(built, tenant, target, version)
    granted = target in REACHES[tenant] or target == tenant
    wait = w.DEADLINE if granted else w.SILENCE
    got = _probe_all(built, tenant, address, wait, device)
    if granted:
        assert got["icmp"] == "pong", got
        assert got["tcp"].split()[0] == got["udp"].split()[0] != "", got
        assert got["tcp"].split()[0] == (tenant if target == "itself" else target), got
    else:
        blocked = {
            "silence",
            "EACCES",
            "EHOSTUNREACH",
            "ENETUNREACH",
            "ECONNREFUSED",
            "EPERM",
            "EINVAL",
            "EADDRNOTAVAIL",
        }
        assert set(got.values()) <= blocked, got
        if target == "host loopback":
            assert "host" not in {name for name, peer in built.servers.seen if peer.startswith("10.77.")}


def _crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def _sctp_init(token: bytes) -> bytes:
    chunk = struct.pack(">BBH4sIHH4s", 1, 0, 20, token, 65536, 1, 1, token)
    ports = struct.pack(">HHI", 5555, w.PORT, 0)
    return ports + struct.pack("<I", _crc32c(ports + bytes(4) + chunk)) + chunk


OTHERS = {"SCTP": (132, _sctp_init), "GRE": (47, lambda token: struct.pack(">HH", 0, 0x0800) + token)}


@pytest.mark.parametrize("protocol", OTHERS)
def test_another_protocol_passes_only_where_all_is_granted(built: World, protocol: str) -> None:
    """Sent raw, with powers no tenant has; "open" is the control."""
    number, packet = OTHERS[protocol]
    for tenant, passes in (("open", True), ("listed", False), ("closed", False)):
        token = f"!{tenant[:2]}!".encode()

        def send(token: bytes = token) -> int:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, number) as raw:
                return raw.sendto(packet(token), (w.OUTSIDE4, 0))

        with w.frames_of(built.outside, "up1") as came:
            assert built.inside(tenant, send, powers=True)
            assert any(token in frame for frame in came(w.SILENCE)) == passes, tenant


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "host loopback"])
def test_every_target_answers_without_the_rules(unguarded: World, target: str) -> None:
    """The control of the matrix: the same probes, the rules flushed and the door opened."""
    for version in (4, 6):
        address, _ = _address(unguarded, "closed", target, version)
        got = _probe_all(unguarded, "closed", address, w.DEADLINE, None)
        assert got["icmp"] == "pong", got
        assert " " in got["tcp"] and " " in got["udp"], got


@pytest.fixture(scope="module")
def unguarded(outer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Another host, with the same tenants and no rules."""
    with w.fresh_host(tmp_path_factory.mktemp("control") / "state") as made:
        for name in ("open", "friend", "onesided", "closed"):
            made.tenant(name)
        made.apply()
        for name in ("friend", "onesided", "closed"):
            made.serve(name)
        w.nft("flush", "ruleset")
        w.open_the_door(made, "open", "friend", "onesided", "closed")
        # Without the masquerade the internet needs a way back.
        w.ip("route", "add", "10.77.0.0/16", "via", w.HOST4, namespace=made.outside)
        w.ip("-6", "route", "add", "fd77:7777:7777::/64", "via", w.HOST6, namespace=made.outside)
        yield made
