"""Starts: from the request to the tenant's first instruction, and whole processes."""

import sys
from pathlib import Path

from benchmarks import harness, peers
from benchmarks.harness import Absent, Case, Group
from benchmarks.world import STAMP, World


def measure(world: World, rounds: int) -> list[Group]:
    """Time our own starts, the floor and every peer, in one interleaved run."""
    peers.install("bwrap", "crun", "runc", "systemd-nspawn", "lxc-execute", "dockerd", "podman", "iptables")
    with peers.docker(world) as docker_words:
        cases: list[Case | Absent] = [
            *_ours(world),
            *_floor(world),
            Case("python3 -I -S -c pass", harness.whole([sys.executable, "-I", "-S", "-c", "pass"])),
            *peers.starts(world, docker_words),
        ]
        return [harness.measure("starts", cases, rounds=rounds)]


def _ours(world: World) -> list[Case]:
    run = world.python("isochamber", "run", "--no-terminal", "bench")
    return [Case("isochamber run", harness.stamped(run, env=world.environment))]


def _floor(world: World) -> list[Case]:
    start: list[str | Path] = [world.floor, world.rootfs, world.directory("floor-scratch"), STAMP]
    return [
        Case("raw C: clone, overlay, pivot_root, exec", harness.stamped(start)),
        Case("raw C: clone and exec alone", harness.stamped([world.floor, "--exec", world.scratch / "stamp"])),
    ]
