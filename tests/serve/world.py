"""A supervisor over tenants of its own, as a process, and what is left when it is gone."""

import contextlib
import hashlib
import json
import os
import pty
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from isochamber import paths
from isochamber.launch import records
from isochamber.serve import client, link, wire
from tests.launch import tenants
from tests.launch.tenants import Tenant

DEADLINE = 60.0  # seconds for an event that takes milliseconds; only a failing test waits that long
FOREVER = ["/bin/sh", "-c", "trap 'exit 3' TERM; echo up; while :; do sleep 1000 & wait; done"]
STUBBORN = ["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 1000; done"]


class World:
    """A state directory with several tenants, and the supervisor over it."""

    def __init__(self, root: Path, base: str) -> None:
        self.root, self.base = root, base
        self.tenants: list[Tenant] = []
        self.process: subprocess.Popen[str] | None = None
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.directory = tempfile.mkdtemp(prefix="isochamber-test-", dir="/run")
        self.notify.bind(f"{self.directory}/notify")
        self.notify.settimeout(DEADLINE)

    def add(self, number: int, **changes: Any) -> Tenant:
        service = {**tenants.service(), **changes.pop("service", {})}
        made = Tenant(self.root, self.base, number, **{"argv": FOREVER, "service": service, **changes})
        self.tenants.append(made)
        self.write()
        return made

    def write(self) -> None:
        stage = self.root / "containers.json.new"
        for tenant in self.tenants:
            content = json.dumps({**tenant.entry, "digest": ""}, sort_keys=True)
            tenant.entry["digest"] = hashlib.sha256(content.encode()).hexdigest()[:40]
        tenants.write_entries(stage, [tenant.entry for tenant in self.tenants])
        stage.rename(self.root / paths.CONTAINERS)

    # The supervisor.

    def begin(self, *options: str, prefix: tuple[str, ...] = (), **env: str) -> None:
        """Start it, and return when it says that it is ready."""
        words = [sys.executable, "-m", "isochamber", "--root", str(self.root), "serve", *options]
        self.process = subprocess.Popen(
            [*prefix, *words],
            env={**os.environ, "NOTIFY_SOCKET": f"{self.directory}/notify", **env},
            stdin=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        while "READY=1" not in self.hear():
            pass

    def hear(self) -> str:
        """Return the supervisor's next word to its service manager."""
        return self.notify.recv(4096).decode()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE)
        self.process = None

    def end(self) -> int:
        """SIGTERM."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(DEADLINE)
        self.process = None
        return code

    def close(self) -> None:
        """End everything, then look that nothing is left."""
        if self.process is not None:
            self.end()
        end_nursery()
        for tenant in self.tenants:
            tenants.wait_until_free(tenant.tid)
            tenants.forget(tenant)
        self.notify.close()
        for name in os.listdir(self.directory):
            os.unlink(f"{self.directory}/{name}")
        os.rmdir(self.directory)

    # What an operator does.

    def ask(self, verb: str, *names: str, descriptors: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
        """Ask as a client does; raises IsochamberError."""
        end = client.need()
        end.settimeout(DEADLINE)
        try:
            tenant = {"tenants": list(names)} if names else {}
            return client.ask(end, {"verb": verb, **tenant, **more}, descriptors)
        finally:
            end.close()

    def stream(self, verb: str, **more: Any) -> Generator[dict[str, Any], None, None]:
        """Yield the items of a stream; the connection closes with the generator."""
        end = client.need()
        end.settimeout(DEADLINE)
        try:
            for answer in client.stream(end, {"verb": verb, **more}):
                if "item" in answer:
                    yield answer["item"]
        finally:
            end.close()

    def row(self, tenant: Tenant) -> dict[str, Any]:
        """Return what ps says of a tenant."""
        return next(row for row in self.ask("ps", all=True)["rows"] if row["tid"] == tenant.tid)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "isochamber", "--root", str(self.root), *words]

    def cli(self, *words: str, **options: Any) -> tenants.Done:
        """Run the isochamber command."""
        return tenants.run(self.command(*words), cwd=Path(__file__).parents[2], **options)

    def output(self, *words: str) -> str:
        done = self.cli(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def said(self, tenant: Tenant, text: str) -> None:
        """Return when the tenant has written ``text``."""
        with contextlib.closing(self.stream("logs", tenant=tenant.name, follow=True)) as lines:
            found = any(text in line["text"] for line in lines)
        assert found, f"{tenant.name} ended and never said {text!r}"

    def event(self, wanted: str, tenant: Tenant, since: float) -> dict[str, Any]:
        """Return the first such event after ``since``, waited for."""
        with contextlib.closing(self.stream("events", since=since)) as events:
            for event in events:
                if event["event"] == wanted and event.get("tid") == tenant.tid:
                    return event
        raise AssertionError("the stream of events ended")


def end_nursery() -> None:
    """End the nursery, and wait until it and everything in it has ended."""
    end = link.connect()
    if end is None:
        return
    wire.send(end, {"do": "list", "id": 1})
    message: dict[str, Any] | None = {"on": ""}
    while message is not None and message["on"] != "done":
        message, _ = wire.receive(end)
    assert message is not None
    pidfd = os.pidfd_open(message["pid"])
    wire.send(end, {"do": "quit"})
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)
    end.close()


def nursery_of(tenant: Tenant) -> int:
    """Return the pid of the nursery that keeps a running tenant."""
    record = records.running(tenant.tid)
    assert record is not None
    assert record.shared
    return record.keeper


def gone(tenant: Tenant) -> bool:
    """Say whether nothing of a tenant is left."""
    return not tenant.processes() and not records.held(tenant.tid)


def children_of(pid: int) -> set[int]:
    """Return the processes whose parent is ``pid``."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def descriptors_of(pid: int) -> dict[str, int]:
    """Return what a process has open, counted by kind."""
    counted: dict[str, int] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            kind = os.readlink(f"/proc/{pid}/fd/{name}").split(":")[0]
            counted[kind] = counted.get(kind, 0) + 1
    return counted


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Return when ``condition`` holds, for what no event tells of."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        select.select([], [], [], 0.01)


class Terminal:
    """A command on a terminal of its own: what a person at the keyboard would see and type."""

    def __init__(self, words: list[str]) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.chdir(Path(__file__).parents[2])
            os.execv(words[0], words)
        self.seen = b""

    def expect(self, text: bytes) -> bytes:
        """Read until ``text`` is on the screen; returns what came before and it."""
        deadline = time.monotonic() + DEADLINE
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], self.seen
            try:
                data = os.read(self.master, 65536)
            except OSError:
                data = b""
            assert data, f"ended without {text!r}: {self.seen!r}"
            self.seen += data
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def end(self) -> int:
        """Read to the end and return the exit code."""
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 65536):
                self.seen += data
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
