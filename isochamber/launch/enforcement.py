"""A tenant's learned filter while it runs: what it hands over is answered, what it refused is told."""

from __future__ import annotations

import os

from isochamber.errors import EXIT_SIGNAL_BASE
from isochamber.launch import notices, refusals
from isochamber.launch.constants import SIGSYS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from isochamber.launch.entry import Entry
    from isochamber.launch.running import Running


class Enforcement:
    """The listener of one running tenant if it has one, else the kernel's log of what it was refused."""

    def __init__(self, running: Running, root: str, entry: Entry, say: Callable[[str], None]) -> None:
        """Begin to listen; ``say`` prints a line for the operator."""
        self._running, self._entry, self._say = running, entry, say
        self._refusals = refusals.Refusals(root, entry.name, say)
        self._notices: notices.Notices | None = None
        self._log: refusals.KernelLog | None = None
        if entry.seccomp.mode in ("log", "errno", "kill"):
            self._log = refusals.KernelLog(entry.uid_base, entry.uid_count)

    def descriptor(self) -> int | None:
        """Return the listener once the tenant has handed it over, None before and after."""
        listener = self._running.listener
        if listener is not None and self._notices is None:
            learning = self._entry.seccomp.learning
            answer = notices.Refuser(self._refusals) if learning is None else notices.Learner(learning)
            self._notices = notices.Notices(listener, answer)
        return listener

    def serve(self) -> None:
        """Answer what waits at the descriptor."""
        if self._notices is not None and not self._notices.serve():
            self._stop()

    def _stop(self) -> None:
        if self._running.listener is not None:
            os.close(self._running.listener)
        self._running.listener = self._notices = None

    def finish(self) -> None:
        """Tell what the kernel's log says of the run; a death by the filter is told in any case."""
        self._stop()
        mode, name = self._entry.seccomp.mode, self._entry.name
        killed = self._running.exit_code == EXIT_SIGNAL_BASE + SIGSYS
        told = self._log is not None and self._log.tell(self._refusals, mode, expected=killed)
        if killed and not told:
            self._say(refusals.death(name, mode))
        if self._log is not None:
            self._log.close()
