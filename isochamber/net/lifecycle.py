"""Where a tenant's network meets the rest of its life: configured, made when it is not as planned, deleted, pruned.

The task graph and the command line go through here. A state directory without a
network never imports pyroute2.
"""

import shutil
from typing import TYPE_CHECKING

from isochamber.build import gc, registry
from isochamber.build.pipeline import Pipeline
from isochamber.build.progress import Reporter
from isochamber.build.state import State
from isochamber.launch import records
from isochamber.launch import stop as stopping
from isochamber.net import preflight

if TYPE_CHECKING:
    from isochamber.net.network import Network
    from isochamber.spec.model import Spec


def configure(pipeline: Pipeline, name: str) -> None:
    """Write the entry of ``name``, after a look whether this host can give it its network. Raises IsochamberError."""
    preflight.check(name, pipeline.tenant(name).network)
    pipeline.configure(name)


class Networks:
    """The networks of one run of the task graph: compared with the kernel once, then kept in mind."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._network: Network | None = None
        self._wrong: dict[str, str] | None = None

    def _opened(self) -> "Network":
        from isochamber.net.network import Network  # noqa: PLC0415 - pyroute2 takes 200 ms

        if self._network is None:
            self._network = Network(self._pipeline.state, self._pipeline.reporter.say)
        return self._network

    def current(self, name: str) -> bool:
        """Say whether the kernel holds the network of ``name`` as containers.json says; only reads."""
        if not self._pipeline.configured(name) or shutil.which("nft") is None:
            return False
        if self._wrong is None:
            self._wrong = self._opened().differences()
        return name not in self._wrong and "" not in self._wrong

    def make(self, name: str) -> None:
        """Make it so; raises IsochamberError (stage "net")."""
        registry.settle(self._pipeline.state)  # what the kernel holds stands in the file before it is made
        wrong = self._wrong or {}
        self._opened().apply(self._pipeline.state.tid(name), rebuild="" in wrong)
        for done in (name, ""):
            wrong.pop(done, None)


def delete(state: State, tenant: str, reporter: Reporter) -> None:
    """Stop ``tenant`` and remove all of it, its network first. Raises IsochamberError."""
    entry = registry.find(state, tenant)
    if entry is not None:
        stopping.stop(entry["tid"])
        remove(state, entry)
    gc.delete(state, tenant, reporter)


def prune(state: State, spec: "Spec", reporter: Reporter, *, until_free: int | None = None) -> list[gc.Removed]:
    """Remove what nothing refers to, the networks of orphaned tenants first. Raises IsochamberError."""
    if state.namespace is not None:
        wanted = {state.tid(name) for name in spec.tenants}
        for tid, entry in registry.read(state, salvage=True).items():
            if tid not in wanted and not records.held(tid):
                remove(state, entry)
    return gc.prune(state, spec, reporter, until_free=until_free)


def remove(state: State, entry: registry.Entry) -> None:
    """Remove what the kernel holds for ``entry``, which may have no network at all. Raises IsochamberError."""
    if entry.get("net") is not None and shutil.which("nft") is not None:
        from isochamber.net.network import Network  # noqa: PLC0415 - pyroute2 takes 200 ms

        with Network(state) as network:
            network.remove(entry)
