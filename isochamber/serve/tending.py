"""What the nursery does when something happens to a tenant: its start goes on, it writes, says it is ready, ends."""

from __future__ import annotations

import _socket
import os
import time

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


class Tending:
    """Watches a nursery's tenants."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self._loop = nursery.loop

    def watch_all(self, held: Held) -> None:
        """Watch everything of it."""
        self._loop.watch(held.pidfd, lambda _happened: self.ended(held), held)
        if held.setup is not None:
            self._loop.watch(held.setup.fileno(), lambda _happened: self._set_up(held), held)
        self.watch_client(held)
        if held.notify is not None:
            self._loop.watch(held.notify.fileno(), lambda _happened: self._notified(held), held)
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
            packet, descriptors = wire.receive_packet(end)
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

    def _set_up(self, held: Held) -> None:
        """Hear its side of the start: a failure, its terminal, or the end of the channel, which is the exec."""
        if held.setup is None:
            return
        word, packet, descriptor = channel.receive(held.setup)
        if word is None:
            self._loop.unwatch(held.setup.fileno(), held)
            held.setup.close()
            held.setup = None
            if held.failure is None:
                held.running = True
                self._nursery.report({"on": "running", "key": held.key})
            return
        if word == Word.TERMINAL and descriptor is not None:
            if held.client is not None:
                channel.send_terminal(held.client, descriptor)
                os.close(descriptor)
            else:
                os.set_blocking(descriptor, False)
                held.master = descriptor
                held.pipes[descriptor] = 1
                self.watch_pipe(held, descriptor)
        elif word == Word.LISTENER:
            self._take_listener(held, int(packet[1:]))
        elif word == Word.FAILED:
            held.failure = told_of(channel.failure_of(packet, None))
            if held.client is not None:
                try:
                    held.client.send(packet, _socket.MSG_NOSIGNAL)
                except OSError:
                    pass  # nobody waits for it

    def _take_listener(self, held: Held, number: int) -> None:
        """Take what its learned filter hands over; a tenant whose refusals nobody could report does not run."""
        try:
            refusing.take(self._nursery, held, number)
        except OSError as error:
            wrapped = IsochamberError.from_os(error, stage="launch", tenant=held.name)
            held.failure = told_of(wrapped)
            if held.client is not None:
                channel.send_failure(held.client, "load the system call filters", wrapped)
            held.kill(signal.SIGKILL)

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
            self._loop.unwatch(held.client.fileno(), held)
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
                self._nursery.report({"on": "ready", "key": held.key})
            elif key == b"STATUS":
                text = value.decode("utf-8", "replace")[:200]
                self._nursery.report({"on": "status", "key": held.key, "text": text})

    def ended(self, held: Held) -> None:
        """Reap it, keep its last words, clean up, and tell: nothing of it is left when somebody hears of it."""
        _, held.status = os.waitpid(held.pid, 0)
        if held.setup is not None and held.kind != "warm":
            self._loop.unwatch(held.setup.fileno(), held)
            os.set_blocking(held.setup.fileno(), False)
            try:
                while held.setup is not None:  # a failure that it has just sent
                    self._set_up_late(held)
            except BlockingIOError:
                pass
        for descriptor in tuple(held.pipes):
            self._loop.unwatch(descriptor, held)
            while readable(descriptor) and held.take_output(descriptor):
                pass
        refusing.finish(self._nursery, held)
        for descriptor in tuple(held.fds):
            self._loop.unwatch(descriptor, held)
        lost = held.ring.failed if held.ring else 0
        try:
            held.clean_up()
        except OSError as error:
            self._nursery.report(
                {"on": "left", "key": held.key, "error": told_of(IsochamberError.from_os(error, stage="clean up"))}
            )
        held.ended_at = time.time()
        # The supervisor first: who hears the end from us may ask it for the next start at once.
        report = {"on": "ended", **held.describe(), "lost": lost}
        client, held.client = held.client, None
        held.close()
        self._nursery.report(report)
        if client is not None:
            channel.send_ended(client, held.status)
            client.close()
        if held.kind in ("exec", "warm") and not self._nursery.has_supervisor:
            self._nursery.held.pop(held.key, None)  # nobody asks for these again

    def _set_up_late(self, held: Held) -> None:
        assert held.setup is not None  # noqa: S101 - the caller looked
        word, packet, descriptor = channel.receive(held.setup)
        if descriptor is not None:
            os.close(descriptor)
        if word == Word.FAILED:
            held.failure = told_of(channel.failure_of(packet, None))
            if held.client is not None:
                held.client.send(packet, _socket.MSG_NOSIGNAL)
        elif word is None:
            held.setup.close()
            held.setup = None


def told_of(error: IsochamberError) -> dict[str, Any]:
    """Return ``error`` as it travels to the supervisor."""
    return {
        "what": error.what, "stage": error.stage, "tenant": error.tenant, "path": error.path, "errno": error.errno,
        "hint": error.hint, "exit_code": error.exit_code,
    }  # fmt: skip
