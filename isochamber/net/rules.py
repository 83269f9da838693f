"""The rule set as text for ``nft -f``: pure, so that it can be read, compared and tested without a kernel.

Two tables of our own. ``bridge`` looks at every frame of our ports: only the door's
MAC as destination, only the port's own source addresses, no ARP, no neighbour
discovery, no router advertisement. The door is nobody's: only this table turns it
into the bridge, so that without the table (somebody's ``nft flush ruleset``) a tenant
reaches nothing. ``inet`` decides where packets may go:
per tenant chains out-N (what it opens), via-N (what it opens by the host's published
ports), in-N (what is opened to it), kept-N (what was open already) and meter-N (its allowance), found by its address
in a map. Adding one of 1,000 tenants adds elements and its own chains; the shared
rules stay as they are.

Everything a tenant sends is refused unless something here accepts it.
"""

import hashlib
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping

from isochamber.net.plan import Member, Site
from isochamber.spec.model import Egress

# What no grant opens: "this host", loopback, link-local (169.254.169.254 is most clouds' metadata), the metadata
# addresses outside it (Alibaba, Azure, Oracle), multicast and what is reserved.
NEVER4 = (
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32",
    "224.0.0.0/4", "240.0.0.0/4",
)  # fmt: skip
# Likewise; fd00:ec2::254 and fd20:ce::254 are EC2's and Google's metadata, ::ffff:0:0/96 and 64:ff9b::/96 lead to IPv4.
NEVER6 = (
    "::/128", "::1/128", "::ffff:0:0/96", "64:ff9b::/96", "fe80::/10", "fec0::/10", "ff00::/8",
    "fd00:ec2::254/128", "fd20:ce::254/128",
)  # fmt: skip

CONNECTIONS = 4096  # tracked connections a tenant may have open, and as many to it
COUNTED = ("opened4", "opened6", "accepted4", "accepted6")  # sets that the kernel fills
UNLIMITED = 1 << 62  # bytes: the quota of a tenant without an allowance only counts
_SLOW_BURST = 128 << 10  # bytes: a segment as offloading makes it (64 KiB) must pass at any rate

Addresses = Mapping[str, tuple[tuple[str, int], ...]]  # host name -> (address, seconds it may still be used)


