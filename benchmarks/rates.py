"""Starts per second: one after another, and many at once."""

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness, peers, serving
from benchmarks.harness import Absent, Case, Group, Sample
from benchmarks.world import STAMP, World

FIGURE = "starts per second"
TITLE = "starts per second"
SUPERVISED, START = "isochamber, supervisor", "isochamber start"


def measure(world: World, rounds: int, *, sequential: int = 100, at_once: int = 500) -> list[Group]:
    """Return a group for starts one after another and one for ``at_once`` of them."""
    peers.install("bwrap", "crun", "runc", "dockerd", "iptables")
    names = many(world, "many", at_once, STAMP)
    with peers.docker(world) as docker, serving.supervisor(world):
        few = max(sequential // 10, 1)
        one_by_one: list[Case | Absent] = [
            Case(SUPERVISED, _supervised(world, sequential)),
            Case("isochamber run", _one_by_one([_ours(world, "bench")] * sequential, env=world.environment)),
            *(_peer(name, world, docker, _one_by_one, few if name == "docker" else sequential) for name in _PEERS),
        ]
        together: list[Case | Absent] = [
            Case(f"{START}, {at_once} tenants", lambda: _start_all(names)),
            Case(
                f"isochamber run, {at_once} processes",
                _at_once([_ours(world, name) for name in names], env=world.environment),
            ),
            *(_peer(name, world, docker, _at_once, at_once // 10 if name == "docker" else at_once) for name in _PEERS),
        ]
        return [
            harness.measure(f"{TITLE}, {sequential} one after another", one_by_one, rounds=rounds, warmup=0),
            harness.measure(f"{TITLE}, {at_once} at once", together, rounds=rounds, warmup=0),
        ]


def many(world: World, prefix: str, count: int, init: str) -> list[str]:
    """Configure ``count`` tenants more that run ``init``, with a layer as the world's own; returns their names."""
    names = [f"{prefix}{number}" for number in range(count)]
    for name in names:
        world.add_package(name, init)
    world.doit()
    return names


def _ours(world: World, name: str) -> list[str | Path]:
    return world.command("run", name)


def _supervised(world: World, count: int) -> Callable[[], Sample]:
    def once() -> Sample:
        begun = time.monotonic()
        for _ in range(count):
            serving.request(world, "bench")
        return {FIGURE: count / (time.monotonic() - begun)}

    return once


def _start_all(names: Sequence[str]) -> Sample:
    """One request that starts all of them, until every one has run to its end."""
    begun = time.monotonic()
    serving.ask("start", *names)
    serving.ask("wait", *names)
    return {FIGURE: len(names) / (time.monotonic() - begun)}


def _one_by_one(commands: Sequence[Sequence[str | Path]], **options: object) -> Callable[[], Sample]:
    def once() -> Sample:
        begun = time.monotonic()
        for argv in commands:
            harness.run(argv, **options)
        return {FIGURE: len(commands) / (time.monotonic() - begun)}

    return once


def _at_once(commands: Sequence[Sequence[str | Path]], **options: object) -> Callable[[], Sample]:
    """Spawn all of them, then wait for all; one that fails makes the figure void."""

    def once() -> Sample:
        begun = time.monotonic()
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        running = [subprocess.Popen(argv, **quiet, **options) for argv in commands]  # type: ignore[call-overload]
        failed = []
        for process in running:
            said = process.communicate()[1]
            if process.returncode:
                failed.append(said.decode(errors="replace").strip()[-120:])
        took = time.monotonic() - begun
        if failed:
            raise ValueError(f"{len(failed)} of {len(running)} failed: {failed[0]}")
        return {FIGURE: len(running) / took}

    return once


_PEERS = ("bwrap", "crun", "runc", "docker")


def _peer(
    name: str,
    world: World,
    docker: tuple[str, ...],
    way: Callable[[Sequence[Sequence[str | Path]]], Callable[[], Sample]],
    count: int,
) -> Case | Absent:
    try:
        commands = [_command(name, world, docker, number) for number in range(count)]
        peers.where_it_runs(name, lambda: harness.run(commands[0]))()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Absent(name, " ".join(str(error).split())[:160])
    return Case(name if name != "docker" else f"docker, {count} of them", peers.where_it_runs(name, way(commands)))


_numbers = itertools.count()


def _command(name: str, world: World, docker: tuple[str, ...], number: int) -> list[str]:
    if name == "bwrap":
        return peers.bwrap(world)
    if name == "docker":
        if not docker:
            raise ValueError("its daemon does not start here")
        image = peers.docker_image(world, docker) if number == 0 else "bench"
        return [*docker, "run", "--rm", "--network", "none", image, STAMP]
    *words, _ = peers.bundle(world, name)
    return [*words, f"bench-{name}-{os.getpid()}-{next(_numbers)}"]
