"""Twenty tenants with the same dependencies, and twenty with different ones, against image builds of the same scripts.

An install script installs a Debian package with dpkg, from a file beside it: what is
measured is building, sharing and committing, the same everywhere, and not a mirror.
Each round is of packages that nobody has seen, over a base that everybody has.
"""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness, peers
from benchmarks.harness import Absent, Case, Group, Sample
from benchmarks.world import World, write_package

TENANTS = 20
WHOLE, DISK = "whole process", "disk, MB"
OURS = "isochamber"
KINDS = {"same": "the same dependencies", "different": "different dependencies"}
_FILES, _BYTES = 200, 16 << 10  # of each package: 3.2 MB that no compression makes smaller

_SCRIPT = "#!/bin/sh\nset -e\ndpkg -i /home/dependency.deb\n"
_DOCKERFILE = """\
FROM {image}
COPY dependency.deb install_deps.sh /home/
RUN /bin/sh /home/install_deps.sh
COPY main /home/main
"""


def measure(world: World, rounds: int, *, tenants: int = TENANTS) -> list[Group]:
    """Return a group for the same dependencies and one for different ones."""
    peers.install("dockerd", "buildah", "iptables")
    groups = []
    numbers = itertools.count()
    with peers.docker(world) as docker:
        image = _docker_base(world, docker)
        buildah = _buildah_base(world)
        for kind, what in KINDS.items():

            def once(
                build: Callable[[Path, int], Sample], different: bool = kind == "different"
            ) -> Callable[[], Sample]:
                def made() -> Sample:
                    directory = _packages(world, next(numbers), tenants, different=different)
                    try:
                        return build(directory, tenants)
                    finally:
                        shutil.rmtree(directory)

                return made

            cases: list[Case | Absent] = [
                Case(OURS, once(lambda directory, count: _ours(world, directory, count))),
                image or Case("docker build", once(lambda directory, count: _docker(world, docker, directory, count))),
                buildah or Case("buildah build", once(lambda directory, count: _buildah(world, directory, count))),
            ]
            groups.append(harness.measure(f"{tenants} tenants with {what}", cases, rounds=rounds, warmup=0))
    return groups


def _packages(world: World, number: int, count: int, *, different: bool) -> Path:
    """Write ``count`` packages, which are contexts of image builds too, with one dependency or one each."""
    directory = world.scratch / f"packages-{number}"
    made = [_deb(world, f"r{number}-{each}") for each in range(count if different else 1)]
    for each in range(count):
        package = directory / f"t{each}"
        write_package(package, "/home/main", {"main": f"#!/bin/sh\n# {number} {each}\n"}, _SCRIPT)
        shutil.copy(made[each % len(made)], package / "progs" / "dependency.deb")
        (package / "progs" / "Dockerfile").write_text(_DOCKERFILE.format(image="bench"))
    return directory


def _deb(world: World, name: str) -> Path:
    tree = world.scratch / "deb"
    shutil.rmtree(tree, ignore_errors=True)
    share = tree / "usr" / "share" / f"dependency-{name}"
    share.mkdir(parents=True)
    for number in range(_FILES):
        (share / f"file{number}").write_bytes(os.urandom(_BYTES))
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        f"Package: dependency-{name}\nVersion: 1\nArchitecture: all\nMaintainer: bench <bench@localhost>\n"
        "Description: what a tenant depends on\n"
    )
    target = world.scratch / "dependency.deb"
    harness.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, target])
    return target.rename(world.scratch / f"dependency-{name}.deb")


def used(directory: Path) -> int:
    """Return the bytes that a directory takes on disk; what is linked twice counts once."""
    return int(harness.run(["du", "--summarize", "--block-size=1", directory]).stdout.split()[0])


def _ours(world: World, packages: Path, count: int) -> Sample:
    """Give a state directory of its own, with the base in it, the packages, and build all of it."""
    state = packages / "state"
    state.mkdir()
    for name in ("base_fs", "cache"):
        if (world.root / name).exists():
            harness.run(["cp", "-al" if name == "base_fs" else "-a", world.root / name, state / name])
    bases = (world.scratch / "tenants.yaml").read_text().split("tenants:")[0].replace(str(world.root), str(state))
    lines = "".join(f"  t{each}: {{package: {packages}/t{each}}}\n" for each in range(count))
    (packages / "tenants.yaml").write_text(f"{bases}tenants:\n{lines}")
    environment = {
        **world.environment, "ISOCHAMBER_TENANTS": str(packages / "tenants.yaml"), "ISOCHAMBER_ROOT": str(state),
    }  # fmt: skip
    before = used(state)
    begun = time.monotonic()
    harness.run(world.python("isochamber.tasks"), env=environment, timeout=1200)
    took = time.monotonic() - begun
    return {WHOLE: took, DISK: (used(state) - before) / 1e6}


def _docker_base(world: World, docker: tuple[str, ...]) -> Absent | None:
    if not docker:
        return Absent("docker build", "its daemon does not start here")
    try:
        peers.docker_image(world, docker)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Absent("docker build", str(error)[:160])
    return None


def _builds(argv: list[str], packages: Path, count: int, store: Path, **options: object) -> Sample:
    before = used(store)
    begun = time.monotonic()
    for each in range(count):
        harness.run([*argv, packages / f"t{each}" / "progs"], **options)
    took = time.monotonic() - begun
    return {WHOLE: took, DISK: (used(store) - before) / 1e6}


def _docker(world: World, docker: tuple[str, ...], packages: Path, count: int) -> Sample:
    argv = [*docker, "build", "--quiet", "--network", "none"]
    environment = {**world.environment, "DOCKER_BUILDKIT": "0"}  # Debian's docker.io has no BuildKit client
    return _builds(argv, packages, count, world.directory("docker") / "data", env=environment)


def _buildah_base(world: World) -> Absent | None:
    try:
        peers.buildah_image(world)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Absent("buildah build", str(error)[:160])
    return None


def _buildah(world: World, packages: Path, count: int) -> Sample:
    words = peers.buildah(world, "build", "--quiet", "--layers", "--pull-never", "--isolation", "chroot")
    return _builds(words, packages, count, world.directory("buildah"))
