"""The systemd units under a real systemd: what docs/how-to/run-at-boot.md promises, on a machine that it booted."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from tests.docs.pages import Page
from tests.vm.image import INSIDE
from tests.vm.machine import Machine, Parts

pytestmark = [pytest.mark.vm_all, pytest.mark.timeout(1800)]

DEADLINE = 300.0  # seconds for what takes a few on a quiet machine: only a failing test waits that long
ISOCHAMBER = f"{INSIDE}/.venv/bin/isochamber"
STATE = "/var/lib/isochamber"

# Says in its /home that it was started, and that it was asked to stop.
PROGRAM = """\
#!/bin/sh
trap 'echo stopped >>/home/said; sync; exit 0' TERM
echo started >>/home/said
while :; do busybox sleep 1000 & wait; done
"""

TENANTS = """\
defaults: {ipc: none}
bases: {default: {packages: []}}
tenants:
  steady: {package: /srv/units/steady, restart: always, stop: {grace: 60}, limits: {memory: 64M, processes: 50}}
  wired: {package: /srv/units/wired, restart: always, stop: {grace: 60}, network: bridge, after: [steady]}
  idle: {package: /srv/units/idle}
"""


def documented(heading: str) -> str:
    """Return the commands of the first block of shell below a heading of the page that the tests hold."""
    text = Page(PROJECT / "docs/how-to/run-at-boot.md").section(heading)
    return text.split("```sh\n", 1)[1].split("```", 1)[0]


def systemctl(machine: Machine, *words: str) -> str:
    return machine.check("systemctl", *words, timeout=DEADLINE).strip()


def shown(machine: Machine, *names: str, unit: str = "isochamber.service") -> list[str]:
    """Return properties of a unit, in the order of ``names``."""
    lines = systemctl(machine, "show", unit, *(f"--property={name}" for name in names)).splitlines()
    found = dict(line.split("=", 1) for line in lines)
    return [found[name] for name in names]


def eventually(what: str, looks: Callable[[], Any]) -> Any:
    """Return what ``looks`` returns as soon as it is true."""
    deadline = time.monotonic() + DEADLINE
    while not (found := looks()):
        assert time.monotonic() < deadline, f"{what}: not so after {DEADLINE} seconds"
        time.sleep(0.5)
    return found


def running(machine: Machine) -> dict[str, int]:
    """Return the process of each tenant that runs; asking waits for a supervisor, by its socket."""
    rows = json.loads(machine.check(ISOCHAMBER, "ps", "--json", timeout=DEADLINE))
    return {row["name"]: row["pid"] for row in rows if row["state"] == "running"}


def all_run(machine: Machine) -> dict[str, int]:
    """Wait until the two that are to run do, and return their processes."""
    return dict(eventually("both run", lambda: (now := running(machine)).keys() == {"steady", "wired"} and now))


def alive(machine: Machine) -> dict[str, int]:
    """Return the same as the launcher's records and the kernel say it, without the supervisor."""
    script = (
        'for file in /run/isochamber/tenants/*.json; do [ ! -f "$file" ] || echo "${file##*/} $(cat "$file")"; done'
    )
    names = {home.split("/")[-2]: name for name, home in homes(machine).items()}
    found = {}
    for line in machine.check("sh", "-c", script).splitlines():
        file, record = line.split(" ", 1)
        pid = json.loads(record)["pid"]
        if machine.run("test", "-d", f"/proc/{pid}").returncode == 0:
            found[names[file.removesuffix(".json")]] = pid
    return found


def homes(machine: Machine) -> dict[str, str]:
    """Return each tenant's /home as the host sees it."""
    script = f"for file in {STATE}/tenants_persist/*/name; do echo $(cat $file) ${{file%/name}}/home; done"
    return dict(line.split() for line in machine.check("sh", "-c", script).splitlines())


def said(machine: Machine, name: str) -> list[str]:
    """Return what a tenant wrote into its /home."""
    return machine.run("cat", f"{homes(machine)[name]}/said").stdout.split()


def supervisor(machine: Machine) -> int:
    """Return the process of the supervisor that systemd says is there, once it says that it is ready."""

    def looks() -> int:
        state, pid, text = shown(machine, "ActiveState", "MainPID", "StatusText")
        return int(pid) if (state, text) == ("active", "supervising") else 0

    return int(eventually("the supervisor is ready", looks))


def write(machine: Machine, path: str, text: str, mode: str = "644") -> None:
    machine.check(
        "sh", "-c", 'mkdir -p "${1%/*}"; printf %s "$2" >"$1"; chmod "$3" "$1"', "sh", path, text, mode
    )  # fmt: skip


@pytest.fixture(scope="module")
def booted(parts: Parts, scratch: Path) -> Iterator[Machine]:
    """A machine whose PID 1 is systemd, with tenants and the units as the page says."""
    directory = scratch / "units"
    directory.mkdir()
    root = directory / "root.img"
    subprocess.run(["cp", "--sparse=always", parts.root, root], check=True, timeout=300)
    words = "isochamber.init=/usr/lib/systemd/systemd systemd.mask=serial-getty@ttyS0.service"
    machine = Machine(replace(parts, root=root), directory, command_line=words, keeps_root=True)
    with machine:
        for name in ("steady", "wired", "idle"):
            write(machine, f"/srv/units/{name}/progs/main", PROGRAM, "755")
            config = {"tid": "", "cname": name, "init": "/home/main"}
            write(machine, f"/srv/units/{name}/config.json", json.dumps(config))
        write(machine, f"{INSIDE}/tenants.yaml", TENANTS)
        machine.check(f"{INSIDE}/.venv/bin/python", "-m", "isochamber.tasks", cwd=INSIDE, timeout=DEADLINE)
        systemctl(machine, "enable", "--now", "nftables.service")  # a machine with a firewall, before we come
        machine.check("sh", "-euc", documented("With systemd"), cwd=INSIDE, timeout=DEADLINE)
        yield machine