def shared(site: Site, between: Iterable[str]) -> str:
    """Return both tables without any tenant. ``between``: interfaces this host did not forward between before us."""
    bridge, table = site.bridge, site.table
    guard = ", ".join(f'"{name}"' for name in sorted(between))
    return f"""\
table inet {table} {{
    map out4 {{ type ipv4_addr : verdict; }}
    map out6 {{ type ipv6_addr : verdict; }}
    map via4 {{ type ipv4_addr : verdict; }}
    map via6 {{ type ipv6_addr : verdict; }}
    map in4 {{ type ipv4_addr : verdict; }}
    map in6 {{ type ipv6_addr : verdict; }}
    map meter4 {{ type ipv4_addr : verdict; }}
    map meter6 {{ type ipv6_addr : verdict; }}
    map published4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
    map published6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
    map published_at4 {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
    map published_at6 {{ type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }}
    map kept4 {{ type ipv4_addr : verdict; }}
    map kept6 {{ type ipv6_addr : verdict; }}
    set hairpin4 {{ type ipv4_addr . ipv4_addr; }}
    set hairpin6 {{ type ipv6_addr . ipv6_addr; }}
    set opened4 {{ type ipv4_addr; size 65535; flags dynamic; }}
    set opened6 {{ type ipv6_addr; size 65535; flags dynamic; }}
    set accepted4 {{ type ipv4_addr; size 65535; flags dynamic; }}
    set accepted6 {{ type ipv6_addr; size 65535; flags dynamic; }}
    set never4 {{ type ipv4_addr; flags interval; elements = {{ {", ".join(NEVER4)} }} }}
    set never6 {{ type ipv6_addr; flags interval; elements = {{ {", ".join(NEVER6)} }} }}
    set signed {{ type mark; }}
    set between {{ type ifname; {f"elements = {{ {guard} }}" if guard else ""} }}

    chain early {{
        type filter hook prerouting priority raw; policy accept;
        ip daddr 127.0.0.0/8 iifname "{bridge}" drop
        ip6 daddr ::1 iifname "{bridge}" drop
    }}
    chain publish {{
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type != local return
        iifname "{bridge}" ip saddr vmap @via4
        iifname "{bridge}" ip6 saddr vmap @via6
        iifname != "{bridge}" jump published
    }}
    chain publish_to_host {{
        type nat hook output priority -100; policy accept;
        fib daddr type local jump published
    }}
    chain published {{
        dnat ip to ip daddr . meta l4proto . th dport map @published_at4
        dnat ip6 to ip6 daddr . meta l4proto . th dport map @published_at6
        ip daddr 127.0.0.0/8 return
        ip6 daddr ::1 return
        dnat ip to meta l4proto . th dport map @published4
        dnat ip6 to meta l4proto . th dport map @published6
    }}
    chain outgoing {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
        oifname "{bridge}" ip saddr . ip daddr @hairpin4 masquerade
        oifname "{bridge}" ip6 saddr . ip6 daddr @hairpin6 masquerade
        oifname != "{bridge}" ip saddr {site.gateway4.network} masquerade
        oifname != "{bridge}" ip6 saddr {site.gateway6.network} masquerade
    }}
    chain to_host {{
        type filter hook input priority filter; policy accept;
        iifname "{bridge}" ct state established,related accept
        iifname "{bridge}" goto refuse
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" goto from_tenant
        oifname "{bridge}" goto to_tenant
        iifname @between oifname @between drop
    }}
    chain from_tenant {{
        oifname != "{bridge}" jump sent
        ct state established,related jump kept
        ct state invalid drop
        ip daddr @never4 goto refuse
        ip6 daddr @never6 goto refuse
        ip saddr vmap @out4
        ip6 saddr vmap @out6
        goto refuse
    }}
    chain sent {{
        ip saddr vmap @meter4
        ip6 saddr vmap @meter6
    }}
    chain kept {{
        ip saddr vmap @kept4
        ip6 saddr vmap @kept6
    }}
    chain to_tenant {{
        ip daddr vmap @meter4
        ip6 daddr vmap @meter6
        ct state established,related accept
        ct status dnat ip daddr vmap @in4
        ct status dnat ip6 daddr vmap @in6
        drop
    }}
    chain refuse {{
        limit rate 1000/second burst 1000 packets reject with icmpx admin-prohibited
        drop
    }}
}}
table bridge {table} {{
    set signed {{ type mark; }}
    set pairs4 {{ type ifname . ether_addr . ipv4_addr; }}
    set pairs6 {{ type ifname . ether_addr . ipv6_addr; }}

    chain ports {{
        type filter hook prerouting priority dstnat; policy accept;
        iifname "{site.ports}*" goto port
    }}
    chain port {{
        ether daddr != {site.door} drop
        ip daddr 127.0.0.0/8 drop
        iifname . ether saddr . ip saddr @pairs4 goto door
        icmpv6 type {{ mld-listener-query, mld-listener-report, mld-listener-done, nd-router-solicit, \
nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect, mld2-listener-report }} drop
        iifname . ether saddr . ip6 saddr @pairs6 goto door
        drop
    }}
    chain door {{
        ether daddr set {site.mac} meta pkttype set host accept
    }}
}}
"""


def add(site: Site, member: Member, resolvers: tuple[str, ...], names: Addresses, used: int) -> str:
    """Return the commands that add ``member``, whose chains are empty or not there; ``used`` bytes are spent."""
    return "".join(f"{line}\n" for line in _add(site, member, resolvers, names, used))


