"""The task graph with nothing to do, and with one of many tenants changed: ours, bare doit's, make's and ninja's."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, peers
from benchmarks.harness import Absent, Case, Group, Sample
from benchmarks.world import World, write_package

SIZES = (10, 100, 1000, 5000)
NOOP, CHANGED, BARE = "doit, no-op", "doit, one tenant changed", "bare doit, no-op"
RUN, DOIT_RUN = "isochamber run", "doit run:"
CACHED = "cached image builds"
DOCKER, BUILDAH = "docker build, cached", "buildah build, cached"
BUILDS = 10  # cached image builds that are timed; told per tenant

# The same graph for bare doit: as many tasks, the same dependencies, each up to date for the asking.
_DODO = """\
DOIT_CONFIG = {{"default_tasks": ["configure"], "backend": "sqlite3", "dep_file": "{directory}/doit.db"}}
def same():
    return True
def task_all():
    yield {{"basename": "base_fs", "actions": None}}
    for kind in ("dirs", "install_deps", "home", "configure", "run", "shell", "delete"):
        yield {{"basename": kind, "name": None}}
    yield {{"basename": "run:tid", "name": None}}
    for number in range({size}):
        name = f"t{{number}}"
        for kind, before in (
            ("dirs", []), ("install_deps", ["base_fs", "dirs:" + name]),
            ("home", ["dirs:" + name, "install_deps:" + name]),
            ("configure", ["base_fs", "dirs:" + name, "install_deps:" + name, "home:" + name]),
            ("run", ["configure:" + name]), ("run:tid", ["configure:" + name]), ("shell", ["configure:" + name]),
            ("delete", []),
        ):
            yield {{
                "basename": kind, "name": name, "doc": kind + " of " + name, "actions": [same], "uptodate": [same],
                "task_dep": before,
            }}
"""


def measure(world: World, rounds: int, sizes: tuple[int, ...], groups: list[Group]) -> None:
    """Time the graphs of every size, a start among so many, and the peers' cached builds, each added to ``groups``."""
    peers.install("make", "ninja", "dockerd", "buildah", "iptables")
    groups.append(_cached_builds(world, rounds))
    first = Group("the first doit: packages deployed and configured", 1)
    groups.append(first)
    directories = {size: world.directory(f"graph-{size}") for size in sizes}
    environments = {size: _tenants(world, directory, size) for size, directory in directories.items()}
    doit = world.python("isochamber.tasks")
    for size in sizes:
        begun = time.monotonic()
        harness.run(doit, env=environments[size], timeout=1200)
        first.samples[f"{size} tenants"] = [{"whole process": time.monotonic() - begun}]
        groups.append(_of_size(world, size, rounds if size < 5000 else min(rounds, 3), environments[size]))
    groups += _starts_among_many(world, environments, rounds)


def among(what: str, size: int) -> str:
    """Return how a start is called that is one of ``size`` tenants."""
    return f"{what}, {size} configured"


def _starts_among_many(world: World, environments: dict[int, dict[str, str]], rounds: int) -> list[Group]:
    """Time the start of one tenant, by how many are configured, taken in turn."""

    def cases(what: str, argv: list[str | Path]) -> list[Case]:
        return [Case(among(what, size), harness.stamped(argv, env=own)) for size, own in environments.items()]

    run, doit = world.command("run", "t1"), [*world.python("isochamber.tasks"), "run:t1"]
    return [
        harness.measure("isochamber run, one among many", cases(RUN, run), rounds=rounds * 3),
        harness.measure("doit run:, one among many", cases(DOIT_RUN, [*doit]), rounds=min(rounds, 3)),
    ]


def _of_size(world: World, size: int, rounds: int, environment: dict[str, str]) -> Group:
    directory = world.directory(f"graph-{size}")
    doit = world.python("isochamber.tasks")
    changed = directory / "state" / "new_tenants" / "t0" / "progs" / "main"
    (directory / "dodo.py").write_text(_DODO.format(directory=directory, size=size))
    bare: list[str | Path] = [Path(sys.executable).parent / "doit", "-f", directory / "dodo.py"]
    cases: list[Case | Absent] = [
        Case(NOOP, harness.whole(doit, env=environment)),
        Case(CHANGED, _after(lambda: _touch(changed), harness.whole(doit, env=environment))),
        Case(BARE, harness.whole(bare)),
        _make(directory, size),
        _ninja(directory, size),
    ]
    return harness.measure(f"graph of {size} tenants", cases, rounds=rounds)


