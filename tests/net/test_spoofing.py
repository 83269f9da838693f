"""Frames and packets that lie about who sent them: sent with the host's root's powers, and seen nowhere.

A tenant can't even make them (it has no raw socket over a namespace of the host's);
that it could not pass them either is shown by sending them with powers it will never have.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from isochamber.net.plan import Member, Site
from tests.net import world as w
from tests.net.world import World

TOKEN = b"isochamber-spoofing-probe"
BROADCAST, ALL_NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"


@pytest.fixture(scope="module")
def two(outer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with w.fresh_host(tmp_path_factory.mktemp("spoof") / "state") as made:
        made.tenant("attacker", egress="all")
        made.tenant("victim", egress="all")
        made.apply()
        yield made


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _ethernet(to: str, source: str, kind: int, payload: bytes) -> bytes:
    return _mac(to) + _mac(source) + struct.pack(">H", kind) + payload


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def _ipv4(source: object, to: object, following: int, payload: bytes) -> bytes:
    length = 20 + len(payload)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, following, 0, _packed(source), _packed(to))
    return head[:10] + struct.pack(">H", _checksum(head)) + head[12:] + payload


def _udp4(source: object, to: object) -> bytes:
    return _ipv4(source, to, 17, struct.pack(">4H", 5555, w.PORT, 8 + len(TOKEN), 0) + TOKEN)


def _redirect4(to: str, me: Member, target: object, it: Member) -> bytes:
    """ICMP of type 5 (RFC 792): what ``target`` sends to the victim should go by me."""
    message = struct.pack(">BBH4s", 5, 1, 0, _packed(me.ipv4)) + _ipv4(target, it.ipv4, 17, bytes(8)) + TOKEN
    message = message[:2] + struct.pack(">H", _checksum(message)) + message[4:]
    return _ethernet(to, me.mac, 0x0800, _ipv4(me.ipv4, target, 1, message))


def _packed(address: object) -> bytes:
    text = str(address)
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def _ipv6(source: object, to: object, following: int, payload: bytes) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), following, 255) + _packed(source) + _packed(to) + payload


def _icmp6(source: object, to: object, kind: int, body: bytes) -> bytes:
    message = struct.pack(">BBH", kind, 0, 0) + body + TOKEN
    pseudo = _packed(source) + _packed(to) + struct.pack(">II", len(message), 58)
    message = message[:2] + struct.pack(">H", _checksum(pseudo + message)) + message[4:]
    return _ipv6(source, to, 58, message)


def _arp(sender_mac: str, sender: object, target_mac: str, target: object) -> bytes:
    words = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2)
    return words + _mac(sender_mac) + _packed(sender) + _mac(target_mac) + _packed(target) + TOKEN


# The site that a forgery is told has the door as the bridge's MAC: but for what it forges, a frame is right.
Forgery = Callable[[Site, Member, Member], bytes]
UDP6 = struct.pack(">4H", 5555, w.PORT, 8 + len(TOKEN), 0x1234) + TOKEN


def _four(site: Site, mac: str, source: object, to: object = w.OUTSIDE4) -> bytes:
    return _ethernet(site.mac, mac, 0x0800, _udp4(source, to))


def _six(site: Site, mac: str, source: object) -> bytes:
    return _ethernet(site.mac, mac, 0x86DD, _ipv6(source, w.OUTSIDE6, 17, UDP6))


def _answer(to: str, me: Member, target: object, group: object) -> bytes:
    """A neighbour advertisement: ``target`` is at my MAC."""
    body = b"\x20\0\0\0" + _packed(target) + b"\x02\x01" + _mac(me.mac)
    return _ethernet(to, me.mac, 0x86DD, _icmp6(me.ipv6, group, 136, body))


def _advertisement(me: Member) -> bytes:
    """A router advertisement with a prefix to configure addresses from."""
    prefix = b"\x03\x04\x40\xc0" + b"\0\0\x0e\x10" * 2 + bytes(4) + _packed("2001:db8:bad::")
    body = b"\x40\0\x07\x08" + bytes(8) + prefix
    return _ethernet(ALL_NODES, me.mac, 0x86DD, _icmp6("fe80::1", "ff02::1", 134, body))


def _redirect(site: Site, me: Member, it: Member) -> bytes:
    body = bytes(4) + _packed(me.ipv6) + _packed(it.ipv6)
    return _ethernet(site.mac, me.mac, 0x86DD, _icmp6(me.ipv6, site.gateway6.ip, 137, body))


def _arp_frame(to: str, me: Member, claimed: object, target: tuple[str, object]) -> bytes:
    return _ethernet(to, me.mac, 0x0806, _arp(me.mac, claimed, *target))


FORGERIES: dict[str, Forgery] = {
    "another MAC address": lambda site, me, _: _four(site, "02:00:00:00:00:99", me.ipv4),
    "the victim's MAC address": lambda site, me, it: _four(site, it.mac, me.ipv4),
    "the victim's IPv4 address": lambda site, me, it: _four(site, me.mac, it.ipv4),
    "the internet's IPv4 address": lambda site, me, _: _four(site, me.mac, w.ELSEWHERE4),
    "the gateway's IPv4 address": lambda site, me, _: _four(site, me.mac, site.gateway4.ip),
    "the victim's MAC and IPv4": lambda site, _, it: _four(site, it.mac, it.ipv4),
    "the victim's IPv6 address": lambda site, me, it: _six(site, me.mac, it.ipv6),
    "a link-local IPv6 address": lambda site, me, _: _six(site, me.mac, "fe80::1"),
    "to the host's loopback": lambda site, me, _: _four(site, me.mac, me.ipv4, "127.0.0.1"),
    "to the victim's MAC": lambda _, me, it: _ethernet(it.mac, me.mac, 0x0800, _udp4(me.ipv4, it.ipv4)),
    "to everybody": lambda _, me, __: _ethernet(BROADCAST, me.mac, 0x0800, _udp4(me.ipv4, "255.255.255.255")),
    "multicast DNS": lambda _, me, __: _ethernet("01:00:5e:00:00:fb", me.mac, 0x0800, _udp4(me.ipv4, "224.0.0.251")),
    "multicast DNS by IPv6": lambda _, me, __: _ethernet(
        "33:33:00:00:00:fb", me.mac, 0x86DD, _ipv6(me.ipv6, "ff02::fb", 17, UDP6)
    ),
    "ARP: I am the gateway": lambda site, me, it: _arp_frame(BROADCAST, me, site.gateway4.ip, (it.mac, it.ipv4)),
    "ARP: I am the victim": lambda site, me, it: _arp_frame(site.mac, me, it.ipv4, (site.mac, site.gateway4.ip)),
    "ND: I am the gateway": lambda site, me, _: _answer(ALL_NODES, me, site.gateway6.ip, "ff02::1"),
    "ND: I am the victim": lambda site, me, it: _answer(site.mac, me, it.ipv6, site.gateway6.ip),
    "a router advertisement": lambda _, me, __: _advertisement(me),
    "a redirect": _redirect,
    "a redirect by IPv4": lambda _, me, it: _redirect4(it.mac, me, it.ipv4, it),
}


def _seen(world: World, attacker: Member, victim: Member, frame: bytes, seconds: float) -> bool:
    """Send the frame from the attacker's eth0 until the bridge or the victim has it, or the time is over."""
    site = w.site_of(world)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with world.namespace_of(attacker.name) as mine, world.namespace_of(victim.name) as theirs:
        watching = [w.sniff(home, site.bridge), w.sniff(theirs, "eth0")]
        sending = w.sniff(mine, "eth0")
        os.close(home)
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                sending.send(frame)
                for watch in watching:
                    if any(TOKEN in seen for seen in w.frames(watch, 0.05)):
                        return True
        finally:
            for watch in (*watching, sending):
                watch.close()
    return False


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_frame_passes_nowhere(two: World, forgery: str) -> None:
    site = w.site_of(two)
    frame = FORGERIES[forgery](replace(site, mac=site.door), two.member("attacker"), two.member("victim"))
    assert not _seen(two, two.member("attacker"), two.member("victim"), frame, w.SILENCE)


