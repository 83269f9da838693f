"""The bridge, and a veth pair a tenant whose far end is born inside the tenant's namespace.

Nobody learns and nobody asks: each port is isolated, floods nothing and learns
nothing, and both sides' neighbours are written here for good. So a tenant needs no
ARP and no neighbour discovery, and what it sends of either is dropped
(isochamber.net.firewall). Tenants own none of it: the namespace is the host's.

The host's end carries the digest of what it was made from as its alias, set last:
a port without it was left half-made and is made anew.
"""

import errno
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isochamber.errors import IsochamberError
from isochamber.launch.join import INTERFACE
from isochamber.net import host
from isochamber.net.host import Host
from isochamber.net.plan import Member, Site

_NUD_PERMANENT = 0x80
_RTNH_F_ONLINK = 4
_NTF_MASTER = 4
_IFA_F_NODAD = 2
_UNREACHABLE = 7  # RTN_UNREACHABLE
_ADDRESSES_ONLY_OURS = 1  # IN6_ADDR_GEN_MODE_NONE


@dataclass(frozen=True, slots=True)
class Link:
    """One device as the kernel has it."""

    index: int
    name: str
    alias: str
    master: int
    mac: str
    mtu: int
    up: bool


def open_netlink() -> Any:
    """Return a pyroute2.IPRoute for this process's network namespace; raises IsochamberError."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - 200 ms, and most commands have no network to make

    try:
        return IPRoute()
    except OSError as error:
        raise IsochamberError.from_os(error, stage="net", hint="run as root") from error


def read(netlink: Any) -> dict[str, Link]:
    """Return every device of the namespace by name."""
    return {link.name: link for link in map(_link, netlink.get_links())}


def find(netlink: Any, name: str) -> Link | None:
    """Return the device ``name``, or None: one question, however many devices there are."""
    try:
        return _link(netlink.link("get", ifname=name)[0])
    except Exception as error:
        if getattr(error, "code", None) == errno.ENODEV:
            return None
        raise failed(error, name) from error


def _link(message: Any) -> Link:
    return Link(
        message["index"],
        message.get_attr("IFLA_IFNAME"),
        message.get_attr("IFLA_IFALIAS") or "",
        message.get_attr("IFLA_MASTER") or 0,
        message.get_attr("IFLA_ADDRESS") or "",
        message.get_attr("IFLA_MTU") or 0,
        bool(message["flags"] & 1),
    )


def check_collision(netlink: Any, site: Site) -> None:
    """Refuse a subnet that a route of the host leads into already; raises IsochamberError naming both."""
    bridge = find(netlink, site.bridge)
    ours = 0 if bridge is None else bridge.index
    for block, family in ((site.gateway4.network, 2), (site.gateway6.network, 10)):
        for route in netlink.get_routes(family=family):
            if route.get_attr("RTA_OIF") == ours or route["dst_len"] == 0 or route.get("type") not in (None, 1):
                continue
            there = ipaddress.ip_network(f"{route.get_attr('RTA_DST')}/{route['dst_len']}")
            if block.overlaps(there):
                names = {link.index: link.name for link in read(netlink).values()}
                raise IsochamberError(
                    f"tenants' addresses {block} collide with the host's route to {there} by"
                    f" {names.get(route.get_attr('RTA_OIF'), '?')}",
                    stage="net",
                    hint="choose others in tenants.yaml, such as subnets: {ipv4: 10.77.0.0/16}",
                )


def ensure_bridge(netlink: Any, site: Site, about: Host) -> int:
    """Make the bridge, with the gateway's addresses and nothing else; returns its index. Raises IsochamberError."""
    link = find(netlink, site.bridge)
    try:
        if link is None:
            netlink.link(
                "add", ifname=site.bridge, kind="bridge", address=site.mac, br_stp_state=0, br_mcast_snooping=0
            )
            link = _need(netlink, site.bridge)
        if link.mac != site.mac or link.mtu != about.mtu:
            netlink.link("set", index=link.index, address=site.mac, mtu=about.mtu)
        _ensure_bridge_sysctls(site, about)
        wanted = [site.gateway4, *([site.gateway6] if about.ipv6 else [])]
        _ensure_addresses(netlink, link.index, wanted)
        if not link.up:
            netlink.link("set", index=link.index, state="up")
            _ensure_addresses(netlink, link.index, wanted)  # IPv6 ones go with a link that is down
    except Exception as error:
        raise failed(error, site.bridge) from error
    return link.index


