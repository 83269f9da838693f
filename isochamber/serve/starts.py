"""The nursery's orders to start a tenant: cold, from a sandbox that waits, or a sandbox that is to wait."""

from __future__ import annotations

import os
import time

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, channel, handover, records, start, verify
from isochamber.launch.entry import Entry
from isochamber.launch.lean import signal
from isochamber.serve import held as holding
from isochamber.serve import spare
from isochamber.serve.held import Held
from isochamber.serve.launcher import Launcher, refuse
from isochamber.serve.notifying import Notifying
from isochamber.serve.ring import Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isochamber.serve.nursery import Nursery

_AFTERWARDS = 0.005  # seconds between a start and the fork of the process for the next one
_AGAIN = 1.0  # seconds until one that failed is tried again


class Starts:
    """Starts tenants for a nursery, each from the spare process that waits."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._trees = cgroup.Remembered()
        self._namespaces = verify.namespaces()
        self._spare: spare.Spare | None = None
        self._is_due = False  # the fork of the next one
        self._wanted = True  # until there is to be no next start

    def keep_a_spare(self) -> None:
        """Fork the next tenant's process soon: not while who was started last begins to run."""
        if not self._is_due and self._lacks_a_spare():
            self._fork_in(_AFTERWARDS)

    def _lacks_a_spare(self) -> bool:
        """Say whether there is none and nobody waits for a start."""
        if self._spare is not None or not self._wanted or self._nursery.loop.over:
            return False
        return all(held.setup is None or held.kind == "warm" for held in self._nursery.held.values())

    def _fork_in(self, seconds: float) -> None:
        self._is_due = True
        self._nursery.loop.later(seconds, self._fork)

    def _fork(self) -> None:
        self._is_due = False
        if self._lacks_a_spare():
            try:
                self._spare = spare.Spare(self._namespaces)
            except (IsochamberError, OSError):
                self._fork_in(_AGAIN)  # who wants to start something meanwhile will be told

    def let_go_of_the_spare(self) -> None:
        """End it: there will be no next start."""
        self._wanted = False
        if self._spare is not None:
            self._spare.discard()
            self._spare = None

    def start(self, order: dict[str, Any], packet: bytes, text: bytes, descriptors: list[int]) -> None:
        """Start what ``order`` (the first line of ``packet``; ``text`` of an entry is the second) says.

        Raises IsochamberError, OSError.
        """
        kind = order["kind"]
        client = Launcher(descriptors.pop(0)) if kind == "run" else None
        try:
            waiting = self._nursery.held.get(order["tid"])
            if waiting is not None and waiting.kind == "warm" and waiting.status is None and kind != "warm":
                usable = waiting.note == order.get("digest") and not order.get("terminal") and not order.get("env")
                if usable and self._hand_over(waiting, order, descriptors, client):
                    return
                self.throw_away(waiting)
            self._cold(order, packet, text, descriptors, client)
        except OSError as error:
            raise refuse(client, IsochamberError.from_os(error, stage="nursery", tenant=order["name"])) from error
        except IsochamberError as error:
            error.tenant = order["name"]
            refuse(client, error)
            raise

    def _cold(
        self, order: dict[str, Any], packet: bytes, text: bytes, descriptors: list[int], client: Launcher | None
    ) -> None:
        kind, tid = order["kind"], order["tid"]
        held = Held(tid, kind, tid, order["name"])
        held.note = order.get("digest") if kind == "warm" else order.get("note")
        held.client = client
        process, self._spare = self._spare or spare.Spare(self._namespaces), None
        prepared = None
        ours: list[int] = []
        try:
            process.read(packet)  # it does while we go on
            entry = spare.entry_of(order, text)
            if (entry.tid, entry.name) != (tid, order["name"]):
                raise IsochamberError("the order is of another tenant than its entry", stage="nursery")
            prepared = start.Prepared(
                order["root"], entry, own_terminal=bool(order.get("terminal")), waits=kind == "warm",
                spare=process.clone_into, listens=True, trees=self._trees.trees, namespaces=self._namespaces,
            )  # fmt: skip
            held.prepared = prepared
            self._make_notify(held, entry)
            prepared.notify = held.notify.path if held.notify else None
            if kind != "warm":
                ours, held.pipes = holding.stdio(kind, descriptors)
            process.go(prepared, ours)  # it makes its mounts while we go on
            if kind == "service":
                held.ring = Ring(order["logs"], entry.service.log_size, entry.service.log_count)  # type: ignore[union-attr] # only a plan has none
            prepared.make_rest()
            process.born()
            held.setup, held.pid, held.pidfd = process.end, process.pid, process.pidfd
            held.host_pid, held.start_time = process.host_pid, process.start_time
            self._record(held, waits=prepared.waits)
            channel.send_go(process.end)
        except BaseException:
            held.client = held.setup = None  # the caller tells it
            held.pidfd = -1
            process.discard()
            held.close()
            held.clean_up()
            raise
        finally:
            if not descriptors:
                for descriptor in ours:
                    os.close(descriptor)
            if prepared is not None:
                prepared.close()
        self._nursery.held[held.key] = held
        self._nursery.tending.watch_all(held)
        self._nursery.report({"on": "started", "id": order.get("id"), **held.describe()})
        if client is not None:
            client.started(held.pidfd)
        process.forget_who_waited()

    def _record(self, held: Held, *, waits: bool) -> None:
        group = held.prepared.groups.v2 if held.prepared else None
        record = records.Record(held.host_pid, self._nursery.own_pid, held.start_time, group, True, waits)
        records.write(held.tid, record)

    def _make_notify(self, held: Held, entry: Entry) -> None:
        if entry.service is None or entry.service.ready != "notify" or held.kind == "run":
            return
        held.notify = Notifying(self._nursery, held, paths.serve_file(f"notify-{entry.tid}"))
        entry.env["NOTIFY_SOCKET"] = paths.NOTIFY_INSIDE

    def _hand_over(self, held: Held, order: dict[str, Any], descriptors: list[int], client: Launcher | None) -> bool:
        """Give the tenant that waits its descriptors and let it go on; False when it can't: it has just died, say."""
        entry = held.prepared.entry if held.prepared else None
        if entry is None or entry.service is None or held.setup is None:
            return False
        kind, ring = order["kind"], None
        self._record(held, waits=False)
        if kind == "service":
            ring = Ring(order["logs"], entry.service.log_size, entry.service.log_count)
        ours, pipes = holding.stdio(kind, descriptors)
        given = handover.send(held.setup, order.get("argv") or [], ours)
        if not descriptors:
            for descriptor in ours:
                os.close(descriptor)
        if not given:
            for descriptor in pipes:
                os.close(descriptor)
            if ring is not None:
                ring.close()
            return False
        held.kind, held.note, held.client, held.pipes, held.ring = kind, order.get("note"), client, pipes, ring
        held.started_at = time.time()
        for descriptor in held.pipes:
            self._nursery.tending.watch_pipe(held, descriptor)
        if client is not None:
            self._nursery.tending.watch_client(held)
            client.started(held.pidfd)
        self._nursery.report({"on": "started", "id": order.get("id"), "was_warm": True, **held.describe()})
        return True

    def throw_away(self, held: Held) -> None:
        """Kill a warm sandbox and wait for its end: its lock is wanted. Milliseconds: it holds one process."""
        held.kill(signal.SIGKILL)
        self._nursery.tending.wait_for_end(held)
        self._nursery.held.pop(held.key, None)