def _add(site: Site, member: Member, resolvers: tuple[str, ...], names: Addresses, used: int) -> Iterator[str]:
    table, number = f"inet {site.table}", member.number
    yield from _sets(site, member)
    yield from _grants(site, member, resolvers, names)
    yield _quota(site, member, used)
    for chain, lines in _chains(site, member).items():
        yield f"add chain {table} {chain}-{number}"
        for index, line in enumerate(lines):
            signed = f' comment "{stamp(site, member, resolvers)}"' if (chain, index) == ("out", 0) else ""
            yield f"add rule {table} {chain}-{number} {line}{signed}"
    yield from _elements("add", site, member)
    for name, key, value in published(member):
        yield f"add element {table} {name} {{ {key} : {value} }}"


def stamp(site: Site, member: Member, resolvers: tuple[str, ...]) -> str:
    """Return what the tenant's first rule carries: a digest of all of its part but what changes by itself."""
    parts = [_chains(site, member), list(_elements("add", site, member)), list(published(member)), _limit(member)]
    parts.append(granted(member, resolvers, {}))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def generation(member: Member) -> str:
    """Return what marks the connections of this very grant: one that was open under another is judged anew."""
    grant = (
        NEVER4,
        NEVER6,
        member.egress_all,
        member.egress_dns,
        member.egress,
        member.dns,
        member.peers,
        member.ports,
    )
    return "0x" + hashlib.sha256(f"{member.tid} {grant!r}".encode()).hexdigest()[:8]


def _sets(site: Site, member: Member) -> Iterator[str]:
    for version in (4, 6):
        kind = f"type ipv{version}_addr . inet_proto . inet_service"
        yield f"add set inet {site.table} granted{version}-{member.number} {{ {kind}; flags interval,timeout; }}"


def _grants(site: Site, member: Member, resolvers: tuple[str, ...], names: Addresses) -> Iterator[str]:
    for version, elements in granted(member, resolvers, names).items():
        if elements:
            yield f"add element inet {site.table} granted{version}-{member.number} {{ {', '.join(elements)} }}"


def _chains(site: Site, member: Member) -> dict[str, list[str]]:
    """Return the rules of each chain that is the tenant's own, slow before the meter that jumps there."""
    return {
        "out": list(_out(site, member)),
        "via": list(_via(member)),
        "in": list(_in(member)),
        "kept": [f"ct mark {generation(member)} accept"],
        "slow": list(_slow(site, member)),
        "meter": list(_meter(member)),
    }


def _elements(verb: str, site: Site, member: Member) -> Iterator[str]:
    """Yield a command for each element that leads from the tenant's addresses to its chains."""
    table, number = f"inet {site.table}", member.number
    for version, address in ((4, member.ipv4), (6, member.ipv6)):
        for chain, jump in (("out", "goto"), ("via", "goto"), ("in", "goto"), ("kept", "jump"), ("meter", "jump")):
            yield f"{verb} element {table} {chain}{version} {{ {address} : {jump} {chain}-{number} }}"
        yield f"{verb} element {table} hairpin{version} {{ {address} . {address} }}"
        yield f'{verb} element bridge {site.table} pairs{version} {{ "{member.port}" . {member.mac} . {address} }}'


def keys(member: Member) -> Iterator[tuple[str, str, bytes]]:
    """Yield (family, map or set, key as the kernel holds it) of every element of ``member`` in the shared ones."""
    for version, address in ((4, member.ipv4), (6, member.ipv6)):
        for chain in ("out", "via", "in", "kept", "meter"):
            yield "inet", f"{chain}{version}", address.packed
        yield "inet", f"hairpin{version}", address.packed * 2
        mac = bytes.fromhex(member.mac.replace(":", "")) + bytes(2)
        yield "bridge", f"pairs{version}", member.port.encode().ljust(16, b"\0") + mac + address.packed
    for port in member.ports:
        number = socket.IPPROTO_TCP if port.protocol == "tcp" else socket.IPPROTO_UDP
        service = struct.pack(">B3xH2x", number, port.host)
        if port.address is None:
            yield from (("inet", f"published{version}", service) for version in (4, 6))
        else:
            at = ipaddress.ip_address(port.address)
            yield "inet", f"published_at{at.version}", at.packed + service


