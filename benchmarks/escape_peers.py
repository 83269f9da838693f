"""The escape suite's attempts under other container runtimes, as Debian ships them, side by side with ours.

    .venv/bin/python benchmarks/escape_peers.py [--write]

Runs as root. Each peer gets the same root file system (our base) and the same scripts
(tests/escape, those that make sense below another runtime), with its own defaults. A
peer that cannot run here is named with the reason. An attempt counts only if it works
in a bare chroot on this kernel: what the kernel lacks, nobody blocks. --write puts the
result into escape_peers.json beside this file and the table into docs/explanation/security.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))

from tests.conftest import MINIMAL, SCRATCH  # noqa: E402 - found by the line above
from tests.escape import table  # noqa: E402
from tests.escape.attempts import ALL_ON, Attempt  # noqa: E402
from tests.escape.worlds import Worlds, compile_probe, read_batch, write_batch  # noqa: E402

BARE = "bare chroot"
OURS = "isochamber"
SECURITY = PROJECT / "docs/explanation/security.md"
RESULT = Path(__file__).with_suffix(".json")
MARKS = ("<!-- escape_peers: begin -->", "<!-- escape_peers: end -->")
_MINUTES = 5

# What is looked at before what changes the view: the same order for everybody.
ATTEMPTS = sorted((attempt for attempt in table.ATTEMPTS if attempt.peers), key=lambda attempt: attempt.batch != "view")

GROUPS = (
    ("file system", "F", ""), ("kernel, by libc and syscall(2)", "K", "64"), ("kernel, by the 32-bit entry", "K", "32"),
    ("cgroup", "C", ""), ("scheduling", "R", ""),
)  # fmt: skip


class CannotRunError(Exception):
    """A peer that this machine can't run; the text says why."""


def run(words: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, text output captured, stdin empty."""
    merged: dict[str, object] = {
        "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True,
        "timeout": 60 * _MINUTES, "errors": "replace", **options,
    }  # fmt: skip
    argv = [str(word) for word in words]
    return subprocess.run(argv, check=False, **merged)  # type: ignore[call-overload,no-any-return]


def need(program: str, package: str) -> str:
    """Return the program's path; CannotRunError names the Debian package."""
    found = shutil.which(program)
    if found is None:
        raise CannotRunError(f"{package} is not installed")
    return found


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the runner's output; CannotRunError with the peer's last words when the runner never ran."""
    if "@@ " not in done.stdout:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise CannotRunError(re.sub(r"\x1b\[[0-9;]*m", "", lines[-1])[:160])
    return done.stdout


def bare(root: Path, _scratch: Path) -> str:
    """Run in a chroot with every right of the host's root, in namespaces of its own so that the host survives it."""
    setup = f"mount -t proc proc {root}/proc; mount -t sysfs sysfs {root}/sys; mount --rbind /dev {root}/dev"
    setup += f"; mount -t devpts -o newinstance,ptmxmode=0666 d {root}/dev/pts"
    script = f"{setup}; exec chroot {root} /bin/sh /home/runner"
    return output_of(run(["unshare", "-muipn", "--fork", "--kill-child", "/bin/sh", "-c", script]))


def bubblewrap(root: Path, _scratch: Path) -> str:
    """Run bwrap --unshare-all as root."""
    return output_of(run(_bwrap(root)))


def bubblewrap_of_a_user(root: Path, scratch: Path) -> str:
    """Run bwrap --unshare-all as an ordinary user, as desktops do."""
    scratch.chmod(0o711)
    try:
        return output_of(run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *_bwrap(root)]))
    finally:
        scratch.chmod(0o700)


def _bwrap(root: Path) -> list[str | Path]:
    own = "/tmp"  # noqa: S108 - inside
    view: list[str | Path] = ["--bind", root, "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", own]
    return [need("bwrap", "bubblewrap"), "--unshare-all", "--die-with-parent", *view, "/bin/sh", "/home/runner"]


def nspawn(root: Path, _scratch: Path) -> str:
    """Run systemd-nspawn -U; without a running systemd it can't register."""
    program = need("systemd-nspawn", "systemd-container")
    extra = [] if Path("/run/systemd/system").is_dir() else ["--register=no", "--keep-unit"]
    words: list[str | Path] = [program, "-U", "-q", *extra, "--pipe", "-D", root, "/bin/sh", "/home/runner"]
    return output_of(run(words, env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "0"}))