def _ensure_bridge_sysctls(site: Site, about: Host) -> None:
    for name, value in (("accept_redirects", "0"), ("send_redirects", "0"), ("rp_filter", "1"), ("forwarding", "1")):
        host.write_sysctl(f"net/ipv4/conf/{site.bridge}/{name}", value)
    if about.ipv6:
        for name, value in (("addr_gen_mode", "1"), ("accept_ra", "0"), ("accept_redirects", "0")):
            host.write_sysctl(f"net/ipv6/conf/{site.bridge}/{name}", value)


def _ensure_addresses(netlink: Any, index: int, wanted: list[Any]) -> None:
    found = {
        ipaddress.ip_interface(f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}")
        for address in netlink.get_addr(index=index)
    }
    for address in sorted(found - set(wanted), key=str):
        netlink.addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
    for address in wanted:
        if address not in found:
            flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
            netlink.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags)


def _need(netlink: Any, name: str) -> Link:
    link = find(netlink, name)
    if link is None:
        raise IsochamberError("is gone again", stage="net", path=name, hint="who else manages this host's links?")
    return link


def ensure_port(netlink: Any, site: Site, member: Member, net: int, about: Host) -> bool:
    """Make the pair anew unless it is as planned; ``net`` is the tenant's namespace. Raises IsochamberError.

    What was there goes first: a tenant that runs loses its connections, and only when
    its own grant has changed. Returns whether it was made: it counts as half-made
    until :func:`finish_port`.
    """
    former, bridge = find(netlink, member.port), _need(netlink, site.bridge).index
    whole = former is not None and (former.alias, former.up, former.master) == (member.digest, True, bridge)
    if whole and inside_matches(site, member, net, about):
        return False
    try:
        if former is not None:
            netlink.link("del", index=former.index)
        _remove_inside(net)
        peer = {"ifname": INTERFACE, "net_ns_fd": net, "address": member.mac, "mtu": about.mtu}
        netlink.link("add", ifname=member.port, kind="veth", peer=peer, mtu=about.mtu)
        index = _need(netlink, member.port).index
        if about.ipv6:
            host.write_sysctl(f"net/ipv6/conf/{member.port}/disable_ipv6", "1")  # a port is no host
        netlink.link("set", index=index, master=bridge)
        netlink.brport(
            "set", index=index, isolated=1, learning=0, unicast_flood=0, mcast_flood=0, bcast_flood=0, guard=1
        )
        netlink.link("set", index=index, state="up")
        _fill(site, member, net, about)
        netlink.fdb("replace", ifindex=index, lladdr=member.mac, state=_NUD_PERMANENT | 0x40, flags=_NTF_MASTER)
        for address in (member.ipv4, *([member.ipv6] if about.ipv6 else [])):
            netlink.neigh(
                "replace",
                ifindex=bridge,
                dst=str(address),
                lladdr=member.mac,
                state=_NUD_PERMANENT,
                family=_family(address),
            )
    except Exception as error:
        raise failed(error, member.port, member.name) from error
    return True


def finish_port(netlink: Any, member: Member) -> None:
    """Sign the host's end with the digest of what was made. Raises IsochamberError."""
    try:
        netlink.link("set", index=_need(netlink, member.port).index, ifalias=member.digest)
    except Exception as error:
        raise failed(error, member.port, member.name) from error


def _family(address: Any) -> int:
    return 2 if address.version == 4 else 10


def _remove_inside(net: int) -> None:
    with host.namespace(net):
        inside = open_netlink()
    with inside:
        found = find(inside, INTERFACE)
        if found is not None:
            inside.link("del", index=found.index)


def _fill(site: Site, member: Member, net: int, about: Host) -> None:
    """Give the tenant's end its addresses, its one neighbour and its routes."""
    with host.namespace(net):
        inside = open_netlink()
        _ensure_inside_sysctls(about)
    with inside:
        index = _need(inside, INTERFACE).index
        # By SO_BINDTODEVICE a tenant could send to 127.0.0.1 out of eth0.
        inside.route("replace", dst="127.0.0.0/8", type=_UNREACHABLE)
        inside.addr("replace", index=index, address=str(member.ipv4), prefixlen=32)
        if about.ipv6:
            inside.addr("replace", index=index, address=str(member.ipv6), prefixlen=128, flags=_IFA_F_NODAD)
        inside.link("set", index=index, state="up")
        for gateway in (site.gateway4.ip, *([site.gateway6.ip] if about.ipv6 else [])):
            family = _family(gateway)
            inside.neigh(
                "replace", ifindex=index, dst=str(gateway), lladdr=site.door, state=_NUD_PERMANENT, family=family
            )
            inside.route("replace", dst="default", gateway=str(gateway), oif=index, flags=_RTNH_F_ONLINK, family=family)


