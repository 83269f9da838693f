"""What an entry says of its tenant's network: names, addresses and grants, decided from the spec alone.

Pure. A tenant's place in the subnet is its place among the uid ranges, so the same
name keeps the same address as long as it keeps its range: through rebuilds, reboots
and a lost containers.json. isochamber.net makes it so in the kernel.
"""

import hashlib
import ipaddress
import json
from typing import Any

from isochamber.build import ranges
from isochamber.spec.model import Network, Subnets

_PORT_NAME_MAX = 15  # IFNAMSIZ without its NUL
_FIRST_HOST = 2  # after the network's own address and the gateway
_LAYOUT = 2  # of what isochamber.net makes of a net object: another one is made anew
BUILDS = 32_768  # an install script runs beside its tenant and has an address of its own


def make(
    identifier: str, tid: str, uid_base: int, network: Network, subnets: Subnets, *, build: bool = False
) -> dict[str, Any] | None:
    """Return the ``net`` object of an entry, or None when the mode is not "bridge".

    ``identifier`` names the state directory (at least 7 hex digits). With ``build``
    it is the net of the tenant's install script.
    """
    if network.mode != "bridge":
        return None
    number = (uid_base - ranges.FIRST) // ranges.UID_COUNT + _FIRST_HOST + (BUILDS if build else 0)
    ipv4, ipv6 = blocks(identifier, subnets)
    bridge = f"ic{identifier[:7]}"
    net: dict[str, Any] = {
        "bridge": bridge,
        "port": f"{bridge}-{number}"[:_PORT_NAME_MAX],
        "mac": mac(tid),
        "ipv4": str(ipv4[number]),
        "ipv6": str(ipv6[number]),
        "gateway_mac": mac(identifier + bridge),
        "gateway4": f"{ipv4[1]}/{ipv4.prefixlen}",
        "gateway6": f"{ipv6[1]}/{ipv6.prefixlen}",
        "ports": [[port.address, port.host, port.inside, port.protocol] for port in network.ports],
        "egress_all": network.egress_all,
        "egress_dns": network.egress_dns,
        "egress": [[rule.host, rule.is_name, rule.low, rule.high, rule.protocol] for rule in network.egress],
        "dns": list(network.dns),
        "peers": list(network.peers),
        "rate": None
        if network.rate is None
        else {"up": network.rate.up, "down": network.rate.down, "queue": network.rate.queue},
        "allowance": None
        if network.allowance is None
        else {"bytes": network.allowance.size, "per": network.allowance.per, "slow": network.allowance.slow},
    }
    net["digest"] = hashlib.sha256(json.dumps([_LAYOUT, net], sort_keys=True).encode()).hexdigest()[:40]
    return net


def blocks(identifier: str, subnets: Subnets) -> tuple[ipaddress.IPv4Network, ipaddress.IPv6Network]:
    """Return the state directory's blocks: as configured, else a /16 of 10/8 and a /64 of fd00::/8 by its name."""
    digest = hashlib.sha256(f"subnet {identifier}".encode()).digest()
    ipv4 = subnets.ipv4 or f"10.{digest[0]}.0.0/16"
    ipv6 = subnets.ipv6 or str(ipaddress.IPv6Network((b"\xfd" + digest[1:6] + bytes(10), 64)))
    return ipaddress.IPv4Network(ipv4), ipaddress.IPv6Network(ipv6)


def mac(name: str) -> str:
    """Return a unicast MAC address of our own making (locally administered, IEEE 802) for ``name``."""
    digest = hashlib.sha256(f"mac {name}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))
