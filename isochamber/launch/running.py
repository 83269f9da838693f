"""A tenant that was started, as the launcher holds it."""

from __future__ import annotations

import os

from isochamber.errors import EXIT_OURS, IsochamberError, exit_code_of
from isochamber.launch import cgroup, channel, keeper, records, start, syscalls
from isochamber.launch.lean import signal
from isochamber.launch.messages import Word


class Running:
    """The keeper, the tenant's first process, and what they have said so far."""

    __slots__ = (
        "_life",
        "_offered",
        "end",
        "exit_code",
        "failure",
        "groups",
        "keeper",
        "listener",
        "master",
        "pid",
        "pidfd",
        "tenant",
        "tid",
    )

    def __init__(self, prepared: start.Prepared) -> None:
        """Clone the keeper, which clones the tenant; returns when that exists. Raises IsochamberError."""
        self.tenant = prepared.entry.name
        self.tid = prepared.entry.tid
        self.groups = prepared.groups
        self.pid: int | None = None  # as the host sees it, once STARTED came
        self.pidfd: int | None = None
        self.master: int | None = None
        self.listener: int | None = None  # of the tenant's learned filter, when it hands calls to us
        self._offered: int | None = None  # the same, as the tenant's process numbers it, until there is a pidfd
        self.failure: IsochamberError | None = None
        self.exit_code: int | None = None  # None while it runs
        life_read, self._life = os.pipe()
        self.end, other = channel.pair()
        try:
            self.keeper, keeper_fd = syscalls.clone3(syscalls.CLONE_NEWPID)
        except OSError as error:
            raise IsochamberError.from_os(
                error, stage="launch", tenant=self.tenant, hint="run as root, on a kernel with PID namespaces"
            ) from error
        if self.keeper == 0:
            os.close(self._life)
            self.end.close()
            keeper.keep(prepared, other, life_read)
        os.close(keeper_fd)
        os.close(life_read)
        other.close()
        while self.pid is None and self.exit_code is None:
            self.hear()

    def hear(self) -> None:
        """Take one message (waits for it) and remember what it says."""
        word, packet, descriptor = channel.receive(self.end)
        if word == Word.STARTED:
            self.pidfd = descriptor
            self.pid = -1 if descriptor is None else records.pid_of(descriptor)
            self._take_listener()
        elif word == Word.TERMINAL:
            self.master = descriptor
        elif word == Word.LISTENER:
            self._offered = int(packet[1:])
            self._take_listener()
        elif word == Word.FAILED:
            self.failure = channel.failure_of(packet, self.tenant)
        elif word == Word.LEFT:
            _warn(channel.failure_of(packet, self.tenant))
        elif word == Word.ENDED:
            self._ended(int(packet[1:]))
        else:
            self._keeper_gone()

    def _take_listener(self) -> None:
        """Copy the listener out of the tenant's process, which waits for that before it goes on."""
        if self.pidfd is None or self._offered is None:
            return
        try:
            self.listener = syscalls.pidfd_getfd(self.pidfd, self._offered)
        except OSError as error:
            self.failure = IsochamberError.from_os(error, stage="launch", tenant=self.tenant)
            self.kill(signal.SIGKILL)
        self._offered = None
        channel.send_go(self.end)

    def _ended(self, status: int) -> None:
        os.waitpid(self.keeper, 0)  # after its clean-up: the cgroup and the lock are free when we return
        self.exit_code = exit_code_of(status) if self.failure is None else self.failure.exit_code

    def _keeper_gone(self) -> None:
        """It was killed, or could not start the tenant: say so, and clean up in its place."""
        os.waitpid(self.keeper, 0)  # returns when all of its PID namespace is dead
        if self.failure is None:
            self.failure = IsochamberError(
                "its keeper was killed, and the tenant with it", stage="launch", tenant=self.tenant
            )
            self._clean_after_keeper()
        self.exit_code = EXIT_OURS

    def _clean_after_keeper(self) -> None:
        try:
            lock = records.lock(self.tid, self.tenant)
        except IsochamberError:
            return  # it has been started anew already: all of this is the new one's
        try:
            cgroup.remove_all(self.groups)
            records.forget(self.tid)
        except OSError as error:
            _warn(IsochamberError.from_os(error, stage="clean up", tenant=self.tenant))
        finally:
            os.close(lock)

    def kill(self, number: int) -> None:
        """Send the signal ``number`` to the tenant's PID 1; one that has ended is fine."""
        if self.pidfd is not None:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def catches(self, number: int) -> bool:
        """Say whether PID 1 would notice ``number``; see :func:`records.catches`."""
        return records.catches(self.pid, number)

    def freeze(self, *, frozen: bool) -> None:
        """Stop or continue all of the tenant: its cgroup, or where there is none its PID 1 alone."""
        if self.groups.v2 is not None:
            try:
                cgroup.freeze(self.groups.v2, frozen=frozen)
            except FileNotFoundError:
                pass  # it has just ended
            else:
                return
        self.kill(signal.SIGSTOP if frozen else signal.SIGCONT)


def _warn(error: IsochamberError) -> None:
    """Say what went wrong beside the tenant's own end, which stays the exit code."""
    try:
        os.write(2, f"isochamber: {error.line()}\n".encode())
    except OSError:
        pass  # nobody reads
