"""The sandbox that an install script runs in: the tenant's own isolation, with network and a throw-away upper."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isochamber import paths
from isochamber.build import filters, held, limits, network, process, registry
from isochamber.build.entry import PATH
from isochamber.build.identity import Identity, make_owned
from isochamber.build.process import Outcome
from isochamber.build.progress import Product
from isochamber.build.ranges import UID_COUNT
from isochamber.build.state import State
from isochamber.launch import capabilities, command, pins
from isochamber.spec.model import Limits, Network, Subnets

ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "container": "isochamber",
}
_FILTERS = filters.Wanted(filters.default())  # those of every tenant: apt and dpkg need none of what they refuse
_HOSTNAME = "isochamber-build"  # the host's own name is nobody's business


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A staging directory with upper, workdir, overlay and home in it, for one run over one base."""

    state: State
    stage: Path
    who: Identity
    base_product: str
    install_network: str = "bridge"
    subnets: Subnets = field(default=Subnets())

    @property
    def upper(self) -> Path:
        """What the run adds to the base; owned by the tenant's ids until it is sealed."""
        return self.stage / "upper"

    @property
    def packages(self) -> Path:
        """A lower above the base, with .debs where apt looks for them; see :mod:`isochamber.build.debcache`."""
        return self.stage / "packages"

    @property
    def home(self) -> Path:
        """What the run sees as /home; owned by root on disk."""
        return self.stage / "home"

    def make(self) -> None:
        """Make its directories; raises OSError."""
        for name in ("upper", "workdir"):
            make_owned(self.stage / name, self.who.uid_base)
        for name in ("overlay", "home"):
            (self.stage / name).mkdir(0o755)
            (self.stage / name).chmod(0o755)

    @property
    def tid(self) -> str:
        """The run's own id: the tenant may be running its former version meanwhile."""
        return build_tid(self.who.tid)

    def run(
        self, argv: Sequence[str], env: Mapping[str, str], *, bounds: Limits, tenant: str, log: Path, product: Product
    ) -> Outcome:
        """Run ``argv`` to its end, or its time limit; nothing of it is left then. Raises OSError."""
        _FILTERS.ensure(self.state)
        with contextlib.ExitStack() as stack:
            stack.callback(pins.remove, self.tid)
            net = self._net()
            if net is not None:
                entry = {"tid": self.tid, "name": "", "uid_base": self.who.uid_base, "uid_count": UID_COUNT, "net": net}
                for line in stack.enter_context(held.network(self.state, entry, tenant)):
                    product.line(line)
            plan = os.memfd_create("plan", os.MFD_CLOEXEC)
            stack.callback(os.close, plan)
            with os.fdopen(os.dup(plan), "wb") as file:
                file.write(json.dumps(self._plan(argv, env, bounds, tenant)).encode())
            os.lseek(plan, 0, os.SEEK_SET)
            words = command.argv("plan", "--root", str(self.state.root), "--fd", str(plan))
            return process.run(words, log=log, product=product, pass_fds=(plan,))

    def _net(self) -> dict[str, object] | None:
        """Return the run's own network: all of the internet and the LAN, nothing of the host, nor of tenants."""
        if self.install_network != "bridge":
            return None
        grant = Network(mode="bridge", egress_all=True)
        identifier = self.state.identifier
        return network.make(identifier, self.tid, self.who.uid_base, grant, self.subnets, build=True)

    def _plan(self, argv: Sequence[str], env: Mapping[str, str], bounds: Limits, tenant: str) -> dict[str, object]:
        stage = self.state.relative(self.stage)
        return {
            "tid": self.tid,
            "version": registry.VERSION,
            "name": tenant,
            "argv": list(argv),
            "env": {**ENVIRONMENT, **env},
            "cwd": "/home",
            "hostname": _HOSTNAME,
            "uid": 0,
            "gid": 0,
            "uid_base": self.who.uid_base,
            "uid_count": UID_COUNT,
            "lowers": [
                *([f"{stage}/packages"] if self.packages.is_dir() else []),
                f"{paths.BASES}/{self.base_product}/{paths.ROOTFS}",
            ],
            "upper": f"{stage}/upper",
            "workdir": f"{stage}/workdir",
            "overlay": f"{stage}/overlay",
            "home": f"{stage}/home",
            "ipc": None,
            "network": self.install_network,
            "net": self._net(),
            "capabilities": list(capabilities.INSTALL),
            "devices": [],
            "read_only": False,
            "disk": None,
            "seccomp": _FILTERS.entry(),
            "tmpfs": {"tmp": 1 << 30, "shm": 64 << 20},
            "rlimits": limits.install_rlimits(bounds),
            "limits": limits.install_groups(bounds),
            "limits_required": limits.install_required(bounds),
            "service": None,
            "volatile": True,
            "timeout": bounds.install_seconds,
        }


def build_tid(tid: str) -> str:
    """Return the id that runs of ``tid``'s install script have: pins and locks of their own."""
    return hashlib.sha256(f"build {tid}".encode()).hexdigest()[:32]
