"""Where attempts run: real tenants, with every guard on, or with some taken off in the launcher's own process."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isochamber.launch import pins
from tests.conftest import PROJECT
from tests.escape import guards
from tests.escape.attempts import ALL_ON, Attempt, Off
from tests.escape.host import boot_time
from tests.launch import tenants
from tests.launch.tenants import Done, Tenant

_numbers = itertools.count(5000)

PATIENCE = 60  # seconds that one attempt may take; only one that hangs does

# Each attempt is a script of its own; its last line is its word, unless it was killed.
RUNNER = """\
cd /tmp
for file in /home/attempts/*; do
    out=$(timeout -s KILL {patience} /bin/sh "$file" 2>&1)
    status=$?
    echo "@@ ${{file##*/}} $status $(echo "$out" | tail -n 1)"
done
"""

LAUNCHER = """\
import os, sys
sys.path.insert(0, {project!r})
from isochamber.launch import (
    capabilities, devices, foreground, ipc, keeper, main, masking, mounts, pins, records, running, seccomp, start,
    syscalls, verify,
)
{sabotage}
sys.exit(main.main(sys.argv[1:]))
"""

SIGSYS = 31


def compile_probe(directory: Path) -> Path:
    """Compile probe.c, statically: it must run over any root."""
    source, program = Path(__file__).with_name("probe.c"), directory / "probe"
    words = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source]
    subprocess.run([str(word) for word in words], check=True, timeout=120)
    program.chmod(0o755)
    return program


def write_batch(directory: Path, probe: Path, attempts: Iterable[Attempt], host_pid: int) -> None:
    """Write the runner, the probe and a script for each attempt into ``directory``: what is then /home."""
    shutil.copy(probe, directory / "probe")
    (directory / "runner").write_text(RUNNER.format(patience=PATIENCE))
    (directory / "attempts").mkdir()
    for number, attempt in enumerate(attempts):
        script = attempt.script.replace("@HOSTPID@", str(host_pid))
        (directory / "attempts" / f"{number:04}").write_text(script + "\n")


def read_batch(attempts: list[Attempt], output: str) -> dict[str, str]:
    """Return attempt name -> word from the runner's output; one that said nothing has no word."""
    words = {}
    for line in output.splitlines():
        if line.startswith("@@ "):
            number, status, word = (*line.split(" ", 3)[1:], "", "")[:3]
            if status == str(128 + SIGSYS):
                word = "SIGSYS"
            elif status == "137":
                word = "took too long"
            words[attempts[int(number)].name] = word.strip()
    return words


