"""The tools that one would use otherwise, from Debian, each told to run the same program in the same root.

A peer that can't be installed or does not run here becomes :class:`harness.Absent`,
with what it said. Each runs with its own defaults, but for the network (none, as ours).
"""

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from benchmarks import harness
from benchmarks.harness import Absent, Case
from benchmarks.world import STAMP, World
from isochamber.launch import syscalls

PACKAGES = {
    "bwrap": "bubblewrap", "crun": "crun", "runc": "runc", "systemd-nspawn": "systemd-container", "lxc-execute": "lxc",
    "dockerd": "docker.io", "podman": "podman", "buildah": "buildah", "make": "make", "ninja": "ninja-build",
    "debootstrap": "debootstrap", "mmdebstrap": "mmdebstrap", "iptables": "iptables",
}  # fmt: skip


def install(*programs: str) -> None:
    """Install what is missing from Debian; what can't be installed is found missing by who asks for it."""
    missing = [PACKAGES[name] for name in programs if shutil.which(name) is None]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update"], env=environment, check=False, capture_output=True)
        for package in missing:
            argv = ["apt-get", "install", "--yes", "--no-install-recommends", package]
            subprocess.run(argv, env=environment, check=False, capture_output=True)


def _without_the_unified_tree() -> None:
    """Give this thread a mount namespace without the second cgroup tree, and what it starts too."""
    if UNIFIED.is_dir():
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.umount2(str(UNIFIED), syscalls.MNT_DETACH)


UNIFIED = Path("/sys/fs/cgroup/unified")
_apart = ThreadPoolExecutor(1, initializer=_without_the_unified_tree)
_Result = TypeVar("_Result")


def where_it_runs(program: str, once: Callable[[], _Result]) -> Callable[[], _Result]:
    """Return ``once`` as ``program`` can do it: crun refuses a machine with two cgroup trees, so it sees one."""
    return (lambda: _apart.submit(once).result()) if program == "crun" else once


def _peer(name: str, program: str, prepare: Callable[[], list[str]], **options: object) -> Case | Absent:
    if shutil.which(program) is None:
        return Absent(name, f"Debian's package {PACKAGES[program]} could not be installed")
    try:
        argv = prepare()
        once = where_it_runs(program, harness.stamped(argv, **options))
        once()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Absent(name, " ".join(str(error).split())[:160])
    return Case(name, once)


def bwrap(world: World) -> list[str]:
    """bubblewrap: every namespace, a read-only root, no overlay (0.8 has none), no cgroup."""
    return [
        "bwrap", "--unshare-all", "--ro-bind", str(world.rootfs), "/", "--proc", "/proc", "--dev", "/dev",
        "--tmpfs", "/tmp", STAMP,  # noqa: S108 - in the sandbox
    ]  # fmt: skip


def _write_bundle(world: World, runtime: str, directory: Path, argv: list[str]) -> None:
    """Write an OCI bundle with the runtime's own defaults (``spec``), its root read-only."""
    if not (directory / "config.json").exists():
        harness.run([runtime, "spec"], cwd=directory)
        config = json.loads((directory / "config.json").read_text())
        config["process"].update({"terminal": False, "args": argv})
        config["root"] = {"path": str(world.rootfs), "readonly": True}
        (directory / "config.json").write_text(json.dumps(config))


def _runtime(runtime: str) -> list[str]:
    return [runtime, "--cgroup-manager=disabled"] if runtime == "crun" else [runtime]  # faster: it makes no groups


def bundle(world: World, runtime: str) -> list[str]:
    """Return the command that runs the stamp in a bundle."""
    directory = world.directory(f"bundle-{runtime}")
    _write_bundle(world, runtime, directory, [STAMP])
    return [*_runtime(runtime), "run", "--bundle", str(directory), f"bench-{runtime}-{os.getpid()}"]


def detached(world: World, runtime: str, argv: list[str], number: int) -> tuple[list[str], str]:
    """Write the bundle deaf-<runtime>, which runs ``argv``; returns the runtime's words and a name for a container."""
    _write_bundle(world, runtime, world.directory(f"deaf-{runtime}"), argv)
    return _runtime(runtime), f"deaf-{runtime}-{os.getpid()}-{number}"


def _nspawn(world: World) -> list[str]:
    return [
        "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-users=pick", "--private-network",
        "--volatile=overlay", "--pipe", "-D", str(world.rootfs), STAMP,
    ]  # fmt: skip