def _tenants(world: World, directory: Path, size: int) -> dict[str, str]:
    """Drop ``size`` packages beside the base of the benchmark's world; returns the environment for them."""
    state = directory / "state"
    for number in range(size):
        write_package(state / "new_tenants" / f"t{number}", "/usr/local/bin/stamp", {"main": "#!/bin/sh\n"})
    if not (state / "base_fs").exists():
        harness.run(["cp", "-al", world.root / "base_fs", state / "base_fs"])
    base = (world.scratch / "tenants.yaml").read_text().split("tenants:")[0].replace(str(world.root), str(state))
    (directory / "tenants.yaml").write_text(base + "tenants: {}\n")
    return {
        **world.environment,
        "ISOCHAMBER_TENANTS": str(directory / "tenants.yaml"), "ISOCHAMBER_ROOT": str(state),
    }  # fmt: skip


def _after(before: Callable[[], None], once: Callable[[], Sample]) -> Callable[[], Sample]:
    def both() -> Sample:
        before()
        return once()

    return both


def _touch(path: Path) -> None:
    path.write_text(f"#!/bin/sh\n# {time.monotonic_ns()}\n")
    path.chmod(0o755)


def _make(directory: Path, size: int) -> Case | Absent:
    if shutil.which("make") is None:
        return Absent("make, no-op", "Debian's package make could not be installed")
    stamps = directory / "stamps"
    stamps.mkdir(exist_ok=True)
    lines = [f"all: {' '.join(f'{stamps}/configure.{number}' for number in range(size))}\n"]
    for number in range(size):
        former = ""
        for kind in ("dirs", "install_deps", "home", "configure"):
            lines.append(f"{stamps}/{kind}.{number}: {former}\n\ttouch $@\n")
            former = f"{stamps}/{kind}.{number}"
    (directory / "Makefile").write_text("".join(lines))
    argv: list[str | Path] = ["make", "-s", "-f", directory / "Makefile"]
    harness.run(argv)
    return Case("make, no-op", harness.whole(argv))


def _ninja(directory: Path, size: int) -> Case | Absent:
    if shutil.which("ninja") is None:
        return Absent("ninja, no-op", "Debian's package ninja-build could not be installed")
    home = directory / "ninja"
    home.mkdir(exist_ok=True)
    lines = ["rule touch\n  command = touch $out\n"]
    for number in range(size):
        former = ""
        for kind in ("dirs", "install_deps", "home", "configure"):
            lines.append(f"build {kind}.{number}: touch {former}\n")
            former = f"{kind}.{number}"
    (home / "build.ninja").write_text("".join(lines))
    argv: list[str | Path] = ["ninja", "-C", home, "--quiet"]
    harness.run(argv)
    return Case("ninja, no-op", harness.whole(argv))


def _cached_builds(world: World, rounds: int) -> Group:
    """Time builds of images in which nothing changed: what a tenant costs there that we look at in the graph."""
    context = world.directory("image")
    (context / "main").write_text("#!/bin/sh\n")
    (context / "Dockerfile").write_text("FROM bench\nRUN echo layer > /etc/bench\nCOPY main /home/main\n")
    with peers.docker(world) as docker:
        cases = [_docker_build(world, docker, context), _buildah_build(world, context)]
        return harness.measure(f"{CACHED}, {BUILDS} of them", cases, rounds=min(rounds, 5))


def _repeated(argv: list[str], **options: object) -> Callable[[], Sample]:
    def once() -> Sample:
        begun = time.monotonic()
        for _ in range(BUILDS):
            harness.run(argv, **options)
        return {"whole process": time.monotonic() - begun}

    return once


def _docker_build(world: World, docker: tuple[str, ...], context: Path) -> Case | Absent:
    name = DOCKER
    if not docker:
        return Absent(name, "its daemon does not start here")
    try:
        peers.docker_image(world, docker)
        argv = [*docker, "build", "--quiet", "--network", "none", str(context)]
        environment = {**world.environment, "DOCKER_BUILDKIT": "0"}
        harness.run(argv, env=environment)
    except ValueError as error:
        return Absent(name, str(error))
    return Case(name, _repeated(argv, env=environment))


def _buildah_build(world: World, context: Path) -> Case | Absent:
    name = BUILDAH
    try:
        peers.buildah_image(world)
        words = peers.buildah(world, "build", "--quiet", "--layers", "--pull-never", "--isolation", "chroot")
        argv = [*words, "--tag", "bench-image", str(context)]
        harness.run(argv)
    except ValueError as error:
        return Absent(name, str(error))
    return Case(name, _repeated(argv))