class Worlds:
    """All the worlds of one session, each started when it is first asked for."""

    def __init__(self, root: Path, base: str, probe: Path, scratch: Path, table: list[Attempt]) -> None:
        self.root, self.base, self.probe, self.scratch, self.table = root, base, probe, scratch, table
        self.sentinel = subprocess.Popen(["sleep", "infinity"])
        # What every process of the host may read: only namespaces keep a tenant from it.
        self.public = Path(tempdir(scratch))
        self.canary = self.public / "canary"
        self.canary.write_text("untouched\n")
        self.canary.chmod(0o644)
        self.canary_below_the_old_root = below_the_namespaces_root(self.canary)
        self.boot_time = boot_time()
        self._batches: dict[tuple[Off, str], dict[str, str]] = {}
        self._tenants: list[Tenant] = []

    def close(self) -> None:
        """End the sentinel, and remove what the tenants left."""
        self.sentinel.kill()
        self.sentinel.wait()
        shutil.rmtree(self.public)
        for tenant in self._tenants:
            pins.remove(tenant.tid)

    def tenant(self, off: Off = ALL_ON, **changes: Any) -> Tenant:
        """Return a new tenant whose entry has the guards in ``off`` off as far as the entry says them."""
        for guard in sorted(off, key=str):
            changes = {**changes, **dict(guard.entry)}
        tenant = Tenant(self.root, self.base, next(_numbers), **changes)
        self._tenants.append(tenant)
        return tenant

    def words(self, tenant: Tenant, off: Off, *command: str, sabotage: str = "") -> list[str]:
        """Return the command line that starts ``tenant`` by the real launcher, or by one with guards taken off."""
        code = "".join(guard.launcher for guard in sorted(off, key=str)) + sabotage
        plain = tenant.words(*command)
        if not code:
            return plain
        program = LAUNCHER.format(project=str(PROJECT), sabotage=guards.LOOKING + code)
        start = plain.index(next(word for word in plain if word.endswith("__main__.py")))
        # In a private copy of the host's mounts: without some guards mounts get through to where the launcher stands.
        return ["unshare", "-m", sys.executable, "-I", "-S", "-c", program, *plain[start + 1 :]]

    def start(self, tenant: Tenant, off: Off, *command: str, sabotage: str = "", **keywords: Any) -> Done:
        """Start ``tenant`` and wait for its end."""
        tenants.write_entries(tenant.containers, [tenant.entry])
        return tenants.run(self.words(tenant, off, *command, sabotage=sabotage), **{"timeout": 300, **keywords})

    def sh(self, off: Off, script: str, *, sabotage: str = "", **changes: Any) -> Done:
        """Run a shell script in a new tenant."""
        return self.start(self.tenant(off, **changes), off, "/bin/sh", "-c", script, sabotage=sabotage)

    def word(self, off: Off, script: str, *, sabotage: str = "", **changes: Any) -> str:
        """Run a shell script in a new tenant and return its last line, or the launcher's own words."""
        done = self.sh(off, script, sabotage=sabotage, **changes)
        lines = (done.stdout or done.stderr).splitlines() or [f"exit {done.returncode}"]
        return lines[-1].strip()

    def batch(self, off: Off, name: str) -> dict[str, str]:
        """Return the word of every scripted attempt of a batch that runs with ``off`` off; one tenant runs them all."""
        if (off, name) not in self._batches:
            attempts = [
                attempt
                for attempt in self.table
                if attempt.script and attempt.batch == name and off in attempt.worlds()
            ]
            if not attempts:  # none of these is asked for
                return self._batches.setdefault((off, name), {})
            tenant = self.tenant(off)
            write_batch(tenant.home, self.probe, attempts, self.sentinel.pid)
            done = self.start(tenant, off, "/bin/sh", "/home/runner", stderr=subprocess.STDOUT, capture_output=False,
                              stdout=subprocess.PIPE)  # fmt: skip
            words = read_batch(attempts, done.stdout)
            assert words, f"the batch said nothing: {done.stdout}"
            self._batches[off, name] = words
        return self._batches[off, name]


def tempdir(scratch: Path) -> str:
    """Make a directory that everybody may read, beside the session's own."""
    import tempfile

    path = tempfile.mkdtemp(prefix="isochamber-test-public-", dir=scratch.parent)
    os.chmod(path, 0o755)
    return path


def scripted(worlds: Worlds, off: Off, attempt: Attempt) -> str:
    """Run an attempt that is a script: in the batch of its world."""
    return worlds.batch(off, attempt.batch).get(attempt.name, "said nothing")


@contextmanager
def patched(off: Off) -> Iterator[None]:
    """Take the build half's part of the guards in ``off`` off, in this process."""
    from unittest import mock

    patches = [patch for guard in off for patch in guard.patches]
    with_all = [mock.patch(name.replace(":", "."), value) for name, value in patches]
    for one in with_all:
        one.start()
    try:
        yield
    finally:
        for one in reversed(with_all):
            one.stop()


def below_the_namespaces_root(path: Path) -> str:
    """Return where ``path`` lies below the root of the mount namespace: another place when we are in a chroot."""
    code = (
        "import os, sys; from isochamber.launch import mounts; file = os.open(sys.argv[1], os.O_PATH); "
        "proc = os.open('/proc/self/fd', os.O_PATH); mounts.leave_chroot(); "
        "print(os.readlink(str(file), dir_fd=proc))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")