def clear(site: Site, member: Member) -> str:
    """Return the commands that empty what :func:`add` fills, whether it is there or not."""
    lines = list(_sets(site, member))
    lines += [f"flush set inet {site.table} granted{version}-{member.number}" for version in (4, 6)]
    for chain in _chains(site, member):
        lines += [f"add chain inet {site.table} {chain}-{member.number}"]
        lines += [f"flush chain inet {site.table} {chain}-{member.number}"]
    lines += _drop_quota(site, member)
    return "".join(f"{line}\n" for line in lines)


def _drop_quota(site: Site, member: Member) -> list[str]:
    name = f"inet {site.table} allowance-{member.number}"
    return [f"add quota {name} {{ over {_limit(member)} bytes; }}", f"delete quota {name}"]


def remove(site: Site, member: Member, held: Iterable[tuple[str, str, str]]) -> str:
    """Return the commands that remove ``member``, whether all of it is there or not; ``held``: every published port."""
    chains = _chains(site, member)
    lines = [f"add chain inet {site.table} {chain}-{member.number}" for chain in chains]
    lines += [*_elements("add", site, member), *_elements("delete", site, member)]
    lines += [f"flush chain inet {site.table} {chain}-{member.number}" for chain in chains]
    lines += [f"delete chain inet {site.table} {chain}-{member.number}" for chain in reversed(chains)]
    lines += _drop_quota(site, member)
    for line in _sets(site, member):
        lines += [line, f"delete set inet {site.table} {line.split()[4]}"]
    lines += _stale(site, member, held, keep=())
    return "".join(f"{line}\n" for line in lines)


def drop_stale_ports(site: Site, member: Member, held: Iterable[tuple[str, str, str]]) -> str:
    """Return the commands that take back the ports ``member`` holds, all of them: :func:`add` gives the right ones."""
    return "".join(f"{line}\n" for line in _stale(site, member, held, keep=()))


def _stale(
    site: Site, member: Member, held: Iterable[tuple[str, str, str]], keep: tuple[tuple[str, str], ...]
) -> list[str]:
    ours = {str(member.ipv4), str(member.ipv6)}
    return [
        f"delete element inet {site.table} {name} {{ {key} }}"
        for name, key, address in held
        if address in ours and (name, key) not in keep
    ]


def renew_quota(site: Site, member: Member, used: int) -> list[str]:
    """Return the commands that set what is used of an allowance; its chain is written anew around it."""
    name = f"inet {site.table} meter-{member.number}"
    return [
        f"flush chain {name}",
        *_drop_quota(site, member),
        _quota(site, member, used),
        *(f"add rule {name} {line}" for line in _meter(member)),
    ]


def regrant(site: Site, member: Member, resolvers: tuple[str, ...], names: Addresses) -> str:
    """Return the commands that write the granted destinations anew."""
    flush = [f"flush set inet {site.table} granted{version}-{member.number}" for version in (4, 6)]
    return "".join(f"{line}\n" for line in [*flush, *_grants(site, member, resolvers, names)])


def _out(site: Site, member: Member) -> Iterator[str]:
    """Yield the rules for what the tenant opens, most particular first."""
    yield f"add @opened4 {{ ip saddr ct count over {CONNECTIONS} }} drop"
    yield f"add @opened6 {{ ip6 saddr ct count over {CONNECTIONS} }} drop"
    accept = f"ct mark set {generation(member)} accept"
    for peer in member.peers:
        yield f'oifname "{site.bridge}" ip daddr {peer.ipv4} {accept}'
        yield f'oifname "{site.bridge}" ip6 daddr {peer.ipv6} {accept}'
    yield f'oifname "{site.bridge}" ct status dnat {accept}'  # by a published port of the host, which via-N granted
    yield f'oifname "{site.bridge}" goto refuse'
    if member.egress_all:
        yield accept
    else:
        yield f"ip daddr . meta l4proto . th dport @granted4-{member.number} {accept}"
        yield f"ip6 daddr . meta l4proto . th dport @granted6-{member.number} {accept}"
    yield "goto refuse"


