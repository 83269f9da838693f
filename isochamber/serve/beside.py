"""The nursery's order to run a command beside a tenant, with the tenant's rights: exec, and health."""

from __future__ import annotations

import gc
import os

from isochamber.errors import IsochamberError
from isochamber.launch import channel, records, start, syscalls
from isochamber.launch.entry import Entry
from isochamber.serve import held as holding
from isochamber.serve import spare
from isochamber.serve.held import Held
from isochamber.serve.launcher import Launcher, refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isochamber.serve.nursery import Nursery


class Beside:
    """Starts commands in a nursery's tenants."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._number = 0
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def start(self, order: dict[str, Any], descriptors: list[int]) -> None:
        """Run what ``order`` says beside its tenant. Raises IsochamberError, OSError."""
        client = Launcher(descriptors.pop(0)) if descriptors else None
        try:
            self._exec_in(order, descriptors, client)
        except OSError as error:
            raise refuse(client, IsochamberError.from_os(error, stage="exec", tenant=order.get("name"))) from error
        except IsochamberError as error:
            refuse(client, error)
            raise

    def _exec_in(self, order: dict[str, Any], descriptors: list[int], client: Launcher | None) -> None:
        tenant = self._nursery.held.get(order["tid"])
        if tenant is None or tenant.prepared is None or tenant.status is not None or not tenant.running:
            raise IsochamberError("does not run", stage="exec", tenant=order.get("name"), hint="isochamber start it")
        self._number += 1
        held = Held(f"{tenant.tid}/{self._number}", "exec", tenant.tid, tenant.name)
        held.client, held.note = client, order.get("note")
        held.prepared = _beside(tenant, order)
        ours, _ = holding.stdio("exec", descriptors)
        held.setup, other = channel.pair()
        group = tenant.prepared.groups.v2
        group_fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if group else None
        try:
            syscalls.setns(tenant.pidfd, syscalls.CLONE_NEWPID)  # of our next child, not of ourselves
            try:
                pid, pidfd = syscalls.clone3(0, cgroup_fd=group_fd)
                if pid == 0:
                    _as_a_tenant(ours, tenant.pidfd, other.fileno())
                    start.joining_side(held.prepared, tenant.pidfd, other)
            finally:
                syscalls.setns(self._own_pids, syscalls.CLONE_NEWPID)
        except OSError as error:
            held.client = None
            held.close()
            raise IsochamberError.from_os(error, stage="exec", tenant=tenant.name) from error
        finally:
            other.close()
            if group_fd is not None:
                os.close(group_fd)
            if not descriptors:
                for descriptor in ours:
                    os.close(descriptor)
        held.pid, held.pidfd = pid, pidfd
        held.host_pid = records.pid_of(pidfd)
        self._nursery.held[held.key] = held
        self._nursery.tending.watch_all(held)
        self._nursery.report({"on": "started", "id": order.get("id"), **held.describe()})
        if client is not None:
            client.started(pidfd)


def _beside(tenant: Held, order: dict[str, Any]) -> start.Prepared:
    """Return what a command beside ``tenant`` is started with: as the tenant was, but for its words and ids."""
    assert tenant.prepared is not None  # noqa: S101 - the caller looked
    was = tenant.prepared
    entry = Entry.__new__(Entry)
    for name in Entry.__slots__:
        setattr(entry, name, getattr(was.entry, name))
    entry.argv = order["argv"]
    entry.env = {**was.entry.env, **(order.get("env") or {})}
    entry.env.pop("NOTIFY_SOCKET", None)
    entry.cwd = order.get("cwd") or was.entry.cwd
    entry.uid = order.get("uid", was.entry.uid)
    entry.gid = order.get("gid", was.entry.gid)
    made = start.Prepared.__new__(start.Prepared)
    for name in start.Prepared.__slots__:
        setattr(made, name, getattr(was, name))
    made.entry, made.terminal, made.waits, made.user = entry, bool(order.get("terminal")), False, tenant.pidfd
    return made


def _as_a_tenant(ours: list[int], *kept: int) -> None:
    """In the new process: its own three descriptors and ``kept``, and no protection that is the nursery's alone."""
    gc.disable()  # it lives for milliseconds
    for number, descriptor in enumerate(ours):
        os.dup2(descriptor, number)
    spare.close_all_but(*kept)
    spare.score(0)
