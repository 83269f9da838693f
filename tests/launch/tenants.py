"""Real tenants over a real base: entries as the registry would write them, started by the real launcher."""

import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from isochamber import paths
from isochamber.build import filters
from isochamber.build.state import State
from isochamber.launch import command, pins, records

DEADLINE = 30.0  # seconds for an event that takes milliseconds; only a failing test waits that long
UID_COUNT = 65536
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/home",
    "LANG": "C.UTF-8",
    "container": "isochamber",
}

FILTERS = filters.Wanted(filters.default())  # what every tenant gets
UNFILTERED: dict[str, object] = {"mode": "none", "filters": [], "learned": None}  # a control

Done = subprocess.CompletedProcess[str]


def service(**changes: Any) -> dict[str, Any]:
    """Return the entry's part for the supervisor, with the defaults of tenants.yaml."""
    return {
        "restart": "no", "retries": 0, "after": [], "ready": "started", "health": None,
        "stop": {"signal": "TERM", "grace": 10}, "warm": 0,
        "logs": {"size": 1 << 20, "count": 3, "journald": False}, **changes,
    }  # fmt: skip


class Tenant:
    """One entry of containers.json with its directories, in a state directory shared by the session."""

    def __init__(self, root: Path, base: str, number: int, **changes: Any) -> None:
        self.root = root
        self.tid = f"{os.getpid():08x}{number:024x}"
        self.name = f"tenant{number}"
        # Apart for every test process of the machine, inside systemd's container range.
        self.uid_base = 524288 + UID_COUNT * ((os.getpid() * 61 + number) % 20000)
        self.directory = root / "tenants_fs" / self.tid
        self.home = root / "tenants_persist" / self.tid / "home"
        for name in ("upper", "workdir"):
            path = self.directory / name
            path.mkdir(parents=True)
            os.chown(path, self.uid_base, self.uid_base)
        (self.directory / "overlay").mkdir()
        self.home.mkdir(parents=True)
        self.entry: dict[str, Any] = {
            "tid": self.tid, "cname": self.name, "dependencies": "", "init": "/bin/true", "version": 1,
            "name": self.name, "argv": ["/bin/true"], "env": dict(ENVIRONMENT), "cwd": "/", "hostname": self.tid,
            "uid": 0, "gid": 0, "uid_base": self.uid_base, "uid_count": UID_COUNT, "lowers": [base],
            "upper": self._relative("upper"), "workdir": self._relative("workdir"),
            "overlay": self._relative("overlay"), "home": f"tenants_persist/{self.tid}/home", "ipc": None,
            "network": "none", "net": None, "capabilities": [], "devices": [], "read_only": False, "disk": None,
            "seccomp": FILTERS.entry(),
            "tmpfs": {"tmp": 1 << 26, "shm": 1 << 26},
            "rlimits": {"NOFILE": 1024, "CORE": 0}, "limits": {}, "limits_required": [], "service": service(),
            "package": "/nowhere", "inputs": [], "digest": "",
        }  # fmt: skip
        FILTERS.ensure(State(root))
        self.change(**changes)

    def _relative(self, name: str) -> str:
        return f"tenants_fs/{self.tid}/{name}"

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def containers(self) -> Path:
        return self.root / "containers.json"

    @property
    def group(self) -> Path | None:
        """Its cgroup, as a path that exists only while it runs."""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if " - cgroup2 " in line:
                return Path(line.split()[4], paths.cgroup_parent(), self.tid)
        return None

    def change(self, **changes: Any) -> None:
        """Change the entry, and write the file with it as its only one."""
        self.entry.update(changes)
        write_entries(self.containers, [self.entry])

    def words(self, *command_words: str, options: tuple[str, ...] = ()) -> list[str]:
        """Return the launcher's command line."""
        after = ["--", *command_words] if command_words else []
        return command.argv("run", "--root", str(self.root), self.name, *options, *after)

    def run(self, *command_words: str, options: tuple[str, ...] = (), **keywords: Any) -> Done:
        """Run the entry's own program, or ``command_words``, to the end."""
        write_entries(self.containers, [self.entry])
        return run(self.words(*command_words, options=options), **keywords)

    def sh(self, script: str, **keywords: Any) -> Done:
        """Run a shell script as the tenant."""
        return self.run("/bin/sh", "-c", script, **keywords)

    def output(self, script: str, **keywords: Any) -> str:
        """Return what a shell script prints as the tenant; it must succeed."""
        done = self.sh(script, **keywords)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    def perl(self, script: str, **keywords: Any) -> str:
        """Return what a perl script prints as the tenant; it must succeed."""
        done = self.run("/usr/bin/perl", "-e", script, **keywords)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\n")

    @contextmanager
    def started(self, script: str, *, options: tuple[str, ...] = ()) -> Iterator["Started"]:
        """Start a shell script that prints a line when it is ready; killed at the end, launcher and all."""
        write_entries(self.containers, [self.entry])
        process = subprocess.Popen(
            self.words("/bin/sh", "-c", script, options=options),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        with process:
            try:
                yield Started(self, process)
            finally:
                process.kill()
                process.wait(DEADLINE)
                wait_until_free(self.tid)

    def processes(self) -> list[int]:
        """Return every process of the machine that runs under one of its ids."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if self.uid_base <= os.stat(f"/proc/{pid}").st_uid < self.uid_base + UID_COUNT:
                    found.append(int(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found


class Started:
    """A tenant that runs while the test looks at it."""

    def __init__(self, tenant: Tenant, launcher: "subprocess.Popen[str]") -> None:
        self.tenant = tenant
        self.launcher = launcher
        assert self.line() == "ready"
        record = records.settled(tenant.tid)  # its keeper writes it meanwhile
        assert record is not None
        self.record = record

    def line(self) -> str:
        """Return the next line the tenant writes."""
        output = cast(IO[str], self.launcher.stdout).fileno()
        line = b""
        while not line.endswith(b"\n"):  # a byte at a time: a buffer would hide the next line from select
            assert select.select([output], [], [], DEADLINE)[0], f"the tenant said nothing but {line!r}"
            byte = os.read(output, 1)
            if not byte:
                break
            line += byte
        return line.decode().rstrip("\n")

    def say(self, line: str) -> None:
        """Write a line to the tenant's standard input."""
        cast(IO[str], self.launcher.stdin).write(f"{line}\n")

    def end(self) -> int:
        """Wait for the launcher and return its exit code."""
        return self.launcher.wait(DEADLINE)


def run(words: list[str], **keywords: Any) -> Done:
    """Run a command to its end, text output captured."""
    merged: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "stdin": subprocess.DEVNULL}
    merged.update(keywords)
    return cast(Done, subprocess.run(words, check=False, **merged))


def write_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write containers.json as the registry does: one entry a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


def wait_until_free(tid: str) -> None:
    """Return when nothing of a tenant's start is left; by event: the end of its keeper."""
    while records.held(tid):
        record = records.running(tid)
        if record is not None:
            wait_for_end(record.keeper)


def wait_for_end(pid: int) -> None:
    """Return when the process ``pid`` has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], DEADLINE)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


def host_mounts() -> list[str]:
    """Return the targets of all mounts of the host but the pins."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sorted(line.split()[4] for line in lines if " - nsfs " not in line)


def forget(tenant: Tenant) -> None:
    """Remove the pins of a tenant, and check that nothing else was left of it."""
    assert not records.held(tenant.tid)
    assert records.running(tenant.tid) is None
    assert tenant.processes() == []
    assert tenant.group is None or not tenant.group.exists()
    pins.remove(tenant.tid)
