"""Starts: from the request to the tenant's first instruction, and whole processes."""

import sys
from pathlib import Path

from benchmarks import harness, peers, serving
from benchmarks.harness import Absent, Case, Group, Sample
from benchmarks.world import STAMP, World

SUPERVISOR, WARM = "supervisor, request", "supervisor, request, warm"
THROUGH, COLD = "isochamber run, through the supervisor", "isochamber run, cold"
INTERPRETER, FLOOR, EXEC = "python3 -I -S -c pass", "raw C: clone, overlay, pivot_root, exec", "raw C: clone and exec"


def measure(world: World, rounds: int) -> list[Group]:
    """Time our own starts, the floor and every peer, in one interleaved run."""
    peers.install("bwrap", "crun", "runc", "systemd-nspawn", "lxc-execute", "dockerd", "podman", "iptables")
    with peers.docker(world) as docker_words, serving.supervisor(world):
        cases: list[Case | Absent] = [
            *_ours(world),
            *_floor(world),
            Case(INTERPRETER, harness.whole([sys.executable, "-I", "-S", "-c", "pass"])),
            *peers.starts(world, docker_words),
        ]
        return [harness.measure("starts", cases, rounds=rounds)]


def _ours(world: World) -> list[Case]:
    run = world.command("run", "bench")
    # Where no supervisor has its socket: the launcher does it all.
    alone = {**world.environment, "ISOCHAMBER_RUN": f"{world.environment['ISOCHAMBER_RUN']}/alone"}
    return [
        Case(SUPERVISOR, lambda: serving.request(world, "bench")),
        Case(WARM, lambda: _warm(world)),
        Case(THROUGH, harness.stamped(run, env=world.environment)),
        Case(COLD, harness.stamped(run, env=alone)),
    ]


def _warm(world: World) -> Sample:
    serving.ask("wait", "warm", condition="warm")
    return serving.request(world, "warm")


def _floor(world: World) -> list[Case]:
    start: list[str | Path] = [world.floor, world.rootfs, world.directory("floor-scratch"), STAMP]
    return [
        Case(FLOOR, harness.stamped(start)),
        Case(EXEC, harness.stamped([world.floor, "--exec", world.scratch / "stamp"])),
    ]
