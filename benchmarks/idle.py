"""What keeping tenants costs: memory beyond their own processes, and ending those that ignore SIGTERM."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import harness, peers, serving
from benchmarks.harness import Absent, Group, Sample
from benchmarks.world import World

MEMORY, WHOLE = "beyond the tenants, MB", "whole process"
OURS = "isochamber"
_DEAF = "trap '' TERM; while :; do sleep 1000; done"
_INIT = "/bin/sh /home/deaf"


def measure(world: World, rounds: int, *, idle: int = 100, stopped: int = 200) -> list[Group]:
    """Return a group for memory, one for a stop, and one for ``stopped`` at once."""
    peers.install("dockerd", "runc", "crun", "iptables")
    memory = Group(f"memory of {idle} idle tenants, beyond their own processes", 1)
    one = Group("stop of one that ignores SIGTERM, grace 0", rounds)
    all_ = Group(f"stop of {stopped} at once that ignore SIGTERM, grace 0", 1)
    names = _deaf_tenants(world, stopped)
    with _each_alone((memory, one, all_)) as guarded:
        guarded(OURS, lambda: _of_ours(world, names, idle, rounds, (memory, one, all_)))
        guarded("docker", lambda: _of_docker(world, idle, stopped, rounds, (memory, one, all_)))
        for runtime in ("runc", "crun"):
            guarded(runtime, peers.where_it_runs(runtime, partial(_of_runtime, world, runtime, rounds, one)))
    for group, why in ((memory, "it leaves nothing behind that looks after a container"), (all_, "one call, one stop")):
        group.absent = [gone for gone in group.absent if gone.name not in ("runc", "crun")]
        group.absent += [Absent(runtime, why) for runtime in ("runc", "crun")]
    return [memory, one, all_]


@contextmanager
def _each_alone(groups: tuple[Group, ...]) -> Iterator[Callable[[str, Callable[[], None]], None]]:
    """Give a function that does one peer's part and names it as absent where that fails."""

    def guarded(name: str, part: Callable[[], None]) -> None:
        try:
            part()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = " ".join(str(error).split())[:160]
            for group in groups:
                if name not in group.samples:
                    group.absent.append(Absent(name, reason))

    yield guarded


def _deaf_tenants(world: World, count: int) -> list[str]:
    names = [f"deaf{number}" for number in range(count)]
    for name in names:
        world.add_package(name, _INIT)
        (world.root / "new_tenants" / name / "progs" / "deaf").write_text(f"{_DEAF}\n")
    world.doit()
    return names


def _timed(argv: Sequence[str | Path], **options: object) -> Sample:
    begun = time.monotonic()
    harness.run(argv, **options)
    return {WHOLE: time.monotonic() - begun}


def _of_ours(world: World, names: list[str], idle: int, rounds: int, groups: tuple[Group, Group, Group]) -> None:
    memory, one, all_ = groups
    with serving.supervisor(world):
        serving.ask("start", *names[:idle])
        time.sleep(2)
        memory.samples[OURS] = [{MEMORY: serving.pss(serving.processes_of(world)) / 1e6}]
        stop = world.command("stop", "--time", "0")
        one.samples[OURS] = []
        for _ in range(rounds):
            serving.ask("start", names[0])
            time.sleep(0.1)  # its shell is to have said that it ignores the signal
            one.samples[OURS].append(_timed([*stop, names[0]], env=world.environment))
        serving.ask("start", *names)
        time.sleep(2)
        all_.samples[OURS] = [_timed([*stop, *names], env=world.environment)]


def _of_docker(world: World, idle: int, stopped: int, rounds: int, groups: tuple[Group, Group, Group]) -> None:
    memory, one, all_ = groups
    with peers.docker(world) as docker:
        if not docker:
            raise ValueError("its daemon does not start here")
        start = [*docker, "run", "-d", "--network", "none", peers.docker_image(world, docker), "/bin/sh", "-c", _DEAF]

        def started() -> str:
            return harness.run(start).stdout.decode().strip()

        running = [started() for _ in range(idle)]
        try:
            time.sleep(2)
            memory.samples["docker"] = [{MEMORY: serving.pss(_docker_processes(world)) / 1e6}]
            one.samples["docker"] = [_timed([*docker, "stop", "--time", "0", running.pop()]) for _ in range(rounds)]
            running += [started() for _ in range(stopped - len(running))]
            all_.samples["docker"] = [_timed([*docker, "stop", "--time", "0", *running])]
            running = []
        finally:
            if running:
                subprocess.run([*docker, "kill", *running], capture_output=True, check=False)


def _docker_processes(world: World) -> list[int]:
    """Return the daemon, its containerd and the shims: they name the daemon's directories in their command line."""
    home = str(world.directory("docker")).encode()
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            program = Path(os.fsdecode(words.split(b"\0")[0])).name
            if home in words and program in ("dockerd", "containerd", "containerd-shim-runc-v2"):
                found.append(int(path.name))
    return found


def _of_runtime(world: World, runtime: str, rounds: int, one: Group) -> None:
    if shutil.which(runtime) is None:
        raise ValueError(f"Debian's package {runtime} could not be installed")
    samples: list[Sample] = []
    for number in range(rounds):
        words, name = peers.detached(world, runtime, ["/bin/sh", "-c", _DEAF], number)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "capture_output": False}
        harness.run([*words, "run", "--detach", "--bundle", str(world.directory(f"deaf-{runtime}")), name], **quiet)
        time.sleep(0.1)
        samples.append(_timed([*words, "delete", "--force", name]))
    one.samples[runtime] = samples
