"""Rates: a token bucket at either end of the veth, a fair queue in it where the kernel has one.

What goes down to the tenant waits at the host's end, what it sends waits at its own:
both leave a device, so no ifb and no policing is needed, and a sender feels the queue
instead of losses. The tenant's end is in a namespace of the host's: nothing inside
can change it.
"""

import errno
from functools import cache
from typing import Any

from isochamber.errors import IsochamberError
from isochamber.launch.join import INTERFACE
from isochamber.net import host, links
from isochamber.net.plan import Member
from isochamber.spec.model import Rate

_ROOT, _HANDLE, _CHILD = 0xFFFFFFFF, 0x10000, 0x100000
FAIREST = ("fq_codel", "fq", "sfq")  # by choice, if none is named
_KINDS = {"fifo": "bfifo"}
_FRAME = 1600  # bytes of the largest packet with its headers; what is larger (offloaded) is cut by the kernel


@cache
def available(kind: str) -> bool:
    """Say whether this kernel has the queueing discipline ``kind``, by trying it in an empty namespace."""
    with host.namespace(None):
        netlink = links.open_netlink()
    with netlink:
        try:
            _add(netlink, 1, kind, _ROOT, _HANDLE, 1_000_000)
        except Exception as error:
            if getattr(error, "code", None) in (errno.ENOENT, errno.EOPNOTSUPP):
                return False
            raise
        return True


def check(rate: Rate | None, tenant: str) -> None:
    """Refuse a rate that this kernel can't keep, naming the discipline it lacks; raises IsochamberError."""
    if rate is None:
        return
    for kind in ("tbf", *([_KINDS.get(rate.queue, rate.queue)] if rate.queue else [])):
        if not available(kind):
            raise IsochamberError(
                f"this kernel lacks the queueing discipline {kind}",
                stage="net",
                tenant=tenant,
                hint=f"modprobe sch_{kind}, or another kernel"
                + (", or another queue:" if kind != "tbf" else ", or leave rate: out"),
            )


def queue_of(rate: Rate) -> str:
    """Return the discipline inside the bucket: the named one, else the fairest this kernel has, else fifo."""
    return rate.queue or next((kind for kind in FAIREST if available(kind)), "fifo")


def ensure(netlink: Any, member: Member, net: int) -> None:
    """Shape both ends of a fresh pair; nothing is done without a rate. Raises IsochamberError."""
    if member.rate is None:
        return
    if member.rate.down is not None:
        _shape(netlink, member.port, member.rate.down, queue_of(member.rate))
    if member.rate.up is not None:
        with host.namespace(net):
            inside = links.open_netlink()
        with inside:
            _shape(inside, INTERFACE, member.rate.up, queue_of(member.rate))


def _shape(netlink: Any, device: str, rate: int, queue: str) -> None:
    link = links.find(netlink, device)
    if link is None:
        raise IsochamberError("is gone again", stage="net", path=device)
    try:
        _add(netlink, link.index, "tbf", _ROOT, _HANDLE, rate)
        if queue != "fifo":  # which the bucket has by itself
            _add(netlink, link.index, queue, _HANDLE | 1, _CHILD, rate)
    except Exception as error:
        raise links.failed(error, device) from error


def _add(netlink: Any, index: int, kind: str, parent: int, handle: int, rate: int) -> None:
    options: dict[str, Any] = {}
    if kind == "tbf":
        options = {"rate": rate // 8, "burst": burst(rate), "limit": queue_limit(rate)}
    elif kind == "bfifo":
        options = {"limit": queue_limit(rate)}
    netlink.tc("replace", kind, index, handle, parent=parent, **options)


def burst(rate: int) -> int:
    """Return the bucket's size in bytes: 10 ms of ``rate`` (a few ticks of any kernel), two frames at least."""
    return max(2 * _FRAME, rate // 8 // 100)


def queue_limit(rate: int) -> int:
    """Return how many bytes may wait: 200 ms of ``rate``, 16 frames at least."""
    return max(16 * _FRAME, rate // 8 // 5)


def read(netlink: Any, index: int) -> int | None:
    """Return the rate in bits a second that a device is shaped to, or None."""
    for queue in netlink.get_qdiscs(index):
        if queue.get_attr("TCA_KIND") == "tbf":
            options = queue.get_attr("TCA_OPTIONS")
            rate = options.get_attr("TCA_TBF_PARMS")["rate"]
            wide = options.get_attr("TCA_TBF_RATE64")
            return int(wide or rate) * 8
    return None