def test_a_frame_to_the_bridge_itself_does_not_pass(two: World) -> None:
    me = two.member("attacker")
    frame = _ethernet(w.site_of(two).mac, me.mac, 0x0800, _udp4(me.ipv4, w.OUTSIDE4))
    assert not _seen(two, me, two.member("victim"), frame, w.SILENCE)


def test_an_honest_frame_passes(two: World) -> None:
    site, me = w.site_of(two), two.member("attacker")
    frame = _ethernet(site.door, me.mac, 0x0800, _udp4(me.ipv4, w.OUTSIDE4))
    assert _seen(two, me, two.member("victim"), frame, w.DEADLINE)


def test_the_host_hears_no_redirect_of_a_tenant(two: World) -> None:
    """The frame is an honest one, and goes over the bridge; the host's rules end it before ICMP looks at it."""
    site, me = w.site_of(two), two.member("attacker")
    frame = _redirect4(site.door, me, site.gateway4.ip, two.member("victim"))
    before = _redirects()
    assert _seen(two, me, two.member("victim"), frame, w.DEADLINE)
    assert _redirects() == before


def _redirects() -> int:
    """Return how many ICMP redirects this network namespace has heard (proc_pid_net(5), snmp)."""
    with open("/proc/thread-self/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Icmp: "))
    return int(values[names.index("InRedirects")])


