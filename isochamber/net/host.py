"""What the plan needs to know of this host: its routes, resolvers, uplinks, and whether it speaks IPv6."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isochamber.errors import IsochamberError
from isochamber.launch import syscalls

_RESOLVERS = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))
_DEFAULT_MTU = 1500


@dataclass(frozen=True, slots=True)
class Host:
    """One look at the host's network."""

    ipv6: bool
    mtu: int  # of the device that the default route leaves by
    resolvers: tuple[str, ...]  # those a tenant can reach


def look(netlink: Any) -> Host:
    """Look at the host through ``netlink`` (a pyroute2.IPRoute)."""
    return Host(has_ipv6(), _uplink_mtu(netlink), tuple(resolvers()))


def has_ipv6() -> bool:
    """Say whether this kernel has IPv6 and it is not switched off."""
    return read_sysctl("net/ipv6/conf/all/disable_ipv6") == "0"


def read_sysctl(name: str) -> str | None:
    """Return a sysctl of this process's network namespace, or None where the kernel has none such."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None


def write_sysctl(name: str, value: str) -> None:
    """Set a sysctl if it is not so yet; raises IsochamberError."""
    if read_sysctl(name) == value:
        return
    try:
        Path("/proc/sys", name).write_text(value)
    except OSError as error:
        raise IsochamberError.from_os(error, stage="net") from error


def keep_router_advertisements() -> None:
    """Let interfaces that configure themselves by IPv6 advertisements go on so: forwarding would stop them."""
    for interface in sorted(path.name for path in Path("/proc/sys/net/ipv6/conf").iterdir()):
        name = f"net/ipv6/conf/{interface}/accept_ra"
        if interface not in ("all", "default") and read_sysctl(name) == "1":
            write_sysctl(name, "2")


def resolvers() -> Iterator[str]:
    """Yield the host's resolvers that are not on its own loopback (systemd-resolved's stub is)."""
    for path in _RESOLVERS:
        with contextlib.suppress(OSError):
            found = []
            for line in path.read_text(errors="replace").splitlines():
                words = line.split()
                if len(words) > 1 and words[0] == "nameserver":
                    with contextlib.suppress(ValueError):
                        address = ipaddress.ip_address(words[1])
                        if not (address.is_loopback or address.is_link_local or address.is_unspecified):
                            found.append(str(address))
            if found:
                yield from found
                return


def _uplink_mtu(netlink: Any) -> int:
    devices = [
        route.get_attr("RTA_OIF")
        for family in (socket.AF_INET, socket.AF_INET6)
        for route in netlink.get_default_routes(family)
    ]
    sizes = [link.get_attr("IFLA_MTU") for device in devices if device for link in netlink.get_links(device)]
    return min([*map(int, sizes), _DEFAULT_MTU])


@contextlib.contextmanager
def namespace(descriptor: int | None) -> Iterator[None]:
    """Run the block in the network namespace open as ``descriptor``; None: in an empty one that goes with it.

    This thread only. Raises OSError.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if descriptor is None:
            syscalls.unshare(syscalls.CLONE_NEWNET)
        else:
            syscalls.setns(descriptor, syscalls.CLONE_NEWNET)
        try:
            yield
        finally:
            syscalls.setns(home, syscalls.CLONE_NEWNET)
    finally:
        os.close(home)
