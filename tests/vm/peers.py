"""The same cuts for others' stores: podman's and docker's, on a recorded disk, natively.

    python -m tests.vm.peers podman|docker [CUTS] [SEED]

A loop imports images, makes containers, runs them and removes them, on ext4. Then the disk is put into the
states that cuts at random moments leave (see :mod:`tests.vm.writelog`), half of them with every write until the
cut, as when an emulator is killed, half with only some of those that no flush followed. Each state is looked at
as after a boot: whether the store comes up, what had been said to be done is there whole, and new work can be done.
No registry and no network: the image is a shell and some files.
"""

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.crash.world import STAND_IN
from tests.vm import aftercut, writelog

SIZE = "1G"
_FILES = 40
_SHOW = f"i=0; while [ $i -lt {_FILES} ]; do read line </data/$i; echo $line; i=$((i+1)); done"
_ROUNDS = 4
_LONG = 60.0


def _wanted(version: int) -> str:
    return "".join(f"{number} of {version}\n" for number in range(_FILES))


class Podman:
    """podman, without anything of its own outside the given directories."""

    def __init__(self, disk: Path, run: Path) -> None:
        self.words = [
            "podman", "--root", disk / "podman", "--runroot", run / "podman", "--tmpdir", run / "podman-tmp",
            "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "none",
            "--log-level", "error", "--runtime", "runc",
        ]  # fmt: skip
        self.limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        self.prefix = "localhost/"

    def start(self) -> None:
        """Nothing is to be started."""

    def stop(self) -> None:
        """Nothing runs."""

    def do(self, *words: str | Path) -> str:
        """Give one command, which must succeed; returns what it wrote."""
        argv = [str(word) for word in (*self.words, *words)]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_LONG, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise OSError(f"{words[0]}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def run(self, version: int) -> str:
        """Run a container of an image to its end; returns what it wrote."""
        return self.do("run", "--rm", *self.limits, "--network", "none", f"img:{version}", "/bin/sh", "-c", _SHOW)

    def create(self, name: str, version: int) -> None:
        """Make a container."""
        words = ("--network", "none", f"img:{version}", "/bin/sh", "-c", _SHOW)
        self.do("create", "--name", name, *self.limits, *words)


class Docker(Podman):
    """docker: a daemon, and what asks it."""

    def __init__(self, disk: Path, run: Path) -> None:
        super().__init__(disk, run)
        self.limits = []
        self.prefix = ""
        self._socket = f"unix://{run}/docker.sock"
        self.words = ["/usr/bin/docker", "-H", self._socket]
        self._argv: list[str | Path] = [
            "dockerd", "--data-root", disk / "docker", "--exec-root", run / "docker", "-H", self._socket,
            "--pidfile", run / "docker.pid", "--bridge", "none", "--iptables=false", "--ip6tables=false",
            "--storage-driver", "overlay2", "--exec-opt", "native.cgroupdriver=cgroupfs",
        ]  # fmt: skip
        self._log = run / "docker.log"
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        with self._log.open("wb") as log:
            self._daemon = subprocess.Popen(self._argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _LONG
        while True:
            try:
                self.do("version")
                return
            except OSError as error:
                if self._daemon.poll() is not None or time.monotonic() > deadline:
                    said = self._log.read_text(errors="replace")[-400:]
                    raise OSError(f"the daemon does not come up: {error}: {said}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop the daemon in order."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(60)


PEERS: dict[str, type[Podman]] = {"podman": Podman, "docker": Docker}
Done = dict[str, list[Any]]  # "images": versions, "containers": [name, version]


def _record(peer: Podman, directory: Path) -> list[tuple[int, int, Done]]:
    """Do the loop; returns, for each step, the number of entries before and after it, and what is there then."""
    there: Done = {"images": [], "containers": []}
    log = writelog.Log(directory / "log")
    told: list[tuple[int, int, Done]] = [(0, 0, {"images": [], "containers": []})]

    def step(work: Callable[[], object]) -> None:
        before = log.read()
        work()
        told.append((before, log.read(), json.loads(json.dumps(there))))

    peer.start()
    for version in range(1, _ROUNDS + 1):
        there["images"].append(version)
        step(lambda version=version: peer.do("import", directory / f"image-{version}.tar", f"img:{version}"))  # type: ignore[misc]
        there["containers"].append([f"c{version}", version])
        step(lambda version=version: peer.create(f"c{version}", version))  # type: ignore[misc]
        step(lambda version=version: peer.do("start", "-a", f"c{version}"))  # type: ignore[misc]
        step(lambda version=version: peer.run(version))  # type: ignore[misc]
        if version > 1:  # a change: the former version goes
            there["containers"].remove([f"c{version - 1}", version - 1])
            step(lambda version=version: peer.do("rm", f"c{version - 1}"))  # type: ignore[misc]
            there["images"].remove(version - 1)
            step(lambda version=version: peer.do("rmi", f"img:{version - 1}"))  # type: ignore[misc]
    peer.stop()
    return told


def _judge(peer: Podman, directory: Path, before: Done, after: Done) -> list[str]:
    """Return what is wrong, each with its kind first."""
    wrong = []

    def attempt(kind: str, work: Callable[[], object]) -> Any:
        try:
            return work()
        except (OSError, subprocess.TimeoutExpired) as error:
            wrong.append(f"{kind}: {error}")
            return None

    attempt("does not come up", peer.start)
    attempt("does not list", lambda: (peer.do("images"), peer.do("ps", "-a")))
    for version in before["images"]:
        if version in after["images"]:
            said = attempt("image does not run", lambda version=version: peer.run(version))  # type: ignore[misc]
            if said is not None and said != _wanted(version):
                wrong.append(f"image is not whole: {version}: {said[:200]!r}")
    for name, version in before["containers"]:
        if [name, version] in after["containers"]:
            said = attempt("container does not start", lambda name=name: peer.do("start", "-a", name))  # type: ignore[misc]
            if said is not None and said != _wanted(version):
                wrong.append(f"container is not whole: {name}: {said[:200]!r}")
    attempt("no new image", lambda: peer.do("import", directory / "image-9.tar", "img:9"))
    attempt("no new container", lambda: peer.create("c9", 9))
    said = attempt("new container does not run", lambda: peer.run(9))
    if said is not None and said != _wanted(9):
        wrong.append(f"new container does not run: {said[:200]!r}")
    if not wrong:
        attempt("can't be stopped", peer.stop)
    return wrong


def _images(directory: Path) -> None:
    tree = directory / "tree"
    tree.mkdir()
    (directory / "tool").write_text(STAND_IN)
    subprocess.run(["sh", directory / "tool", tree, "none"], check=True)
    (tree / "data").mkdir()
    for version in (*range(1, _ROUNDS + 1), 9):
        for number in range(_FILES):
            (tree / "data" / str(number)).write_text(f"{number} of {version}\n")
        subprocess.run(["tar", "-C", tree, "-cf", directory / f"image-{version}.tar", "."], check=True)


def _inside(peer: str, task: str, directory: Path) -> None:
    """What runs as PID 1 of namespaces of its own: at its end everything it started is killed."""
    # In our mount namespace. Both write down where they lie: it must be the same place after a cut.
    subprocess.run(["mount", "-t", "tmpfs", "peers", "/mnt"], check=True)
    run, disk = Path("/mnt/run"), Path("/mnt/disk")
    run.mkdir()
    disk.mkdir()
    made = PEERS[peer](disk, run)
    job = json.loads((directory / "job").read_text())
    shared = Path(job["shared"])
    if task == "record":
        with writelog.recorded(directory / "image", directory / "log") as exported, aftercut.mounted(exported, disk):
            result: Any = _record(made, shared)
    else:
        subprocess.run(["mount", "-o", "loop,noatime", directory / "image", disk], check=True)
        result = _judge(made, shared, job["before"], job["after"])
    (directory / "result").write_text(json.dumps(result))
    os._exit(0)  # the mount goes with the namespace


def _apart(peer: str, task: str, directory: Path, **job: Any) -> Any:
    (directory / "job").write_text(json.dumps(job))
    subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--net", "--mount-proc", sys.executable, "-m",
         "tests.vm.peers", "--inside", task, str(directory), peer],
        check=True, timeout=600,
    )  # fmt: skip
    return json.loads((directory / "result").read_text())


def cuts(peer: str, number: int, seed: int, directory: Path) -> dict[str, list[str]]:
    """Return what was wrong, by state."""
    _images(directory)
    initial = directory / "initial.img"
    subprocess.run(["truncate", "-s", SIZE, initial], check=True)
    options = "lazy_journal_init=1,lazy_itable_init=1"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", options, initial], check=True)
    writelog.copy(initial, directory / "image")
    told = _apart(peer, "record", directory, shared=str(directory))
    log = writelog.Log(directory / "log")
    log.read()
    (directory / "log").unlink()
    disk = writelog.Disk(initial, log.entries, directory / "disk.img")
    found = {}
    for state in writelog.states(log.entries, seed, number):
        done = [each for each in told if each[1] <= state.reached][-1]
        # A step that had begun may have taken away what it takes away.
        after = told[min(told.index(done) + 1, len(told) - 1)]
        place = Path(tempfile.mkdtemp(dir=directory))
        disk.make(state, place / "image")
        found[str(state)] = _apart(peer, "judge", place, shared=str(directory), before=done[2], after=after[2])
        for what in found[str(state)]:
            sys.stdout.write(f"{len(found)}: {str(state)[:160]}: {what}\n")
        sys.stdout.flush()
        shutil.rmtree(place)
    disk.close()
    return found


def main() -> None:
    """Make the cuts and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", nargs=2)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("cuts", nargs="?", type=int, default=50)
    parser.add_argument("seed", nargs="?", type=int, default=1)
    given = parser.parse_args()
    if given.inside:
        _inside(given.peer, given.inside[0], Path(given.inside[1]))
        return
    with tempfile.TemporaryDirectory(prefix="isochamber-test-", dir="/dev/shm") as directory:
        found = cuts(given.peer, given.cuts, given.seed, Path(directory))
    kinds = collections.Counter(kind for wrong in found.values() for kind in {what.partition(":")[0] for what in wrong})
    broken = sum(bool(wrong) for wrong in found.values())
    sys.stdout.write(f"{given.peer}: {broken} of {len(found)} broken; {dict(kinds)}\n")


if __name__ == "__main__":
    main()