def _via(member: Member) -> Iterator[str]:
    """Yield the rules for what the tenant sends to an address of the host: published ports, if it is granted them."""
    if member.egress_all:
        yield "goto published"
    else:
        yield f"ip daddr . meta l4proto . th dport @granted4-{member.number} goto published"
        yield f"ip6 daddr . meta l4proto . th dport @granted6-{member.number} goto published"


def _in(member: Member) -> Iterator[str]:
    """Yield the rules for what is opened to the tenant, which is only what was published."""
    yield f"add @accepted4 {{ ip daddr ct count over {CONNECTIONS} }} drop"
    yield f"add @accepted6 {{ ip6 daddr ct count over {CONNECTIONS} }} drop"
    yield f"ct mark set {generation(member)} accept"


def _limit(member: Member) -> int:
    return UNLIMITED if member.allowance is None else member.allowance.size


def _quota(site: Site, member: Member, used: int) -> str:
    name = f"inet {site.table} allowance-{member.number}"
    return f"add quota {name} {{ over {_limit(member)} bytes used {used} bytes; }}"


def _meter(member: Member) -> Iterator[str]:
    """Yield the rule that counts every packet from and to elsewhere, and says what happens when it was too many."""
    cut = member.allowance is not None and member.allowance.slow is None
    yield f'quota name "allowance-{member.number}" ' + ("drop" if cut else f"jump slow-{member.number}")


def _slow(site: Site, member: Member) -> Iterator[str]:
    if member.allowance is not None and member.allowance.slow is not None:
        over = f"limit rate over {member.allowance.slow // 8} bytes/second burst {_SLOW_BURST} bytes drop"
        yield f'iifname "{site.bridge}" {over}'
        yield f'oifname "{site.bridge}" {over}'


def published(member: Member) -> Iterator[tuple[str, str, str]]:
    """Yield (map, key, value) of each published port, IPv4 and IPv6."""
    for port in member.ports:
        for version, address in ((4, member.ipv4), (6, member.ipv6)):
            key, value = f"{port.protocol} . {port.host}", f"{address} . {port.inside}"
            if port.address is None:
                yield f"published{version}", key, value
            elif ipaddress.ip_address(port.address).version == version:
                yield f"published_at{version}", f"{port.address} . {key}", value


def granted(member: Member, resolvers: tuple[str, ...], names: Addresses) -> dict[int, list[str]]:
    """Return the elements of granted4-N and granted6-N: what the list of ``egress`` comes to now."""
    found: dict[int, list[str]] = {4: [], 6: []}
    for rule in member.egress:
        if rule.is_name:
            for address, seconds in names.get(rule.host, ()):
                found[ipaddress.ip_address(address).version].append(f"{address} . {_service(rule)} timeout {seconds}s")
        else:
            block = ipaddress.ip_network(rule.host)
            found[block.version].append(f"{_block(block)} . {_service(rule)}")
    if member.egress_dns:
        for resolver in resolvers:
            for protocol in ("tcp", "udp"):
                found[ipaddress.ip_address(resolver).version].append(f"{resolver} . {protocol} . 53")
    return {version: list(dict.fromkeys(elements)) for version, elements in found.items()}


def _block(block: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    if block.prefixlen == 0:
        return f"{block[0]}-{block[-1]}"  # nft 1.0 loses a prefix of no length in a concatenation
    return str(block)


def _service(rule: Egress) -> str:
    """Return the protocol and the ports; for ICMP the "port" is type and code, so all of them."""
    protocol = {"icmp": "icmp", "any": "0-255"}.get(rule.protocol, rule.protocol)
    if rule.protocol == "icmp" and ":" in rule.host:
        protocol = "ipv6-icmp"
    ports = f"{rule.low}-{rule.high}" if rule.low != rule.high else str(rule.low)
    return f"{protocol} . {ports}"
