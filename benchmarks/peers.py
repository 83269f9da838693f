"""The tools that one would use otherwise, from Debian, each told to run the same program in the same root.

A peer that can't be installed or does not run here becomes :class:`harness.Absent`,
with what it said. Each runs with its own defaults, but for the network (none, as ours).
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Absent, Case
from benchmarks.world import STAMP, World

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


def _peer(name: str, program: str, prepare: Callable[[], list[str]], **options: object) -> Case | Absent:
    if shutil.which(program) is None:
        return Absent(name, f"Debian's package {PACKAGES[program]} could not be installed")
    try:
        argv = prepare()
        harness.run(argv, **options)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Absent(name, " ".join(str(error).split())[:160])
    return Case(name, harness.stamped(argv, **options))


def bwrap(world: World) -> list[str]:
    """bubblewrap: every namespace, a read-only root, no overlay (0.8 has none), no cgroup."""
    return [
        "bwrap", "--unshare-all", "--ro-bind", str(world.rootfs), "/", "--proc", "/proc", "--dev", "/dev",
        "--tmpfs", "/tmp", STAMP,  # noqa: S108 - in the sandbox
    ]  # fmt: skip


def _bundle(world: World, runtime: str) -> list[str]:
    """An OCI bundle with the runtime's own defaults (``spec``), over an overlay of its own."""
    bundle = world.directory(f"bundle-{runtime}")
    if not (bundle / "config.json").exists():
        harness.run([runtime, "spec"], cwd=bundle)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update({"terminal": False, "args": [STAMP]})
    config["root"] = {"path": str(world.rootfs), "readonly": True}
    (bundle / "config.json").write_text(json.dumps(config))
    options = ["--cgroup-manager=disabled"] if runtime == "crun" else []  # it refuses a hybrid cgroup tree
    return [runtime, *options, "run", "--bundle", str(bundle), f"bench-{runtime}-{os.getpid()}"]


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
    return podman(world, "run", "--rm", "--network", "none", "--ulimit", "host", "bench", STAMP)


def starts(world: World, docker_words: tuple[str, ...]) -> list[Case | Absent]:
    """Return every peer that starts a container."""

    def docker_run() -> list[str]:
        if not docker_words:
            raise ValueError("its daemon does not start here")
        return [*docker_words, "run", "--rm", "--network", "none", docker_image(world, docker_words), STAMP]

    return [
        _peer("bwrap", "bwrap", lambda: bwrap(world)),
        _peer("crun", "crun", lambda: _bundle(world, "crun")),
        _peer("runc", "runc", lambda: _bundle(world, "runc")),
        _peer("systemd-nspawn", "systemd-nspawn", lambda: _nspawn(world)),
        _peer("lxc-execute", "lxc-execute", lambda: _lxc(world)),
        _peer("docker", "dockerd", docker_run),
        _peer("podman", "podman", lambda: _podman_run(world)),
    ]
