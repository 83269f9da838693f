"""Products: a base against debootstrap, with the package cache empty and warm."""

import itertools
import time
from collections.abc import Callable

from benchmarks import harness, peers
from benchmarks.harness import Case, Group, Sample
from benchmarks.world import World

_MIRROR = "http://deb.debian.org/debian"


def measure(world: World, rounds: int) -> list[Group]:
    """Time base_fs and what one would call oneself, in one interleaved run."""
    peers.install("debootstrap", "mmdebstrap")
    numbers = itertools.count()

    def fresh(argv: list[str]) -> Callable[[], Sample]:
        def once() -> Sample:
            target = world.scratch / f"bootstrap-{next(numbers)}"
            begun = time.monotonic()
            harness.run([*argv, str(target), _MIRROR], timeout=1200)
            took = time.monotonic() - begun
            harness.run(["rm", "-rf", "--one-file-system", target])
            return {"whole process": took}

        return once

    cases = [
        Case("base_fs", lambda: _base(world, f"cold{next(numbers)}", warm=False)),
        Case("base_fs, cache warm", lambda: _base(world, f"warm{next(numbers)}", warm=True)),
        Case("debootstrap", fresh(["debootstrap", "--variant=minbase", "bookworm"])),
        Case("mmdebstrap", fresh(["mmdebstrap", "--variant=minbase", "--format=directory", "bookworm"])),
    ]
    return [harness.measure("bases", cases, rounds=rounds, warmup=0)]


def _base(world: World, name: str, *, warm: bool) -> Sample:
    """Build one more base; its cache is the world's when it is to be warm, and empty otherwise."""
    state = world.root if warm else world.scratch / f"state-{name}"
    tenants = world.scratch / f"{name}.yaml"
    tenants.write_text(f"root: {state}\nbases: {{{name}: {{}}}}\ntenants: {{}}\n")
    environment = {**world.environment, "ISOCHAMBER_TENANTS": str(tenants), "ISOCHAMBER_ROOT": str(state)}
    begun = time.monotonic()
    harness.run(world.python("isochamber.tasks", f"base_fs:{name}"), env=environment, timeout=1200)
    took = time.monotonic() - begun
    for product in (state / "base_fs").glob(f"{name}-*"):
        harness.run(["rm", "-rf", "--one-file-system", product])
    return {"whole process": took}
