"""The launcher in the foreground: signals go in, the terminal goes both ways, the exit status comes out."""

from __future__ import annotations

import fcntl
import os
import select
import termios

from isochamber.errors import EXIT_SIGNAL_BASE
from isochamber.launch.lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from types import FrameType
    from typing import Protocol

    class Started(Protocol):
        """What was started, here (running.Running) or by the supervisor (serve.client.Remote)."""

        end: _socket.socket
        master: int | None
        pid: int | None
        exit_code: int | None

        def hear(self) -> None: ...  # noqa: D102 - as there
        def kill(self, number: int) -> None: ...  # noqa: D102 - as there
        def catches(self, number: int) -> bool: ...  # noqa: D102 - as there
        def freeze(self, *, frozen: bool) -> None: ...  # noqa: D102 - as there

    from isochamber.launch.enforcement import Enforcement

_FORWARDED = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
)  # fmt: skip
_CHUNK = 65536
_WINSIZE = b"\0" * 8


class Foreground:
    """One running tenant and the launcher's own descriptors 0, 1 and 2."""

    def __init__(self, running: Started) -> None:
        self.running = running
        self.enforcement: Enforcement | None = None  # of the learned filter of a tenant that was started here
        self._pending: list[int] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._cooked: list[object] | None = None  # the operator's terminal settings, while ours is raw
        self._input = b""  # read from the operator, not yet taken by the tenant's terminal
        self._forced: int | None = None  # a signal that we had to make true
        self._stopped_by_us = False

    def supervise(self, timeout: float | None = None) -> int:
        """Return the exit code when the tenant has ended; ``timeout`` in seconds kills it (the code is then 137)."""
        former = {
            number: signal.signal(number, self._note) for number in (*_FORWARDED, signal.SIGWINCH, signal.SIGTSTP)
        }
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        if timeout is not None:
            signal.signal(signal.SIGALRM, self._time_is_up)
            signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            while self.running.exit_code is None:
                self._turn()
            self._drain()
        finally:
            self._restore()
            if self.enforcement is not None:
                self.enforcement.finish()
            signal.set_wakeup_fd(-1)
            for number, handler in former.items():
                signal.signal(number, handler)
        return self.running.exit_code if self._forced is None else EXIT_SIGNAL_BASE + self._forced

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._pending.append(number)

    def _time_is_up(self, _number: int, _frame: FrameType | None) -> None:
        self.running.kill(signal.SIGKILL)

    # One turn of the loop.

    def _turn(self) -> None:
        running = self.running
        if running.master is not None and self._cooked is None:
            self._raw()
        poller = select.poll()
        poller.register(running.end.fileno(), select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        if running.master is not None:
            poller.register(running.master, select.POLLIN | (select.POLLOUT if self._input else 0))
            if not self._input:
                poller.register(0, select.POLLIN)
        listener = None if self.enforcement is None else self.enforcement.descriptor()
        if listener is not None:
            poller.register(listener, select.POLLIN)
        ready = dict(poller.poll())
        if self.enforcement is not None and listener in ready:
            self.enforcement.serve()
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        while self._pending:
            self._handle(self._pending.pop(0))
        if running.master is not None:
            self._shuttle(ready)
        if running.end.fileno() in ready:
            running.hear()

    def _handle(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._suspend()
        else:
            self._forward(number)

    def _forward(self, number: int) -> None:
        """Give the tenant a signal, and its default action too when a PID 1 without a handler would not have it."""
        if self.running.catches(number):
            self.running.kill(number)
        else:
            self._forced = number
            self.running.kill(signal.SIGKILL)

    def say(self, line: str) -> None:
        """Print a line of ours beside what the tenant prints."""
        end = "\n" if self._cooked is None else "\r\n"  # a raw terminal begins no line by itself
        _write_all(2, f"isochamber: {line}{end}".encode("utf-8", "backslashreplace"))

    # The terminal.

    def _shuttle(self, ready: dict[int, int]) -> None:
        master = self.running.master
        assert master is not None  # noqa: S101 - the caller looked
        if ready.get(master, 0) & select.POLLIN:
            _write_all(1, os.read(master, _CHUNK))
        elif ready.get(master, 0) & (select.POLLHUP | select.POLLERR):
            self._close_terminal()  # every process of the tenant has closed it; its end will be said
            return
        if ready.get(master, 0) & select.POLLOUT and self._input:
            self._input = self._input[os.write(master, self._input) :]
        if ready.get(0, 0):
            self._take_input(master)

    def _take_input(self, master: int) -> None:
        data = os.read(0, _CHUNK)
        if not data:  # the operator's terminal hung up
            self._forward(signal.SIGHUP)
            self._close_terminal()
            return
        modes = termios.tcgetattr(master)
        if modes[3] & termios.ISIG:
            for index, number in (
                (termios.VINTR, signal.SIGINT), (termios.VQUIT, signal.SIGQUIT), (termios.VSUSP, signal.SIGTSTP),
            ):  # fmt: skip
                character = modes[6][index]
                if (
                    isinstance(character, bytes)
                    and character != b"\0"
                    and character in data
                    and self._init_is_foreground()
                ):
                    self._special(number)
        self._input += data

    def _init_is_foreground(self) -> bool:
        """Say whether the terminal's foreground process group is PID 1's own."""
        try:
            with open(f"/proc/{self.running.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return fields[2] == fields[5]  # pgrp and tpgid, proc_pid_stat(5)

    def _special(self, number: int) -> None:
        r"""Ctrl-C, Ctrl-\ and Ctrl-Z do nothing to a PID 1 without a handler: make their meaning true."""
        if self.running.catches(number):
            return
        if number == signal.SIGTSTP:
            self._suspend()
        else:
            self._forward(number)

    def _raw(self) -> None:
        self._cooked = termios.tcgetattr(0)
        self._resize()
        make_raw(0)

    def _restore(self) -> None:
        if self._cooked is not None:
            try:
                termios.tcsetattr(0, termios.TCSADRAIN, self._cooked)  # type: ignore[arg-type] # what tcgetattr gave
            except termios.error:
                pass  # the operator's terminal is gone
            self._cooked = None

    def _resize(self) -> None:
        if self.running.master is not None:
            try:
                size = fcntl.ioctl(0, termios.TIOCGWINSZ, _WINSIZE)
                fcntl.ioctl(self.running.master, termios.TIOCSWINSZ, size)
            except OSError:
                pass  # a terminal without a size

    def _suspend(self) -> None:
        """Ctrl-Z: stop the tenant, then ourselves with the terminal as the shell wants it; ``fg`` continues both."""
        self.running.freeze(frozen=True)
        self._restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        # Continued here.
        self.running.freeze(frozen=False)
        if self.running.master is not None:
            self._raw()

    def _drain(self) -> None:
        """Show what the tenant wrote last: its terminal holds it until it is read."""
        master = self.running.master
        if master is None:
            return
        os.set_blocking(master, False)
        try:
            while data := os.read(master, _CHUNK):
                _write_all(1, data)
        except OSError:
            pass  # EIO: every slave is closed and all is read (pty(7)); EAGAIN: a descendant lives elsewhere
        self._close_terminal()

    def _close_terminal(self) -> None:
        if self.running.master is not None:
            os.close(self.running.master)
            self.running.master = None


def make_raw(descriptor: int) -> None:
    """Pass every byte of a terminal on as it is typed (cfmakeraw(3))."""
    modes = termios.tcgetattr(descriptor)
    modes[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
        | termios.ICRNL | termios.IXON
    )  # fmt: skip
    modes[1] &= ~termios.OPOST
    modes[2] = (modes[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    modes[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSANOW, modes)


def _write_all(descriptor: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BlockingIOError:
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT)
        poller.poll()
        _write_all(descriptor, data)
    except (BrokenPipeError, OSError):
        pass  # nobody reads; the tenant goes on until it is told to end