# crun runs on v1 controllers or on a v2 tree, and not where the one stands beside the other.
_WITHOUT_V2 = ["unshare", "-m", "/bin/sh", "-c", 'umount -l /sys/fs/cgroup/unified; exec "$@"', "sh"]


def _oci(program: str) -> Callable[[Path, Path], str]:
    def start(root: Path, scratch: Path) -> str:
        """Run the runtime's own default configuration, with our command, and a root that can be written to."""
        runtime = need(program, program)
        bundle = scratch / f"bundle-{program}"
        bundle.mkdir()
        made = run([runtime, "spec"], cwd=bundle)
        if made.returncode:
            raise CannotRunError(made.stdout.strip()[-160:])
        config = json.loads((bundle / "config.json").read_text())
        config["process"].update(args=["/bin/sh", "/home/runner"], terminal=False)
        config["root"] = {"path": str(root), "readonly": False}
        (bundle / "config.json").write_text(json.dumps(config))
        state: list[str | Path] = ["--root", scratch / f"state-{program}"]
        where = _WITHOUT_V2 if program == "crun" and Path("/sys/fs/cgroup/unified").is_dir() else []
        name = f"isochamber-peer-{os.getpid()}"
        try:
            return output_of(run([*where, runtime, *state, "run", "--bundle", bundle, name]))
        finally:
            run([*where, runtime, *state, "delete", "--force", name])

    return start


def docker(root: Path, scratch: Path) -> str:
    """Run docker run --network none, by a daemon of our own."""
    daemon = need("dockerd", "docker.io")
    client = next((path for path in ("/usr/bin/docker",) if Path(path).exists()), None) or need("docker", "docker.io")
    socket = f"unix://{scratch}/docker.sock"
    words: list[str | Path] = [
        daemon, "--data-root", scratch / "docker", "--exec-root", scratch / "docker-run", "--host", socket,
        "--pidfile", scratch / "docker.pid", "--bridge", "none", "--iptables=false",
    ]  # fmt: skip
    with (
        (scratch / "docker.log").open("w") as log,
        subprocess.Popen(list(map(str, words)), stdout=log, stderr=log) as own,
    ):
        try:
            end = time.monotonic() + 60
            while run([client, "-H", socket, "info"]).returncode:
                if own.poll() is not None or time.monotonic() > end:
                    lines = (scratch / "docker.log").read_text().splitlines()
                    raise CannotRunError(f"its daemon: {lines[-1][-160:]}")
                time.sleep(0.2)
            archive = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
            made = run([client, "-H", socket, "import", "-", "isochamber-peer"], stdin=archive.stdout)
            archive.wait()
            if made.returncode:
                raise CannotRunError(made.stdout.strip()[-160:])
            command = ["run", "--rm", "--network", "none", "isochamber-peer", "/bin/sh", "/home/runner"]
            return output_of(run([client, "-H", socket, *command]))
        finally:
            own.terminate()
            own.wait(60)


PEERS: dict[str, Callable[[Path, Path], str]] = {
    BARE: bare,
    "bwrap, by root": bubblewrap,
    "bwrap, by a user": bubblewrap_of_a_user,
    "systemd-nspawn -U": nspawn,
    "docker": docker,
    "runc": _oci("runc"),
    "crun": _oci("crun"),
}


def base(scratch: Path) -> tuple[Path, str]:
    """Return a state directory with our base in it, and where the base lies."""
    root = scratch / "state"
    known = os.environ.get("ISOCHAMBER_TEST_MASTER")
    if known and (Path(known) / "base_fs").is_dir():
        shutil.copytree(known, root, symlinks=True)
    else:
        tenants = scratch / "tenants.yaml"
        tenants.write_text(MINIMAL.format(root=root))
        words = [sys.executable, "-m", "isochamber.tasks", "base_fs:default"]
        run(words, env={**os.environ, "ISOCHAMBER_TENANTS": str(tenants)}, cwd=PROJECT, check=True, timeout=1200)
    (product,) = (root / "base_fs").iterdir()
    return root, f"base_fs/{product.name}/rootfs"


