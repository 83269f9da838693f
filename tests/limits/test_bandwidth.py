"""Disk bandwidth and weight have an effect: two tenants use one disk, and the kernel says how much each got."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.launch import limits
from tests.build.products import eventually
from tests.launch.tenants import Tenant
from tests.limits import groups

MIB, KIB = 1 << 20, 1 << 10
MUCH = 16 * MIB  # what the neighbour is waited for to have got
LONG = 300.0  # seconds that a busy machine may take for it

_NO_LIMIT = 1 << 40  # bytes a second: it has a group, in which the kernel counts

MakeTenant = Callable[..., Tenant]

# Past the page cache, so that what a tenant asks for is what its disk gives it.
_USE = {
    "io_write": "while dd if=/dev/zero of=/home/fill bs=64k count=64 oflag=direct conv=notrunc 2>/dev/null; do :; done",
    "io_read": "while dd if=/home/fill of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done",
}
_COUNTED = {"io_write": ("Write", "wbytes"), "io_read": ("Read", "rbytes")}


def _disk(tenant: Tenant) -> str:
    groups.require("blkio")
    disk = limits.disk_of(str(tenant.root))
    if disk is None:
        pytest.skip("the state directory is on no disk of its own")
    return disk


def _bytes(tenant: Tenant, disk: str, way: str) -> int:
    """Return how much of ``disk`` the kernel says that the tenant has read or written."""
    said = groups.read(tenant, "blkio", "blkio.throttle.io_service_bytes", "io.stat")
    v1, v2 = _COUNTED[way]
    found = re.search(rf"^{disk} (?:{v1} |.*\b{v2}=)(\d+)", said, re.MULTILINE)
    return int(found[1]) if found else 0


def _side_by_side(one: Tenant, other: Tenant, disk: str, way: str, enough: int) -> float:
    """Let both use the disk until ``other`` got much; returns what ``one`` got, in parts of that.

    It ends as well when ``one`` got ``enough``.
    """
    for tenant in (one, other):
        (tenant.home / "fill").write_bytes(bytes(4 * MIB))
    with other.started(f"echo ready; {_USE[way]}"), one.started(f"echo ready; {_USE[way]}"):
        before = [_bytes(tenant, disk, way) for tenant in (one, other)]

        def got() -> list[int]:
            return [_bytes(tenant, disk, way) - was for tenant, was in zip((one, other), before, strict=True)]

        def done() -> bool:
            mine, theirs = got()
            return theirs >= MUCH or mine >= enough

        assert eventually(done, LONG), f"neither got its part: {got()}"
        mine, theirs = got()
    return mine / max(theirs, 1)


@pytest.mark.parametrize("way", _USE)
def test_a_tenant_with_a_bandwidth_gets_no_more_than_that_of_the_disk(make_tenant: MakeTenant, way: str) -> None:
    one, other = (make_tenant(limits={way: _NO_LIMIT}, limits_required=[way]) for _ in range(2))
    disk = _disk(one)
    assert _side_by_side(one, other, disk, way, MUCH // 4) > 1 / 8, "the control: without a limit it gets its part"
    one.change(limits={way: 64 * KIB})
    assert _side_by_side(one, other, disk, way, MUCH) < 1 / 8


@pytest.fixture
def shared_by_weight(make_tenant: MakeTenant) -> Iterator[str]:
    """Let the kernel share the disk by weight, as one that is slower than it is: there is always too little of it."""
    disk = _disk(make_tenant())
    if groups.is_v1("blkio"):
        pytest.skip("blkio is a v1 controller here: shown on the second kernel")
    if "isochamber.data=" not in Path("/proc/cmdline").read_text():
        pytest.skip("io.cost.qos is the whole machine's: shown on the second kernel")
    quality, model = (Path(f"/sys/fs/cgroup/io.cost.{name}") for name in ("qos", "model"))
    slow = "ctrl=user model=linear rbps=4000000 rseqiops=60 rrandiops=60 wbps=4000000 wseqiops=60 wrandiops=60"
    model.write_text(f"{disk} {slow}")
    quality.write_text(f"{disk} enable=1 ctrl=user rpct=0.00 wpct=0.00 min=100.00 max=100.00")
    yield disk
    quality.write_text(f"{disk} enable=0")
    model.write_text(f"{disk} ctrl=auto")


def test_a_weight_decides_who_gets_more_of_the_disk(make_tenant: MakeTenant, shared_by_weight: str) -> None:
    one, other = (make_tenant(limits={"io_weight": 100}, limits_required=["io_weight"]) for _ in range(2))
    assert _side_by_side(one, other, shared_by_weight, "io_read", MUCH) > 1 / 2, "the control: of the same weight"
    other.change(limits={"io_weight": 1000})
    assert _side_by_side(one, other, shared_by_weight, "io_read", MUCH) < 1 / 3