def _lxc(world: World) -> list[str]:
    config = world.scratch / "lxc.conf"
    config.write_text(
        f"lxc.rootfs.path = overlay:{world.rootfs}:{world.directory('lxc-upper')}\n"
        "lxc.uts.name = bench\nlxc.net.0.type = empty\n"
    )
    return ["lxc-execute", "-q", "-n", f"bench{os.getpid()}", "-f", str(config), "--", STAMP]


@contextmanager
def docker(world: World) -> Iterator[tuple[str, ...]]:
    """Run a docker daemon of the benchmark's own; gives the client's command, or nothing where it does not start."""
    program, home = shutil.which("dockerd"), world.directory("docker")
    client = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
    if program is None:
        yield ()
        return
    # In a network namespace of its own, where its rules harm nobody.
    script = 'mount -t tmpfs tmpfs /run; ip link set lo up; exec "$@"'
    argv = [
        "unshare", "-m", "-n", "sh", "-c", script, "sh", program, "--data-root", str(home / "data"),
        "--exec-root", str(home / "exec"), "--pidfile", str(home / "pid"), "-H", f"unix://{home}/socket",
    ]  # fmt: skip
    with (home / "log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as daemon:
        words: tuple[str, ...] = (client, "-H", f"unix://{home}/socket")
        try:
            deadline = time.monotonic() + 60
            while subprocess.run([*words, "info"], capture_output=True, check=False).returncode:
                if daemon.poll() is not None or time.monotonic() > deadline:
                    words = ()
                    break
                time.sleep(0.2)
            yield words
        finally:
            daemon.terminate()
            daemon.wait(60)


def docker_image(world: World, words: tuple[str, ...]) -> str:
    """Import the root as an image; returns its name."""
    pack = subprocess.Popen(["tar", "-C", str(world.rootfs), "-c", "."], stdout=subprocess.PIPE)
    with pack:
        harness.run([*words, "import", "-", "bench"], stdin=pack.stdout)
    return "bench"


def buildah(world: World, *words: str) -> list[str]:
    """Return buildah's command with a store of its own."""
    store = world.directory("buildah")
    return ["buildah", "--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "overlay", *words]


def buildah_image(world: World) -> str:
    """Make an image of the root, once; returns its name. Raises ValueError."""
    if shutil.which("buildah") is None:
        raise ValueError("Debian's package buildah could not be installed")
    done = world.directory("buildah") / "made"
    if not done.exists():
        archive = world.scratch / "image.tar"
        harness.run(["tar", "-C", world.rootfs, "-cf", archive, "."])
        container = harness.run(buildah(world, "from", "scratch")).stdout.decode().strip()
        harness.run(buildah(world, "add", container, str(archive), "/"))
        harness.run(buildah(world, "commit", "--rm", container, "bench"))
        archive.unlink()
        done.touch()
    return "bench"


def podman(world: World, *words: str) -> list[str]:
    """Return podman's command with a store of its own."""
    home = world.directory("podman")
    return [
        "podman", "--root", f"{home}/root", "--runroot", f"{home}/run", "--tmpdir", f"{home}/tmp",  # noqa: S108 - below the scratch directory
        "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--runtime", "runc", *words,
    ]  # fmt: skip


def _podman_run(world: World) -> list[str]:
    harness.run(["tar", "-C", str(world.rootfs), "-cf", str(world.scratch / "image.tar"), "."])
    harness.run(podman(world, "import", str(world.scratch / "image.tar"), "bench"))
    # By itself it asks for more open files and processes than it may have without CAP_SYS_RESOURCE.
    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
    limits = ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]
    return podman(world, "run", "--rm", "--network", "none", *limits, "bench", STAMP)


def starts(world: World, docker_words: tuple[str, ...]) -> list[Case | Absent]:
    """Return every peer that starts a container."""

    def docker_run() -> list[str]:
        if not docker_words:
            raise ValueError("its daemon does not start here")
        return [*docker_words, "run", "--rm", "--network", "none", docker_image(world, docker_words), STAMP]

    return [
        _peer("bwrap", "bwrap", lambda: bwrap(world)),
        _peer("crun", "crun", lambda: bundle(world, "crun")),
        _peer("runc", "runc", lambda: bundle(world, "runc")),
        _peer("systemd-nspawn", "systemd-nspawn", lambda: _nspawn(world)),
        _peer("lxc-execute", "lxc-execute", lambda: _lxc(world)),
        _peer("docker", "dockerd", docker_run),
        _peer("podman", "podman", lambda: _podman_run(world)),
    ]
