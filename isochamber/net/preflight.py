"""What is found out about a grant on this host before anything is changed: taken ports, what the kernel lacks."""

import errno
import shutil
import socket
from pathlib import Path

from isochamber.errors import IsochamberError
from isochamber.net import shaping
from isochamber.spec.model import Network, Port

_PROTOCOLS = "/etc/protocols"


def check(tenant: str, network: Network) -> None:
    """Refuse what this host can't do; nothing is changed. Raises IsochamberError (stage "net")."""
    if network.mode != "bridge":
        return
    if shutil.which("nft") is None:
        raise IsochamberError("nft is not installed", stage="net", tenant=tenant, hint="apt-get install nftables")
    if not Path(_PROTOCOLS).exists():  # nft(8) looks up the names of protocols there
        raise IsochamberError("is missing", stage="net", tenant=tenant, path=_PROTOCOLS, hint="apt-get install netbase")
    shaping.check(network.rate, tenant)
    for port in network.ports:
        _check_port(tenant, port)


def _check_port(tenant: str, port: Port) -> None:
    """Try to bind the port; what we publish ourselves binds nothing, so only another program can be in the way."""
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    addresses = [port.address] if port.address else ["0.0.0.0", "::"]  # noqa: S104 - to see whether it is free
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, kind) as trial:
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind((address, port.host))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what = f"the port {port.host}/{port.protocol} is taken on this host by another program"
                hint = f"ss -lp 'sport = :{port.host}' tells which"
                raise IsochamberError(what, stage="net", tenant=tenant, hint=hint) from error
            if error.errno == errno.EADDRNOTAVAIL and port.address:
                what = f"{port.address} is no address of this host"
                raise IsochamberError(what, stage="net", tenant=tenant, hint="ports: of its network") from error
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise IsochamberError.from_os(error, stage="net", tenant=tenant) from error
