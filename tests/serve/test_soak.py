"""Many starts and stops while the supervisor is killed again and again: nothing may be left, nothing lost."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import records
from isochamber.serve import client, logs
from tests.launch import tenants
from tests.launch.tenants import Tenant
from tests.serve.world import DEADLINE, World, descriptors_of, eventually, nursery_of

Add = Callable[..., Tenant]

SHORT = ["/bin/sh", "-c", "echo up; echo >> /home/count"]
LONG = ["/bin/sh", "-c", "echo up; echo >> /home/count; exec sleep 1000"]
BIG = {"size": 1 << 24, "count": 2, "journald": False}


class Workers:
    """Threads that start and end tenants through whatever supervisor there is."""

    def __init__(self, tenants_of: list[list[Tenant]]) -> None:
        self.starts = 0
        self.refusals: list[str] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(own,)) for own in tenants_of]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, own: list[Tenant]) -> None:
        names = [tenant.name for tenant in own]
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                end = client.connect()
                if end is None:
                    self._over.wait(0.02)
                    continue
                with contextlib.closing(end):
                    end.settimeout(DEADLINE)
                    self._rounds(end, names)

    def _rounds(self, end: Any, names: list[str]) -> None:
        try:
            while not self._over.is_set():
                client.ask(end, {"verb": "start", "tenants": names})
                with self._lock:
                    self.starts += len(names)
                client.ask(end, {"verb": "wait", "tenants": names[:1]})
                client.ask(end, {"verb": "stop", "tenants": names, "time": 0})
        except IsochamberError as error:
            if error.stage != "serve":  # anything but a supervisor that was killed under us
                with self._lock:
                    self.refusals.append(error.line())


def _soak(world: World, add: Add, starts: int, kills: int) -> float:
    """Start and stop ``starts`` tenants, kill the supervisor ``kills`` times; returns the seconds it took."""
    keeper = add()
    groups = [[add(argv=SHORT, service={"logs": BIG}), add(argv=LONG, service={"logs": BIG}),
               add(argv=LONG, service={"logs": BIG, "warm": number % 2})] for number in range(4)]  # fmt: skip
    everyone = [tenant for group in groups for tenant in group]
    world.begin()
    world.ask("start", keeper.name)
    world.ask("start", *(tenant.name for tenant in everyone))  # pins and directories are made
    world.ask("stop", *(tenant.name for tenant in everyone), time=0)
    nursery = nursery_of(keeper)
    _settle(world, everyone)
    for verb in ("pause", "resume"):  # once it answers, the round in which it forked its spare process is over
        world.ask(verb, keeper.name)
    before = _traces(nursery)
    begun = time.monotonic()
    with Workers(groups) as workers:
        for number in range(1, kills + 1):
            while workers.starts < number * starts // (kills + 1):
                threading.Event().wait(0.02)
                assert not workers.refusals, workers.refusals
            world.kill()
            world.begin()
        while workers.starts < starts:
            threading.Event().wait(0.02)
            assert not workers.refusals, workers.refusals
    seconds = time.monotonic() - begun
    assert not workers.refusals, workers.refusals
    assert nursery_of(keeper) == nursery  # the one that was there at the start
    world.ask("stop", *(tenant.name for tenant in everyone), time=0)
    _settle(world, everyone)
    eventually(lambda: _traces(nursery) == before, "nothing is left, and a spare process waits again")
    assert Path(paths.serve_file("nursery.log")).read_text() == ""
    for group in groups:
        _nothing_lost(world, group[0], exact=True)
        for tenant in group[1:]:
            _nothing_lost(world, tenant, exact=False)
    return seconds


def _traces(nursery: int) -> tuple[object, ...]:
    """Return what a start may leave: descriptors of the nursery, mounts of the host, files beside the locks."""
    return descriptors_of(nursery), tenants.host_mounts(), sorted(os.listdir(Path(paths.run_directory(), "tenants")))


def _settle(world: World, everyone: list[Tenant]) -> None:
    """Wait for the sandboxes that wait, and for the ends of the others."""
    for tenant in everyone:
        if tenant.entry["service"]["warm"]:
            world.ask("wait", tenant.name, condition="warm")
        else:
            tenants.wait_until_free(tenant.tid)
            assert records.running(tenant.tid) is None
            assert tenant.processes() == []


def _nothing_lost(world: World, tenant: Tenant, *, exact: bool) -> None:
    """Every line that a tenant wrote is in its log: it writes one there first, then one to a file of its own."""
    directory = Path(world.root, paths.TENANTS_PERSIST, tenant.tid, "log")
    said = sum(Path(path).read_bytes().count(b" up") for path in logs.files(str(directory)))
    counted = (tenant.home / "count").read_text().count("\n")
    assert said == counted if exact else said >= counted > 0, (tenant.name, said, counted)


def test_some_hundred_starts_and_some_kills_of_the_supervisor_leave_nothing(world: World, add: Add) -> None:
    _soak(world, add, 300, 4)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_thousand_starts_and_fifty_kills_of_the_supervisor_leave_nothing(world: World, add: Add) -> None:
    starts, kills = int(os.environ.get("SOAK_STARTS", "20000")), 50
    seconds = _soak(world, add, starts, kills)
    print(f"\n{starts} starts and {kills} kills of the supervisor in {seconds:.0f} s: {starts / seconds:.1f} a second")  # noqa: T201 - the figure is what it is run for
