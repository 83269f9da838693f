"""The nursery: a small single-threaded process that forks the tenants and keeps them.

It is PID 1 of a PID namespace around all of them, so that nothing of them survives it,
and outlives the supervisor, which connects to it, tells it what to start, and hears
what ends. It parses nothing that a tenant wrote, decides nothing, and is small because
fork's cost grows with its parent. It keeps every tenant's output (see ring.py), so that
none is lost while there is no supervisor.

Orders and reports are objects (wire.py), an order in the key "do", a report in "on".
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import sys
import time

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import channel, handover, keeper, records, start, syscalls
from isochamber.launch.entry import Entry
from isochamber.launch.lean import signal
from isochamber.launch.messages import Word
from isochamber.serve import held as holding
from isochamber.serve import rebind, wire
from isochamber.serve.held import Held
from isochamber.serve.ring import Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NAME = b"isochamber-nurs\0"  # what ps shows: prctl(2), PR_SET_NAME, 15 characters


class Nursery:
    """The loop, and everything that it holds."""

    def __init__(self, listener: _socket.socket) -> None:
        self._listener = listener
        self._supervisor: _socket.socket | None = None
        self._epoll = select.epoll()
        self._actions: dict[int, Callable[[int], None]] = {}
        self._held: dict[str, Held] = {}
        self._number = 0
        self._over = self._round_is_over = False
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._own_pid = int(os.readlink("/proc/self"))  # as the host counts
        self._orders: dict[str, Callable[[dict[str, Any], list[int]], None]] = {
            "start": self._start, "exec": self._exec, "signal": self._signal, "freeze": self._freeze,
            "attach": self._attach, "list": self._list, "forget": self._forget, "ipc": self._rebind,
            "note": self._note, "quit": self._quit,
        }  # fmt: skip
        self._watch(listener.fileno(), self._accept)

    # The loop.

    def _watch(self, descriptor: int, action: Callable[[int], None], held: Held | None = None) -> None:
        self._epoll.register(descriptor, select.EPOLLIN)
        self._actions[descriptor] = action
        if held is not None:
            held.fds.add(descriptor)

    def _unwatch(self, descriptor: int, held: Held | None = None) -> None:
        if self._actions.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            self._round_is_over = True
        if held is not None:
            held.fds.discard(descriptor)

    def run(self) -> None:
        """Keep tenants until told to quit."""
        while not self._over:
            self._round_is_over = False
            for descriptor, happened in self._epoll.poll():
                self._actions[descriptor](happened)
                if self._round_is_over:
                    break  # a number may stand for something else by now; what is left over is told again

    def _accept(self, _happened: int) -> None:
        descriptor, _ = self._listener._accept()  # type: ignore[attr-defined] # what socket.accept is made of
        if self._supervisor is not None:
            self._hang_up()  # the new one knows that the former is dead: it holds the supervisors' lock
        self._supervisor = _socket.socket(fileno=descriptor)
        self._watch(descriptor, self._hear)

    def _hang_up(self) -> None:
        if self._supervisor is not None:
            self._unwatch(self._supervisor.fileno())
            self._supervisor.close()
            self._supervisor = None

    def _report(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        if self._supervisor is None:
            return
        try:
            wire.send(self._supervisor, message, descriptors)
        except OSError:
            self._hang_up()  # dead, or stopped for so long that its queue is full: it asks for everything anew

    def _hear(self, _happened: int) -> None:
        if self._supervisor is None:
            return
        try:
            order, descriptors = wire.receive(self._supervisor)
        except (OSError, ValueError):
            self._hang_up()
            return
        if order is None:
            self._hang_up()
            return
        try:
            self._orders[order["do"]](order, descriptors)
        except IsochamberError as error:
            self._report({"on": "refused", "id": order.get("id"), "error": _error(error)})
        except (OSError, KeyError, ValueError, TypeError) as error:
            wrapped = IsochamberError(f"{type(error).__name__}: {error}", stage="nursery")
            self._report({"on": "refused", "id": order.get("id"), "error": _error(wrapped)})
        finally:
            wire.close_all(descriptors)  # what was kept has been taken out

    # Orders.

    def _start(self, order: dict[str, Any], descriptors: list[int]) -> None:
        entry = Entry(order["entry"])
        kind = order["kind"]
        client = _socket.socket(fileno=descriptors.pop(0)) if kind == "run" else None
        try:
            waiting = self._held.get(entry.tid)
            if waiting is not None and waiting.kind == "warm" and waiting.status is None and kind != "warm":
                usable = waiting.note == order.get("digest") and not order.get("terminal") and not order.get("env")
                if usable and waiting.setup is not None:
                    self._hand_over(waiting, order, descriptors, client)
                    return
                self._throw_away(waiting)
            self._cold(entry, order, descriptors, client)
        except IsochamberError as error:
            error.tenant = entry.name
            if client is not None:
                channel.send_failure(client, error.stage, error)
                client.close()
            raise

    def _cold(self, entry: Entry, order: dict[str, Any], descriptors: list[int], client: _socket.socket | None) -> None:
        kind = order["kind"]
        held = Held(entry.tid, kind, entry.tid, entry.name)
        held.note = order.get("digest") if kind == "warm" else order.get("note")
        held.client = client
        if order.get("argv"):
            entry.argv = order["argv"]
        entry.env.update(order.get("env") or {})
        terminal = bool(order.get("terminal"))
        prepared = start.Prepared(order["root"], entry, own_terminal=terminal, waits=kind == "warm")
        held.prepared = prepared
        try:
            self._make_notify(held, entry)
            prepared.notify = held.notify.getsockname() if held.notify else None
            ours, pipes = ([], {}) if kind == "warm" else holding.stdio(kind, descriptors)
            if kind == "service":
                held.ring = Ring(order["logs"], entry.service.log_size, entry.service.log_count)  # type: ignore[union-attr] # only a plan has none
            held.pipes = pipes
            self._clone(held, prepared, ours, keep_open=bool(descriptors))
        except BaseException:
            held.client = None  # the caller tells it
            held.close()
            held.clean_up()
            raise
        finally:
            prepared.close()
        self._held[held.key] = held
        self._watch_all(held)
        self._report({"on": "started", "id": order.get("id"), **held.describe()})
        if client is not None:
            channel.send_started(client, held.pidfd)

    def _make_notify(self, held: Held, entry: Entry) -> None:
        if entry.service is None or entry.service.ready != "notify" or held.kind == "run":
            return
        path = paths.serve_file(f"notify-{entry.tid}")
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        held.notify = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
        held.notify.bind(path)
        os.chmod(path, 0o666)  # noqa: S103 - its directory is root's alone: the tenant's bind is the only way to it
        entry.env["NOTIFY_SOCKET"] = paths.NOTIFY_INSIDE

    def _clone(self, held: Held, prepared: start.Prepared, ours: list[int], *, keep_open: bool) -> None:
        held.setup, other = channel.pair()
        try:
            pid, pidfd = keeper.clone(prepared)
        except OSError as error:
            other.close()
            raise IsochamberError.from_os(
                error, stage="launch", hint="are namespaces enabled on this kernel?"
            ) from error
        if pid == 0:
            _as_a_tenant(ours, prepared.user, prepared.net, other.fileno())
            start.tenant_side(prepared, other)
        other.close()
        if not keep_open:
            for descriptor in ours:
                os.close(descriptor)
        held.pid, held.pidfd = pid, pidfd
        record = keeper.record(prepared, pidfd, self._own_pid, shared=True)
        held.host_pid, held.start_time = record.pid, record.start_time

    def _watch_all(self, held: Held) -> None:
        self._watch(held.pidfd, lambda _happened: self._ended(held), held)
        if held.setup is not None:
            self._watch(held.setup.fileno(), lambda _happened: self._set_up(held), held)
        if held.client is not None:
            self._watch(held.client.fileno(), lambda _happened: self._hear_client(held), held)
        if held.notify is not None:
            self._watch(held.notify.fileno(), lambda _happened: self._notified(held), held)
        for descriptor in held.pipes:
            self._watch_pipe(held, descriptor)

    def _watch_pipe(self, held: Held, descriptor: int) -> None:
        self._watch(descriptor, lambda _happened: self._output(held, descriptor), held)

    def _output(self, held: Held, descriptor: int) -> None:
        if not held.take_output(descriptor):
            self._unwatch(descriptor, held)
            os.close(descriptor)
            del held.pipes[descriptor]
            if held.master == descriptor:
                held.master = None

    def _hand_over(
        self, held: Held, order: dict[str, Any], descriptors: list[int], client: _socket.socket | None
    ) -> None:
        """Give the tenant that waits its descriptors and let it go on."""
        entry = held.prepared.entry if held.prepared else None
        if entry is None or entry.service is None or held.setup is None:
            raise IsochamberError("was just thrown away", stage="nursery", hint="try again")
        held.kind, held.note, held.client = order["kind"], order.get("note"), client
        ours, held.pipes = holding.stdio(held.kind, descriptors)
        try:
            handover.send(held.setup, order.get("argv") or [], ours)
        finally:
            if not descriptors:
                for descriptor in ours:
                    os.close(descriptor)
        if held.kind == "service":
            held.ring = Ring(order["logs"], entry.service.log_size, entry.service.log_count)
        held.started_at = time.time()
        for descriptor in held.pipes:
            self._watch_pipe(held, descriptor)
        if client is not None:
            self._watch(client.fileno(), lambda _happened: self._hear_client(held), held)
            channel.send_started(client, held.pidfd)
        records.write(
            held.tid,
            records.Record(held.host_pid, self._own_pid, held.start_time, held.prepared.groups.v2, True, False),  # type: ignore[union-attr] # looked at above
        )
        self._report({"on": "started", "id": order.get("id"), "was_warm": True, **held.describe()})

    def _throw_away(self, held: Held) -> None:
        """Kill a warm sandbox and wait for its end: its lock is wanted. Milliseconds: it holds one process."""
        held.kill(signal.SIGKILL)
        self._ended(held)
        self._held.pop(held.key, None)

    def _exec(self, order: dict[str, Any], descriptors: list[int]) -> None:
        client = _socket.socket(fileno=descriptors.pop(0)) if descriptors else None
        try:
            self._exec_in(order, descriptors, client)
        except IsochamberError as error:
            if client is not None:
                channel.send_failure(client, error.stage, error)
                client.close()
            raise

    def _exec_in(self, order: dict[str, Any], descriptors: list[int], client: _socket.socket | None) -> None:
        tenant = self._held.get(order["tid"])
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
        self._held[held.key] = held
        self._watch_all(held)
        self._report({"on": "started", "id": order.get("id"), **held.describe()})
        if client is not None:
            channel.send_started(client, pidfd)

    def _find(self, order: dict[str, Any]) -> Held:
        held = self._held.get(order["key"])
        if held is None or held.status is not None:
            raise IsochamberError("does not run", stage="nursery", tenant=order.get("name"))
        return held

    def _signal(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        self._find(order).kill(order["number"])

    def _freeze(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        self._find(order).freeze(frozen=order["frozen"])
        self._report({"on": "done", "id": order.get("id")})

    def _attach(self, order: dict[str, Any], descriptors: list[int]) -> None:
        held = self._find(order)
        end = _socket.socket(fileno=descriptors.pop(0))
        held.attached.append(end)
        self._watch(end.fileno(), lambda _happened: self._hear_attached(held, end), held)
        self._report({"on": "done", "id": order.get("id"), "terminal": held.master is not None})

    def _hear_attached(self, held: Held, end: _socket.socket) -> None:
        """Input for its terminal, or a new size of it (two numbers); an end hangs up."""
        try:
            packet, descriptors = wire.receive_packet(end)
        except OSError:
            packet, descriptors = b"", []
        wire.close_all(descriptors)
        if not packet:
            self._unwatch(end.fileno(), held)
            held.attached.remove(end)
            end.close()
        elif held.master is not None:
            try:
                if packet[:1] == b"0":
                    os.write(held.master, packet[1:])
                elif packet[:1] == b"W":
                    rebind.resize(held.master, packet[1:])
            except OSError:
                pass  # it does not read (EAGAIN) or has ended: as a terminal would, the rest is dropped

    def _list(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        for held in tuple(self._held.values()):
            self._report({"on": "held", **held.describe()})
        self._report({"on": "done", "id": order.get("id"), "version": wire.VERSION, "pid": self._own_pid})

    def _forget(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        """The supervisor knows of an end: it need not be told again."""
        held = self._held.get(order["key"])
        if held is not None and held.ended_at == order["ended_at"]:
            del self._held[order["key"]]

    def _note(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        held = self._held.get(order["key"])
        if held is not None:
            held.note = order["note"]

    def _rebind(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        held = self._find(order)
        if held.prepared is None or held.prepared.entry.ipc is None:
            raise IsochamberError("has no IPC directory", stage="ipc", tenant=held.name)
        rebind.ipc(held.prepared.entry, held.pidfd, held.host_pid)
        self._report({"on": "done", "id": order.get("id")})

    def _quit(self, _order: dict[str, Any], _descriptors: list[int]) -> None:
        """End, and with us the kernel ends every tenant; what they leave on the host is removed first."""
        for held in tuple(self._held.values()):
            if held.status is None:
                held.kill(signal.SIGKILL)
        for held in sorted(self._held.values(), key=lambda held: held.kind != "exec"):
            if held.status is None:
                self._ended(held)
        self._over = True

    # What happens to tenants.

    def _set_up(self, held: Held) -> None:
        """Hear its side of the start: a failure, its terminal, or the end of the channel, which is the exec."""
        if held.setup is None:
            return
        word, packet, descriptor = channel.receive(held.setup)
        if word is None:
            self._unwatch(held.setup.fileno(), held)
            held.setup.close()
            held.setup = None
            if held.failure is None:
                held.running = True
                self._report({"on": "running", "key": held.key})
            return
        if word == Word.TERMINAL and descriptor is not None:
            if held.client is not None:
                channel.send_terminal(held.client, descriptor)
                os.close(descriptor)
            else:
                os.set_blocking(descriptor, False)
                held.master = descriptor
                held.pipes[descriptor] = 1
                self._watch_pipe(held, descriptor)
        elif word == Word.FAILED:
            held.failure = _told(packet)
            if held.client is not None:
                try:
                    held.client.send(packet, _socket.MSG_NOSIGNAL)
                except OSError:
                    pass  # nobody waits for it

    def _hear_client(self, held: Held) -> None:
        """A launcher may ask for signals and freezing; when it dies, what it started ends."""
        if held.client is None:
            return
        try:
            word, packet, descriptor = channel.receive(held.client)
        except OSError:
            word, packet, descriptor = None, b"", None
        if descriptor is not None:
            os.close(descriptor)
        if word == Word.SIGNAL and packet[1:].isdigit() and 0 < int(packet[1:]) < signal.NSIG:
            held.kill(int(packet[1:]))
        elif word == Word.FREEZE:
            held.freeze(frozen=packet[1:] == b"1")
        elif word is None:
            self._unwatch(held.client.fileno(), held)
            held.client.close()
            held.client = None
            held.kill(signal.SIGKILL)

    def _notified(self, held: Held) -> None:
        if held.notify is None:
            return
        try:
            packet = held.notify.recv(4096)
        except OSError:
            return
        for line in packet.split(b"\n"):
            key, _, value = line.partition(b"=")
            if key == b"READY" and value == b"1":
                held.ready = True
                self._report({"on": "ready", "key": held.key})
            elif key == b"STATUS":
                text = value.decode("utf-8", "replace")[:200]
                self._report({"on": "status", "key": held.key, "text": text})

    def _ended(self, held: Held) -> None:
        """Reap it, keep its last words, clean up, and tell: nothing of it is left when somebody hears of it."""
        _, held.status = os.waitpid(held.pid, 0)
        if held.setup is not None and held.kind != "warm":
            self._unwatch(held.setup.fileno(), held)
            os.set_blocking(held.setup.fileno(), False)
            try:
                while held.setup is not None:  # a failure that it has just sent
                    self._set_up_late(held)
            except BlockingIOError:
                pass
        for descriptor in tuple(held.pipes):
            self._unwatch(descriptor, held)
            while _readable(descriptor) and held.take_output(descriptor):
                pass
        for descriptor in tuple(held.fds):
            self._unwatch(descriptor, held)
        lost = held.ring.failed if held.ring else 0
        try:
            held.clean_up()
        except OSError as error:
            self._report(
                {"on": "left", "key": held.key, "error": _error(IsochamberError.from_os(error, stage="clean up"))}
            )
        held.ended_at = time.time()
        # The supervisor first: who hears the end from us may ask it for the next start at once.
        report = {"on": "ended", **held.describe(), "lost": lost}
        client, held.client = held.client, None
        held.close()
        self._report(report)
        if client is not None:
            channel.send_ended(client, held.status)
            client.close()
        if held.kind in ("exec", "warm") and self._supervisor is None:
            self._held.pop(held.key, None)  # nobody asks for these again

    def _set_up_late(self, held: Held) -> None:
        assert held.setup is not None  # noqa: S101 - the caller looked
        word, packet, descriptor = channel.receive(held.setup)
        if descriptor is not None:
            os.close(descriptor)
        if word == Word.FAILED:
            held.failure = _told(packet)
            if held.client is not None:
                held.client.send(packet, _socket.MSG_NOSIGNAL)
        elif word is None:
            held.setup.close()
            held.setup = None


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
    """In the new process: its own three descriptors and ``kept``, and no protection that is the nursery's alone.

    Everything else is closed at once, and not at the exec: with hundreds of tenants it
    is more than the tenant's own limit of open files lets it have.
    """
    gc.disable()  # it lives for milliseconds
    for number, descriptor in enumerate(ours):
        os.dup2(descriptor, number)
    last = 2
    for descriptor in sorted(kept):
        if descriptor > last + 1:
            syscalls.close_range(last + 1, descriptor - 1)
        last = max(last, descriptor)
    syscalls.close_range(last + 1)
    _score(0)


def _score(value: int) -> None:
    """Say how likely we are killed when memory is short (proc_pid_oom_score_adj(5)); not allowed everywhere."""
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"%d" % value)
        finally:
            os.close(descriptor)
    except OSError:
        pass


def _readable(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))


def _error(error: IsochamberError) -> dict[str, Any]:
    return {
        "what": error.what, "stage": error.stage, "tenant": error.tenant, "path": error.path, "errno": error.errno,
        "hint": error.hint, "exit_code": error.exit_code,
    }  # fmt: skip


def _told(packet: bytes) -> dict[str, Any]:
    from isochamber.launch import messages  # noqa: PLC0415 - only when something failed

    told = messages.decode_failure(packet)
    return {
        "what": told.what, "stage": told.step, "tenant": None, "path": told.path, "errno": told.errno,
        "hint": told.hint, "exit_code": told.code,
    }  # fmt: skip


def main() -> int:
    """Become a nursery, apart from who started it: returns when it can be connected to, or fails with a line."""
    os.makedirs(os.path.dirname(paths.serve_file("nursery")), 0o700, exist_ok=True)
    path = paths.serve_file("nursery")
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.unlink(path)  # of one that has died: whoever starts us holds the supervisors' lock
    except FileNotFoundError:
        pass
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(4)
    _raise_the_number_of_descriptors()
    pid, _ = syscalls.clone3(syscalls.CLONE_NEWPID)
    if pid:
        return 0
    try:
        os.setsid()
        syscalls.prctl(syscalls.PR_SET_NAME, syscalls.address(_NAME))
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number, descriptor in enumerate((nothing, nothing, log)):
            os.dup2(descriptor, number)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor != listener.fileno():
                try:
                    os.close(descriptor)
                except OSError:
                    pass  # the one that listed
        _score(-1000)
        gc.freeze()  # what is there now stays: no collection touches its pages, which the tenants' processes share
        Nursery(listener).run()
    except BaseException:  # a bug of ours: in the log, and nobody runs on with half of a nursery
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)  # and everything of this PID namespace with us


def _raise_the_number_of_descriptors() -> None:
    import resource  # noqa: PLC0415 - once

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