def test_the_supervisor_is_ready_when_systemd_says_so_and_the_tenants_run(booted: Machine) -> None:
    assert booted.check("cat", "/proc/1/comm").strip() == "systemd"
    assert supervisor(booted)
    assert shown(booted, "Type", "NotifyAccess", "Result") == ["notify", "main", "success"]
    assert all_run(booted).keys() == {"steady", "wired"}
    for unit in ("isochamber.socket", "isochamber-tenants.service", "isochamber-net.service", "isochamber-net.timer"):
        assert shown(booted, "ActiveState", unit=unit) == ["active"], unit
    assert systemctl(booted, "list-units", "--failed", "--no-legend", "--plain") == ""


def test_limits_hold_beside_what_systemd_writes_into_the_control_groups(booted: Machine) -> None:
    all_run(booted)
    # It realizes the groups anew: enables at the root what a unit needs, and disables what none of its own does.
    limited = "[Service]\nType=oneshot\nExecStart=/bin/true\nMemoryMax=100M\nIOWeight=50\nTasksMax=5\nCPUWeight=50\n"
    write(booted, "/run/systemd/system/limited.service", limited)
    systemctl(booted, "daemon-reload")
    systemctl(booted, "start", "limited.service")
    booted.check("rm", "/run/systemd/system/limited.service")
    systemctl(booted, "daemon-reload")
    (tid,) = [home.split("/")[-2] for name, home in homes(booted).items() if name == "steady"]
    group = f"/sys/fs/cgroup/isochamber/{tid}"
    assert booted.check("cat", f"{group}/memory.max").strip() == str(64 << 20)
    assert booted.check("cat", f"{group}/pids.max").strip() == "50"
    assert booted.check(ISOCHAMBER, "exec", "steady", "/bin/sh", "-c", "echo in").strip() == "in"


def test_a_client_starts_the_supervisor_by_its_socket(booted: Machine) -> None:
    before = all_run(booted)
    systemctl(booted, "stop", "isochamber.service")
    assert shown(booted, "ActiveState", unit="isochamber.service") == ["inactive"]
    assert alive(booted) == before, "who stops the supervisor stops no tenant"
    assert all_run(booted) == before
    assert supervisor(booted)


def test_a_restart_of_the_supervisor_stops_no_tenant(booted: Machine) -> None:
    before, former = all_run(booted), supervisor(booted)
    systemctl(booted, "restart", "isochamber.service")
    assert supervisor(booted) != former
    assert all_run(booted) == before


def test_a_killed_supervisor_is_restarted_and_stops_no_tenant(booted: Machine) -> None:
    before, former = all_run(booted), supervisor(booted)
    booted.check("kill", "-9", str(former))
    eventually("another supervisor", lambda: supervisor(booted) != former)
    assert all_run(booted) == before


def test_the_watchdog_hears_of_a_supervisor_that_works_and_ends_one_that_hangs(booted: Machine) -> None:
    write(booted, "/run/systemd/system/isochamber.service.d/watchdog.conf", "[Service]\nWatchdogSec=10\n")
    systemctl(booted, "daemon-reload")
    systemctl(booted, "restart", "isochamber.service")
    before, former = all_run(booted), supervisor(booted)
    (heard,) = shown(booted, "WatchdogTimestampMonotonic")
    eventually("it is heard again", lambda: shown(booted, "WatchdogTimestampMonotonic") != [heard])
    assert supervisor(booted) == former
    booted.check("kill", "-STOP", str(former))
    eventually("another supervisor", lambda: shown(booted, "MainPID") not in (["0"], [str(former)]))
    assert "Watchdog timeout" in booted.check("journalctl", "--unit=isochamber.service", "--no-pager")
    assert supervisor(booted) != former
    assert all_run(booted) == before
    booted.check("rm", "-r", "/run/systemd/system/isochamber.service.d")
    systemctl(booted, "daemon-reload")
    systemctl(booted, "restart", "isochamber.service")


@pytest.mark.parametrize("verb", ["restart", "reload", "start"])
def test_networks_are_made_again_when_nftables_is_asked_to(booted: Machine, verb: str) -> None:
    def as_planned() -> bool:
        return booted.run(ISOCHAMBER, "net", "check", timeout=DEADLINE).returncode == 0

    all_run(booted)
    if verb == "start":
        systemctl(booted, "stop", "nftables.service")
        systemctl(booted, "start", "isochamber-net.service")
    assert as_planned()
    booted.check("nft", "flush", "ruleset")
    assert not as_planned()
    systemctl(booted, verb, "nftables.service")
    eventually("the networks are as planned", as_planned)


def test_a_shutdown_stops_tenants_in_their_own_way_and_a_boot_starts_them(booted: Machine) -> None:
    all_run(booted)
    former = {name: said(booted, name) for name in ("steady", "wired")}
    booted.shut_down("systemctl", "reboot", deadline=DEADLINE)
    booted.boot()
    # Nobody asks for anything: the supervisor's own records say who runs.
    eventually("both run", lambda: alive(booted).keys() == {"steady", "wired"})
    for name, words in former.items():
        assert said(booted, name) == [*words, "stopped", "started"]
    assert said(booted, "idle") == []
    assert supervisor(booted)
    booted.check(ISOCHAMBER, "net", "check", timeout=DEADLINE)
    assert systemctl(booted, "list-units", "--failed", "--no-legend", "--plain") == ""