@pytest.mark.parametrize("attempt", ["AF_PACKET", "raw IPv4", "raw IPv6", "IP_TRANSPARENT", "netlink"])
def test_a_tenant_can_not_forge_at_all_and_the_hosts_root_could(two: World, attempt: str) -> None:
    def trying() -> str:
        try:
            if attempt == "AF_PACKET":
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)).close()
            elif attempt in ("raw IPv4", "raw IPv6"):
                family = socket.AF_INET if attempt == "raw IPv4" else socket.AF_INET6
                socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_UDP).close()
            elif attempt == "IP_TRANSPARENT":
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).setsockopt(socket.SOL_IP, 19, 1)
            else:
                from isochamber.net import links

                with links.open_netlink() as netlink:
                    index = netlink.link("get", ifname="eth0")[0]["index"]
                    netlink.addr("add", index=index, address=w.ELSEWHERE4, prefixlen=32)
                    netlink.addr("del", index=index, address=w.ELSEWHERE4, prefixlen=32)
        except OSError as error:
            return w.problem(error)
        except Exception as error:
            return f"code {getattr(error, 'code', error)}"
        return "done"

    mine = two.inside("attacker", trying)
    assert mine in ("EPERM", "EACCES", "code 1"), mine
    assert two.inside("attacker", trying, powers=True) == "done"


def test_an_address_that_is_not_its_own_is_bound_and_never_sent_from(two: World) -> None:
    """IP_FREEBIND needs no right; the kernel routes nothing from an address it does not have."""

    def trying() -> str:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                made.setsockopt(socket.SOL_IP, 15, 1)
                made.bind((w.ELSEWHERE4, 0))
                made.sendto(TOKEN, (w.OUTSIDE4, w.PORT))
        except OSError as error:
            return w.problem(error)
        return "sent"

    assert two.inside("attacker", trying) in ("ENETUNREACH", "EINVAL")
    assert two.inside("attacker", lambda: w.udp(w.OUTSIDE4)).startswith("outside")


@pytest.mark.parametrize("forgery", FORGERIES)
def test_every_forged_frame_would_pass_without_the_guard(unguarded: World, forgery: str) -> None:
    """The control: the bridge table gone, the ports as a plain bridge has them."""
    frame = FORGERIES[forgery](w.site_of(unguarded), unguarded.member("attacker"), unguarded.member("victim"))
    assert _seen(unguarded, unguarded.member("attacker"), unguarded.member("victim"), frame, w.DEADLINE)


@pytest.fixture(scope="module")
def unguarded(outer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with w.fresh_host(tmp_path_factory.mktemp("control") / "state") as made:
        made.tenant("attacker", egress="all")
        made.tenant("victim", egress="all")
        made.apply()
        w.nft("delete", "table", "bridge", w.site_of(made).table)
        w.nft("flush", "chain", "inet", w.site_of(made).table, "early")
        for name in ("attacker", "victim"):
            plain = ["isolated", "off", "learning", "on", "flood", "on", "mcast_flood", "on", "bcast_flood", "on"]
            w.ip("link", "set", made.member(name).port, "type", "bridge_slave", *plain)
        yield made


def test_the_host_would_hear_a_redirect_without_its_rules(unguarded: World) -> None:
    site, me = w.site_of(unguarded), unguarded.member("attacker")
    w.nft("delete", "table", "inet", site.table)
    before = _redirects()
    assert _seen(unguarded, me, unguarded.member("victim"), _redirect4(site.mac, me, site.gateway4.ip, me), w.DEADLINE)
    assert _redirects() > before