def ours(worlds: Worlds) -> dict[str, str]:
    """Return our own words, from a tenant that has the defaults."""
    return {**worlds.batch(ALL_ON, "view"), **worlds.batch(ALL_ON, "calls")}


def measure(scratch: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return (runtime -> attempt -> word, runtime -> why it can't run)."""
    root, rootfs = base(scratch)
    worlds = Worlds(root, rootfs, compile_probe(scratch), scratch, table.ATTEMPTS)
    words: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    try:
        words[OURS] = ours(worlds)
        for name, start in PEERS.items():
            copy = scratch / "rootfs"  # a fresh one: nspawn changes owners, and attempts change files
            subprocess.run(["cp", "-a", root / rootfs, copy], check=True)
            write_batch(copy / "home", worlds.probe, ATTEMPTS, worlds.sentinel.pid)
            try:
                words[name] = read_batch(ATTEMPTS, start(copy, scratch))
            except (CannotRunError, subprocess.TimeoutExpired) as error:
                missing[name] = str(error)
            finally:
                shutil.rmtree(copy)
    finally:
        worlds.close()
    return words, missing


def blocked(attempt: Attempt, word: str | None) -> bool:
    """Say whether the attempt got nothing; one that never spoke was ended with everything, and counts as blocked."""
    return word is None or not attempt.works(word)


def group_of(attempt: Attempt) -> str:
    """Return the row of the table that an attempt counts in."""
    way = "32" if "int 0x80" in attempt.name else "64"
    return next(title for title, row, only in GROUPS if attempt.row.startswith(row) and only in ("", way))


def markdown(words: dict[str, dict[str, str]], missing: dict[str, str], counted: list[Attempt]) -> str:
    """Return the table of blocked attempts by group."""
    runtimes = [OURS, *(name for name in PEERS if name in words and name != BARE)]
    lines = [
        f"| blocked, of those that work in a {BARE} | {' | '.join(runtimes)} |",
        "| --- |" + " --- |" * len(runtimes),
    ]
    for title, _, _ in GROUPS:
        mine = [attempt for attempt in counted if group_of(attempt) == title]
        cells = [sum(blocked(attempt, words[name].get(attempt.name)) for attempt in mine) for name in runtimes]
        lines.append(f"| {title}, {len(mine)} | {' | '.join(map(str, cells))} |")
    cells = [sum(blocked(attempt, words[name].get(attempt.name)) for attempt in counted) for name in runtimes]
    lines.append(f"| all {len(counted)} | {' | '.join(map(str, cells))} |")
    lines += ["", *(f"{name} could not run on that machine: {why}." for name, why in missing.items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Measure, print, and with --write keep; exit code 1 when a peer blocks what we do not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="keep the result, and put the table into security.md")
    options = parser.parse_args()
    os.environ.setdefault("ISOCHAMBER_RUN", tempfile.mkdtemp(prefix="isochamber-test-", dir="/run"))
    os.environ.setdefault("ISOCHAMBER_CGROUP", Path(os.environ["ISOCHAMBER_RUN"]).name)
    scratch = Path(tempfile.mkdtemp(prefix="isochamber-test-peers-", dir=SCRATCH))
    try:
        words, missing = measure(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    counted = [attempt for attempt in ATTEMPTS if not blocked(attempt, words[BARE].get(attempt.name))]
    only = {
        attempt.name: [
            name for name in words if name not in (OURS, BARE) and blocked(attempt, words[name].get(attempt.name))
        ]
        for attempt in counted
        if not blocked(attempt, words[OURS].get(attempt.name))
    }
    text = markdown(words, missing, counted)
    sys.stdout.write(text)
    for name, by in only.items():
        sys.stdout.write(f"not blocked by us: {name}; blocked by {', '.join(by) or 'nobody'}\n")
    if options.write:
        result = {"kernel": platform.release(), "attempts": len(counted), "missing": missing, "words": words}
        RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        before, _, rest = SECURITY.read_text().partition(MARKS[0])
        SECURITY.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    return int(any(by for by in only.values()))


if __name__ == "__main__":
    sys.exit(main())
