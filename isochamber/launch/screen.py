"""The operator's terminal while a tenant has one of its own: bytes go both ways, and the keys mean what they say."""

import fcntl
import os
import select
import termios

from isochamber.launch.foreground import write_all
from isochamber.launch.lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.foreground import Foreground, Started

_CHUNK = 65536
_WINSIZE = b"\0" * 8


class Screen:
    """Descriptors 0 and 1, raw, and the master of the tenant's terminal."""

    def __init__(self, running: "Started", shown: "Foreground") -> None:
        """Begin; ``shown`` is told of what the keys mean."""
        self._running, self._shown = running, shown
        self._cooked: list[object] | None = None  # the operator's terminal settings, while ours is raw
        self._input = b""  # read from the operator, not yet taken by the tenant's terminal
        self.begin()

    @property
    def is_raw(self) -> bool:
        """Whether the operator's terminal passes every byte on as it is."""
        return self._cooked is not None

    def begin(self) -> None:
        """Make the operator's terminal raw, as long as the tenant has one."""
        if self._running.master is not None:
            self._cooked = termios.tcgetattr(0)
            self.resize()
            make_raw(0)

    def register(self, poller: select.poll) -> None:
        """Wait for what there is to pass on."""
        master = self._running.master
        if master is not None:
            poller.register(master, select.POLLIN | (select.POLLOUT if self._input else 0))
            if not self._input:
                poller.register(0, select.POLLIN)

    def shuttle(self, ready: dict[int, int]) -> None:
        """Pass on what can be passed on, both ways."""
        master = self._running.master
        if master is None:
            return
        if ready.get(master, 0) & select.POLLIN:
            write_all(1, os.read(master, _CHUNK))
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
            self._shown.forward(signal.SIGHUP)
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
            with open(f"/proc/{self._running.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return fields[2] == fields[5]  # pgrp and tpgid, proc_pid_stat(5)

    def _special(self, number: int) -> None:
        r"""Ctrl-C, Ctrl-\ and Ctrl-Z do nothing to a PID 1 without a handler: make their meaning true."""
        if self._running.catches(number):
            return
        if number == signal.SIGTSTP:
            self._shown.suspend()
        else:
            self._shown.forward(number)

    def restore(self) -> None:
        """Give the operator's terminal its own settings back."""
        if self._cooked is not None:
            try:
                termios.tcsetattr(0, termios.TCSADRAIN, self._cooked)  # type: ignore[arg-type] # what tcgetattr gave
            except termios.error:
                pass  # the operator's terminal is gone
            self._cooked = None

    def resize(self) -> None:
        """Give the tenant's terminal the size of the operator's."""
        if self._running.master is not None:
            try:
                size = fcntl.ioctl(0, termios.TIOCGWINSZ, _WINSIZE)
                fcntl.ioctl(self._running.master, termios.TIOCSWINSZ, size)
            except OSError:
                pass  # a terminal without a size

    def drain(self) -> None:
        """Show what the tenant wrote last: its terminal holds it until it is read."""
        master = self._running.master
        if master is None:
            return
        os.set_blocking(master, False)
        try:
            while data := os.read(master, _CHUNK):
                write_all(1, data)
        except OSError:
            pass  # EIO: every slave is closed and all is read (pty(7)); EAGAIN: a descendant lives elsewhere
        self._close_terminal()

    def _close_terminal(self) -> None:
        if self._running.master is not None:
            os.close(self._running.master)
            self._running.master = None


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
