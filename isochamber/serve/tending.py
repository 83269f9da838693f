"""What the nursery does when something happens to a tenant: its start goes on, it writes, says it is ready, ends."""

from __future__ import annotations

import _socket
import os
import time

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import channel
from isochamber.launch.lean import signal
from isochamber.launch.messages import Word
from isochamber.serve import rebind, refusing, wire
from isochamber.serve.loop import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from isochamber.serve.held import Held
    from isochamber.serve.nursery import Nursery


_SIGNALS = frozenset(b"%d" % number for number in range(1, signal.NSIG))
_LAST_WORDS = 512  # reads: a pipe holds 1 MiB at most, in 256 pieces at most
_TRACED = 0.2  # seconds between two looks at one that can't be reaped


class Tending:
    """Watches a nursery's tenants."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._loop = nursery.loop

    def watch_all(self, held: Held) -> None:
        """Watch everything of it."""
        self._loop.watch(held.pidfd, lambda _happened: self._has_ended(held), held)
        if held.setup is not None:
            self._loop.watch(held.setup.fileno(), lambda _happened: self._hear_setup(held), held)
        self.watch_client(held)
        if held.notify is not None:
            held.notify.watch()
        for descriptor in held.pipes:
            self.watch_pipe(held, descriptor)

    def watch_client(self, held: Held) -> None:
        """Hear what the launcher that started it wants, if one did."""
        if held.client is not None:
            self._loop.watch(held.client.fileno(), lambda _happened: self._hear_client(held), held)

    def watch_pipe(self, held: Held, descriptor: int) -> None:
        """Keep what it writes there."""
        self._loop.watch(descriptor, lambda _happened: self._output(held, descriptor), held)

    def _output(self, held: Held, descriptor: int) -> None:
        if not held.take_output(descriptor):
            self._loop.unwatch(descriptor, held)
            os.close(descriptor)
            del held.pipes[descriptor]
            if held.master == descriptor:
                held.master = None

    def hear_attached(self, held: Held, end: _socket.socket) -> None:
        """Input for its terminal, or a new size of it (two numbers); an end hangs up."""
        try:
            packet, descriptors = wire.receive_packet(end, flags=_socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # the client has a copy of this end, and was faster
        except OSError:
            packet, descriptors = b"", []
        wire.close_all(descriptors)
        if not packet:
            self._loop.unwatch(end.fileno(), held)
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

    def _hear_setup(self, held: Held) -> bool:
        """Hear its side of the start: a failure, its terminal, or the end of the channel, which is the exec.

        Returns whether there may be more. When it has ended already, these are its last words.
        """
        if held.setup is None:
            return False
        try:
            word, packet, descriptor = channel.receive(held.setup, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if word is None:
            self._loop.unwatch(held.setup.fileno(), held)
            held.setup.close()
            held.setup = None
            if held.failure is None and held.status is None:
                held.running = True
                self._nursery.report({"on": "running", "key": held.key})
        elif word == Word.TERMINAL and descriptor is not None:
            self._take_terminal(held, descriptor)
        elif word == Word.LISTENER and held.status is None:
            self._take_listener(held, int(packet[1:]))
        elif word == Word.FAILED:
            held.failure = told_of(channel.failure_of(packet, None))
            if held.client is not None:
                held.client.pass_on(packet)
        return held.setup is not None

    def _take_terminal(self, held: Held, master: int) -> None:
        if held.client is not None:
            held.client.terminal(master)
            os.close(master)
        else:
            os.set_blocking(master, False)
            held.master = master
            held.pipes[master] = 1
            self.watch_pipe(held, master)

    def _take_listener(self, held: Held, number: int) -> None:
        """Take what its learned filter hands over; a tenant whose refusals nobody could report does not run."""
        try:
            refusing.take(self._nursery, held, number)
        except OSError as error:
            wrapped = IsochamberError.from_os(error, stage="launch", tenant=held.name)
            held.failure = told_of(wrapped)
            if held.client is not None:
                held.client.failed("load the system call filters", wrapped)
            held.kill(signal.SIGKILL)

    def _hear_client(self, held: Held) -> None:
        """A launcher may ask for signals and freezing; when it dies, what it started ends."""
        if held.client is None:
            return
        word, packet = held.client.hear()
        if word == Word.SIGNAL and packet[1:] in _SIGNALS:
            held.kill(int(packet[1:]))
        elif word == Word.FREEZE:
            try:
                held.freeze(frozen=packet[1:] == b"1")
            except OSError:
                pass  # its group is just going
        elif word is None:
            self._loop.unwatch(held.client.fileno(), held)
            held.client.close()
            held.client = None
            held.kill(signal.SIGKILL)

    def _has_ended(self, held: Held) -> None:
        """Reap it. While another process of the tenant traces a command beside it (ptrace(2)), that can't be done."""
        if held.status is not None:
            return
        pid, status = os.waitpid(held.pid, os.WNOHANG)
        if pid:
            self._end(held, status)
        else:
            self._loop.unwatch(held.pidfd, held)
            self._loop.later(_TRACED, lambda: self._has_ended(held), held)

    def wait_for_end(self, held: Held) -> None:
        """Wait for the end of one that was killed: milliseconds."""
        _, status = os.waitpid(held.pid, 0)
        self._end(held, status)

    def _end(self, held: Held, status: int) -> None:
        """Keep its last words, clean up, and tell: nothing of it is left when somebody hears of it."""
        held.status = status
        while self._hear_setup(held):
            pass
        for descriptor in tuple(held.pipes):
            self._loop.unwatch(descriptor, held)
            for _ in range(_LAST_WORDS):  # somebody else may have its other end, and write for ever
                if not (readable(descriptor) and held.take_output(descriptor)):
                    break
        refusing.finish(self._nursery, held)
        self._finish(held, status)

    def _finish(self, held: Held, status: int) -> None:
        held.ended_at = time.time()
        for descriptor in tuple(held.fds):
            self._loop.unwatch(descriptor, held)
        lost = held.ring.failed if held.ring else 0
        try:
            held.clean_up()
        except OSError as error:
            self._nursery.report(
                {"on": "left", "key": held.key, "error": told_of(IsochamberError.from_os(error, stage="clean up"))}
            )
        # The supervisor first: who hears the end from us may ask it for the next start at once.
        report = {"on": "ended", **held.describe(), "lost": lost}
        client, held.client = held.client, None
        held.close()
        self._nursery.report(report)
        if client is not None:
            client.ended(status)
            client.close()
        if held.kind in ("exec", "warm") and not self._nursery.has_supervisor:
            self._nursery.held.pop(held.key, None)  # nobody asks for these again

    def give_up(self, held: Held, error: Exception) -> None:
        """End a tenant that a bug of ours was met for, and say so; what was done for it is not tried again."""
        if held.failure is None:
            log = paths.serve_file("nursery.log")
            what = f"{type(error).__name__}: {error}"
            held.failure = told_of(
                IsochamberError(what, stage="nursery", path=log, hint="a bug of isochamber's: this log says where")
            )
        for descriptor in tuple(held.fds):
            if held.status is not None or descriptor != held.pidfd:
                self._loop.unwatch(descriptor, held)
        if held.status is None:
            held.kill(signal.SIGKILL)
        elif held.ended_at is None:
            self._finish(held, held.status)


def told_of(error: IsochamberError) -> dict[str, Any]:
    """Return ``error`` as it travels to the supervisor."""
    return {
        "what": error.what, "stage": error.stage, "tenant": error.tenant, "path": error.path, "errno": error.errno,
        "hint": error.hint, "exit_code": error.exit_code,
    }  # fmt: skip
