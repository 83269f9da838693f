"""The launcher in the foreground: signals go in, the terminal goes both ways, the exit status comes out."""

import os
import select

from isochamber.errors import EXIT_SIGNAL_BASE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import signal
    from types import FrameType
    from typing import Protocol

    class Started(Protocol):
        """What was started, here (running.Running) or by the supervisor (serve.remote.Remote)."""

        end: _socket.socket
        master: int | None
        exit_code: int | None

        @property
        def pid(self) -> int | None: ...  # noqa: D102 - as there
        def hear(self) -> None: ...  # noqa: D102 - as there
        def kill(self, number: int) -> None: ...  # noqa: D102 - as there
        def catches(self, number: int) -> bool: ...  # noqa: D102 - as there
        def freeze(self, *, frozen: bool) -> None: ...  # noqa: D102 - as there

    from isochamber.launch.enforcement import Enforcement
    from isochamber.launch.screen import Screen
else:
    import _signal as signal  # as lean.py has it, and without the JSON there

_TAKEN = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGWINCH, signal.SIGTSTP,
)  # fmt: skip


class Foreground:
    """One running tenant and the launcher's own descriptors 0, 1 and 2."""

    def __init__(self, running: "Started") -> None:
        self.running = running
        self.enforcement: Enforcement | None = None  # of the learned filter of a tenant that was started here
        self._pending: list[int] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._screen: Screen | None = None  # once the tenant has a terminal of its own
        self._forced: int | None = None  # a signal that we had to make true

    def supervise(self, timeout: float | None = None) -> int:
        """Return the exit code when the tenant has ended; ``timeout`` in seconds kills it (the code is then 137)."""
        taken = [number for number in _TAKEN if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stay ignored
        former = {number: signal.signal(number, self._note) for number in taken}
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)  # serve/run.pl has kept them waiting for us
        if timeout is not None:
            signal.signal(signal.SIGALRM, self._time_is_up)
            signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            while self.running.exit_code is None:
                self._turn()
            if self._screen is not None:
                self._screen.drain()
        finally:
            if self._screen is not None:
                self._screen.restore()
            if self.enforcement is not None:
                self.enforcement.finish()
            signal.set_wakeup_fd(-1)
            for number, handler in former.items():
                signal.signal(number, handler)
        return self.running.exit_code if self._forced is None else EXIT_SIGNAL_BASE + self._forced

    def _note(self, number: int, _frame: "FrameType | None") -> None:
        self._pending.append(number)

    def _time_is_up(self, _number: int, _frame: "FrameType | None") -> None:
        self.running.kill(signal.SIGKILL)

    # One turn of the loop.

    def _turn(self) -> None:
        running = self.running
        if running.master is not None and self._screen is None:
            from isochamber.launch.screen import Screen  # noqa: PLC0415 - most runs have none

            self._screen = Screen(running, self)
        poller = select.poll()
        poller.register(running.end.fileno(), select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        if self._screen is not None:
            self._screen.register(poller)
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
        if self._screen is not None:
            self._screen.shuttle(ready)
        if running.end.fileno() in ready:
            running.hear()

    def _handle(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self._screen is not None:
                self._screen.resize()
        elif number == signal.SIGTSTP:
            self.suspend()
        else:
            self.forward(number)

    def forward(self, number: int) -> None:
        """Give the tenant a signal, and its default action too when a PID 1 without a handler would not have it."""
        if self.running.catches(number):
            self.running.kill(number)
        else:
            self._forced = number
            self.running.kill(signal.SIGKILL)

    def suspend(self) -> None:
        """Ctrl-Z: stop the tenant, then ourselves with the terminal as the shell wants it; ``fg`` continues both."""
        self.running.freeze(frozen=True)
        if self._screen is not None:
            self._screen.restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        # Continued here.
        self.running.freeze(frozen=False)
        if self._screen is not None:
            self._screen.begin()

    def say(self, line: str) -> None:
        """Print a line of ours beside what the tenant prints."""
        end = "\n" if self._screen is None or not self._screen.is_raw else "\r\n"  # a raw one begins no line by itself
        write_all(2, f"isochamber: {line}{end}".encode("utf-8", "backslashreplace"))


def write_all(descriptor: int, data: bytes) -> None:
    """Write ``data``, waited for; where nobody reads it is lost, and the tenant goes on until it is told to end."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BlockingIOError:
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT)
        poller.poll()
        write_all(descriptor, data)
    except (BrokenPipeError, OSError):
        pass
