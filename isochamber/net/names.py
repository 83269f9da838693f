"""The tenant's resolv.conf and hosts: the resolvers it was granted, its peers, and the names its egress rules name.

Both lie beside the pin and are bound over the tenant's own, read-only. They are
written in place: a file that is bound is this very file, not the one of its name.
"""

import os
from collections.abc import Iterable, Iterator

from isochamber import paths
from isochamber.launch.join import INTERFACE
from isochamber.net.plan import Member
from isochamber.net.rules import Addresses

__all__ = ["INTERFACE", "hosts", "resolv_conf", "write"]


def resolv_conf(resolvers: Iterable[str]) -> str:
    """Return what resolv.conf says; without a resolver, that there is none (else the C library asks 127.0.0.1)."""
    lines = [f"nameserver {address}" for address in resolvers]
    return "\n".join(["# by isochamber", *lines, *([] if lines else ["options timeout:1 attempts:1"])]) + "\n"


def hosts(member: Member, names: Addresses, *, ipv6: bool) -> str:
    """Return what hosts says: itself, its peers, and the addresses that its egress rules let through now."""
    return "".join(f"{address}\t{name}\n" for address, name in _lines(member, names, ipv6))


def _lines(member: Member, names: Addresses, ipv6: bool) -> Iterator[tuple[str, str]]:
    yield "127.0.0.1", "localhost"
    if ipv6:
        yield "::1", "localhost ip6-localhost"
    known = [(member.name, member.ipv4, member.ipv6), *((peer.name, peer.ipv4, peer.ipv6) for peer in member.peers)]
    for name, ipv4, ipv6_address in known:
        yield str(ipv4), name
        if ipv6:
            yield str(ipv6_address), name
    for name in sorted({rule.host for rule in member.egress if rule.is_name}):
        for address, _ in names.get(name, ()):
            if ipv6 or ":" not in address:
                yield address, name


def write(tid: str, name: str, text: str) -> None:
    """Write a file beside the pin in place, if it says something else; raises OSError. A reboot forgets it."""
    descriptor = os.open(paths.network_file(tid, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        content = text.encode()
        if os.pread(descriptor, len(content) + 1, 0) != content:
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        os.fchmod(descriptor, 0o644)
    finally:
        os.close(descriptor)
