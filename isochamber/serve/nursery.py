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
import sys

from isochamber import __version__, paths
from isochamber.errors import IsochamberError
from isochamber.launch import syscalls
from isochamber.launch.lean import signal
from isochamber.serve import rebind, spare, wire
from isochamber.serve.beside import Beside
from isochamber.serve.held import Held
from isochamber.serve.launcher import channel_of
from isochamber.serve.loop import Loop
from isochamber.serve.reports import Reports
from isochamber.serve.starts import Starts
from isochamber.serve.tending import Tending, told_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NAME = b"isochamber-nurs\0"  # what ps shows: prctl(2), PR_SET_NAME, 15 characters


class Nursery:
    """What is held, and the orders of the supervisor."""

    def __init__(self, listener: _socket.socket) -> None:
        self.loop = Loop(self._bug)
        self.held: dict[str, Held] = {}
        self.own_pid = int(os.readlink("/proc/self"))  # as the host counts
        self.tending = Tending(self)
        self._starts, self._beside = Starts(self), Beside(self)
        self._listener = listener
        self._supervisor: Reports | None = None
        self._retired = False
        self._orders: dict[str, Callable[[dict[str, Any], list[int]], None]] = {
            "exec": self._beside.start, "signal": self._signal, "freeze": self._freeze, "attach": self._attach,
            "list": self._list, "forget": self._forget, "ipc": self._rebind, "note": self._note,
            "retire": self._retire, "quit": self._quit,
        }  # fmt: skip
        self.loop.watch(listener.fileno(), self._accept)

    @property
    def has_supervisor(self) -> bool:
        """Whether anybody hears what is reported."""
        return self._supervisor is not None

    def run(self) -> None:
        """Keep tenants until told to quit, or until the last one has ended after another nursery took over."""
        self._starts.keep_a_spare()
        self.loop.run(self._after_a_round)

    def _after_a_round(self) -> None:
        if not self._retired:
            self._starts.keep_a_spare()
        elif self.has_supervisor and all(held.status is not None for held in self.held.values()):
            os.unlink(_path_of_retired(self.own_pid))
            self.loop.over = True

    def _accept(self, _happened: int) -> None:
        try:
            descriptor, _ = self._listener._accept()  # type: ignore[attr-defined] # what socket.accept is made of
        except OSError:
            return  # it has given up, or no descriptor is left: it tries again
        self._hang_up()  # the new one knows that the former is dead: it holds the supervisors' lock
        self._supervisor = Reports(self.loop, descriptor, self._hear)

    def _hang_up(self) -> None:
        if self._supervisor is not None:
            self._supervisor.close()
            self._supervisor = None

    def _bug(self, held: Held | None, error: Exception) -> None:
        """Give up the tenant that something went wrong for; the others go on."""
        if held is not None:
            self.tending.give_up(held, error)
        else:
            self._hang_up()  # it asks for everything anew

    def report(self, message: dict[str, Any]) -> None:
        """Tell the supervisor, if there is one."""
        if self._supervisor is None:
            return
        try:
            self._supervisor.send(message)
        except OSError:
            self._hang_up()  # dead, or stopped for long: it asks for everything anew

    def _hear(self) -> None:
        if self._supervisor is None:
            return
        try:
            packet, descriptors = wire.receive_json(self._supervisor.end)
            head, _, entry = packet.partition(b"\n")
            order = wire.parse(head) if packet else None
        except (OSError, ValueError):
            self._hang_up()
            return
        if order is None:
            self._hang_up()
            return
        try:
            if order["do"] == "start":
                self._start(order, packet, entry, descriptors)
            else:
                self._orders[order["do"]](order, descriptors)
        except IsochamberError as error:
            self.report({"on": "refused", "id": order.get("id"), "error": told_of(error)})
        except Exception as error:  # one order that is wrong is refused, whatever it is
            wrapped = IsochamberError(f"{type(error).__name__}: {error}", stage="nursery")
            self.report({"on": "refused", "id": order.get("id"), "error": told_of(wrapped)})
        finally:
            wire.close_all(descriptors)  # what was kept has been taken out

    # Orders.

    def _start(self, order: dict[str, Any], packet: bytes, entry: bytes, descriptors: list[int]) -> None:
        if self._retired:
            raise IsochamberError("another nursery has taken over", stage="nursery", hint="try again")
        self._starts.start(order, packet, entry, descriptors)

    def _retire(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        """Let another nursery take the place: keep who runs until they end, start nobody, then end."""
        if not self._retired:
            os.rename(paths.serve_file("nursery"), _path_of_retired(self.own_pid))
            self._retired = True
            self._starts.let_go_of_the_spare()
            for held in tuple(self.held.values()):
                if held.kind == "warm" and held.status is None:
                    self._starts.throw_away(held)
        self.report({"on": "done", "id": order.get("id"), "path": _path_of_retired(self.own_pid)})

    def _find(self, order: dict[str, Any]) -> Held:
        held = self.held.get(order["key"])
        if held is None or held.status is not None:
            raise IsochamberError("does not run", stage="nursery", tenant=order.get("name"))
        return held

    def _signal(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        self._find(order).kill(order["number"])

    def _freeze(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        self._find(order).freeze(frozen=order["frozen"])
        self.report({"on": "done", "id": order.get("id")})

    def _attach(self, order: dict[str, Any], descriptors: list[int]) -> None:
        held = self._find(order)
        end = channel_of(descriptors.pop(0))
        held.attached.append(end)
        self.loop.watch(end.fileno(), lambda _happened: self.tending.hear_attached(held, end), held)
        self.report({"on": "done", "id": order.get("id"), "terminal": held.master is not None})

    def _list(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        for held in tuple(self.held.values()):
            self.report({"on": "held", **held.describe()})
        self.report({"on": "done", "id": order.get("id"), "version": wire.VERSION, **self._self()})

    def _self(self) -> dict[str, Any]:
        return {"pid": self.own_pid, "program": __version__, "retired": self._retired}

    def _forget(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        """The supervisor knows of an end: it need not be told again."""
        held = self.held.get(order["key"])
        if held is not None and held.ended_at == order["ended_at"]:
            del self.held[order["key"]]

    def _note(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        held = self.held.get(order["key"])
        if held is not None:
            held.note = order["note"]

    def _rebind(self, order: dict[str, Any], _descriptors: list[int]) -> None:
        held = self._find(order)
        if held.prepared is None or held.prepared.entry.ipc is None:
            raise IsochamberError("has no IPC directory", stage="ipc", tenant=held.name)
        rebind.ipc(held.prepared.entry, held.pidfd, held.host_pid)
        self.report({"on": "done", "id": order.get("id")})

    def _quit(self, _order: dict[str, Any], _descriptors: list[int]) -> None:
        """End, and with us the kernel ends every tenant; what they leave on the host is removed first."""
        for held in tuple(self.held.values()):
            if held.status is None:
                held.kill(signal.SIGKILL)
        for held in sorted(self.held.values(), key=lambda held: held.kind != "exec"):
            if held.status is None:
                self.tending.wait_for_end(held)
        self.loop.over = True


def _path_of_retired(pid: int) -> str:
    return paths.serve_file(f"nursery-{pid}")


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
        spare.score(-1000)
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
