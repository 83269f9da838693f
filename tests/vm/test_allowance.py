"""What a tenant has used of its allowance outlives every process of ours, a power cut and a reboot."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.vm.image import INSIDE
from tests.vm.machine import Machine

HERE = "/srv/allowance"
ISOCHAMBER = f"{INSIDE}/.venv/bin/isochamber"
ENVIRONMENT = {"ISOCHAMBER_TENANTS": f"{HERE}/tenants.yaml"}
LIMIT = 400_000  # bytes a month
FIRST = 100_000  # bytes that the tenant fetches when it starts

# Sends as many bytes as it is asked for.
SERVER = """\
import socket
with socket.create_server(("203.0.113.9", 7777)) as server:
    while True:
        client, _ = server.accept()
        with client:
            try:
                client.sendall(b"x" * int(client.makefile().readline()))
            except OSError:
                pass
"""
INTERNET = f"""\
ip netns add internet
ip link add up0 type veth peer name up1 netns internet
ip addr add 198.51.100.1/24 dev up0
ip link set up0 up
ip -n internet addr add 198.51.100.2/24 dev up1
ip -n internet addr add 203.0.113.9/32 dev lo
ip -n internet link set lo up
ip -n internet link set up1 up
ip route add default via 198.51.100.2
setsid ip netns exec internet python3 {HERE}/server.py >/dev/null 2>&1 &
until ip netns exec internet ss -Hltn | grep -q :7777; do sleep 0.1; done
"""
FETCH = "echo {} | busybox timeout 20 busybox nc 203.0.113.9 7777 | busybox wc -c"
PROGRAM = f"#!/bin/sh\n{FETCH.format(FIRST)} >/home/fetched\nexec busybox sleep 100000\n"
TENANTS = f"""\
root: {HERE}/state
defaults: {{ipc: none}}
bases: {{default: {{packages: []}}}}
tenants:
  metered:
    package: {HERE}/metered
    restart: always
    network: {{mode: bridge, egress: ["203.0.113.9:7777/tcp"], allowance: {{bytes: {LIMIT}, per: month, then: cut}}}}
"""
# Every process of ours: the supervisor, the nursery, the tenants. The brackets: not this shell itself.
KILL_ALL = """\
ours() { pgrep -f '[i]sochamber serve'; pgrep -x isochamber-nurs; cat /sys/fs/cgroup/isochamber/*/cgroup.procs; }
set +e
kill -9 $(ours)
while [ -n "$(ours 2>/dev/null)" ]; do sleep 0.1; done
"""


class Metered:
    """One machine with a metered tenant in it, and what an operator asks there."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def write(self, name: str, text: str, mode: str = "644") -> None:
        script = 'mkdir -p "${1%/*}"; printf %s "$2" >"$1"; chmod "$3" "$1"'
        self.machine.check("sh", "-c", script, "sh", f"{HERE}/{name}", text, mode)

    def isochamber(self, *words: str) -> str:
        return self.machine.check(ISOCHAMBER, *words, env=ENVIRONMENT, timeout=300)

    def sh(self, script: str) -> str:
        return self.machine.check("sh", "-euc", script, env=ENVIRONMENT, timeout=300)

    def begin(self) -> None:
        """Start the supervisor, and wait until the tenant has fetched what it fetches first."""
        self.sh(f"rm -f {HERE}/state/tenants_persist/*/home/fetched; setsid {ISOCHAMBER} serve >/dev/null 2>&1 &")
        self.sh(f"until [ -s {HERE}/state/tenants_persist/*/home/fetched ]; do sleep 0.1; done")

    def fetch(self, size: int) -> int:
        """Let the tenant fetch, and return how much came."""
        return int(self.isochamber("exec", "metered", "/bin/sh", "-c", FETCH.format(size)))

    def counted(self) -> int:
        """Return the kernel's count."""
        (row,) = json.loads(self.isochamber("net", "ls", "--json"))
        return int(row["bytes"])

    def written(self) -> int:
        """Return what is written down."""
        used: dict[str, Any] = json.loads(self.sh(f"cat {HERE}/state/tenants_persist/*/allowance.json"))
        return int(used["bytes"])


@pytest.fixture
def metered(machine: Machine) -> Iterator[Metered]:
    """The tenant, configured, with an internet that it may fetch from."""
    made = Metered(machine)
    made.write("server.py", SERVER)
    made.write("tenants.yaml", TENANTS)
    made.write("metered/progs/main", PROGRAM, "755")
    made.write("metered/config.json", json.dumps({"tid": "", "cname": "metered", "init": "/home/main"}))
    made.sh(INTERNET)
    made.sh(f"{INSIDE}/.venv/bin/python -m isochamber.tasks")
    yield made
    machine.check("rm", "-rf", HERE)
    machine.reboot()


@pytest.mark.vm_all
@pytest.mark.timeout(1800)
def test_an_allowance_outlives_a_kill_of_everything_a_power_cut_and_a_reboot(metered: Metered) -> None:
    metered.begin()
    metered.isochamber("net", "account")
    first = metered.written()
    assert FIRST < first < FIRST * 1.2

    # Killed: the kernel counts on, and nothing is lost.
    assert metered.fetch(50_000) == 50_000
    metered.sh(KILL_ALL)
    metered.isochamber("net", "account")
    second = metered.written()
    assert second == metered.counted() > first + 50_000

    # The power goes: what passed since the last account may be lost, and nothing more. The repair at boot counts on.
    metered.begin()
    metered.isochamber("net", "account")
    third = metered.written()
    assert third > second + FIRST
    assert metered.fetch(10_000) == 10_000
    passed = metered.counted()
    assert passed > third + 10_000
    metered.machine.kill()
    metered.machine.boot()
    metered.sh(INTERNET)
    metered.isochamber("net", "repair")
    assert third <= metered.written() == metered.counted() <= passed  # the supervisor may have written once more

    # Used up: cut, and still so after a reboot, before which the unit wrote it down.
    metered.begin()
    assert metered.fetch(LIMIT) < LIMIT
    metered.isochamber("net", "account")
    assert metered.written() >= LIMIT
    metered.machine.reboot()
    metered.sh(INTERNET)
    metered.isochamber("net", "repair")
    metered.begin()
    assert metered.counted() >= LIMIT
    assert metered.fetch(1000) == 0