def _ensure_inside_sysctls(about: Host) -> None:
    """Called in the tenant's namespace: nothing said on the wire changes its addresses or routes."""
    host.write_sysctl(f"net/ipv4/conf/{INTERFACE}/accept_redirects", "0")
    host.write_sysctl("net/ipv4/conf/all/accept_redirects", "0")
    if host.read_sysctl("net/ipv6/conf/all/disable_ipv6") is None:
        return
    host.write_sysctl("net/ipv6/conf/all/disable_ipv6", "0" if about.ipv6 else "1")
    for name, value in (("accept_ra", "0"), ("autoconf", "0"), ("accept_redirects", "0"), ("addr_gen_mode", "1")):
        host.write_sysctl(f"net/ipv6/conf/{INTERFACE}/{name}", value)


def inside_matches(site: Site, member: Member, net: int, about: Host) -> bool:
    """Say whether the tenant's end is up with its addresses and its way out."""
    with host.namespace(net):
        inside = open_netlink()
    with inside:
        link = find(inside, INTERFACE)
        if link is None or not link.up or link.mac != member.mac:
            return False
        addresses = {address.get_attr("IFA_ADDRESS") for address in inside.get_addr(index=link.index)}
        ways = {
            route.get_attr("RTA_GATEWAY")
            for family in (2, 10)
            for route in inside.get_default_routes(family)
            if route.get_attr("RTA_OIF") == link.index
        }
        wanted: Mapping[str, str] = {str(member.ipv4): str(site.gateway4.ip)}
        if about.ipv6:
            wanted = {**wanted, str(member.ipv6): str(site.gateway6.ip)}
        doors = {
            neighbour.get_attr("NDA_DST"): neighbour.get_attr("NDA_LLADDR")
            for neighbour in inside.get_neighbours(ifindex=link.index)
            if neighbour["state"] & _NUD_PERMANENT
        }
        through = dict.fromkeys(wanted.values(), site.door)
        return addresses == set(wanted) and ways == set(wanted.values()) and through.items() <= doors.items()


def remove_port(netlink: Any, site: Site, port: str, addresses: tuple[str, ...] = ()) -> None:
    """Remove a tenant's pair and what the bridge was told of it; nothing there is fine. Raises IsochamberError."""
    found, bridge = find(netlink, port), find(netlink, site.bridge)
    try:
        if found is not None:
            netlink.link("del", index=found.index)
        for address in addresses if bridge is not None else ():
            family = _family(ipaddress.ip_address(address))
            _quietly(netlink.neigh, "del", ifindex=bridge.index if bridge else 0, dst=address, family=family)
    except Exception as error:
        raise failed(error, port) from error


def remove_bridge(netlink: Any, bridge: str) -> None:
    """Remove the bridge; nothing there is fine. Raises IsochamberError."""
    try:
        found = find(netlink, bridge)
        if found is not None:
            netlink.link("del", index=found.index)
    except Exception as error:
        raise failed(error, bridge) from error


def _quietly(function: Any, *words: Any, **keywords: Any) -> None:
    try:
        function(*words, **keywords)
    except Exception as error:
        if getattr(error, "code", None) not in (errno.ENOENT, errno.ESRCH, errno.ENODEV):
            raise


def failed(error: Exception, device: str, tenant: str | None = None) -> IsochamberError:
    """Give a netlink failure its device; anything that has no number of the kernel's is a bug of ours and passes."""
    if isinstance(error, IsochamberError):
        return error
    code = getattr(error, "code", None) or getattr(error, "errno", None)
    if not isinstance(code, int):
        raise error
    hint = {
        errno.EOPNOTSUPP: "does this kernel have bridge and veth (CONFIG_BRIDGE, CONFIG_VETH)?",
        errno.EPERM: "run as root",
    }.get(code)
    text = str(error.args[-1]) if error.args else type(error).__name__
    return IsochamberError(text, stage="net", tenant=tenant, path=device, errno=code, hint=hint)
