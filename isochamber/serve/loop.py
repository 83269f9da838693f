"""The nursery's loop: descriptors, and what is done when there is something to read on one."""

from __future__ import annotations

import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from isochamber.serve.held import Held


class Loop:
    """epoll(7), and an action a descriptor.

    An action that raises is a bug of ours, and it was done for one tenant: ``on_bug`` is
    told which (None: for none), and the loop goes on with the others.
    """

    __slots__ = ("_actions", "_epoll", "_later", "_on_bug", "_round_is_over", "over")

    def __init__(self, on_bug: Callable[[Held | None, Exception], None]) -> None:
        self._epoll = select.epoll()
        self._actions: dict[int, tuple[Callable[[int], object], Held | None]] = {}
        self._later: list[tuple[float, Callable[[], None], Held | None]] = []
        self._on_bug = on_bug
        self._round_is_over = False
        self.over = False

    def watch(self, descriptor: int, action: Callable[[int], object], held: Held | None = None) -> None:
        """Do ``action`` whenever ``descriptor`` can be read or has hung up; ``held`` remembers that it is watched."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._actions[descriptor] = (action, held)
        if held is not None:
            held.fds.add(descriptor)

    def watch_for_room(self, descriptor: int, *, wanted: bool) -> None:
        """Do the action of a watched ``descriptor`` also when it can be written to, or no longer."""
        self._epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def unwatch(self, descriptor: int, held: Held | None = None) -> None:
        """Watch it no more; one that is not watched is fine."""
        if self._actions.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            self._round_is_over = True
        if held is not None:
            held.fds.discard(descriptor)

    def later(self, seconds: float, action: Callable[[], None], held: Held | None = None) -> None:
        """Do ``action`` once, in ``seconds``, for ``held``."""
        self._later.append((time.monotonic() + seconds, action, held))

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        due = [(action, held) for when, action, held in self._later if when <= now]
        self._later = [one for one in self._later if one[0] > now]
        for action, held in due:
            try:
                action()
            except Exception as error:  # see the class
                self._bug(held, error)

    def _patience(self) -> float | None:
        if not self._later:
            return None  # for ever: a nursery that has nothing to do does nothing
        return max(0.0, min(when for when, _, _ in self._later) - time.monotonic())

    def run(self, after: Callable[[], None]) -> None:
        """Go round until ``over``, and do ``after`` after every round."""
        while not self.over:
            self._round_is_over = False
            for descriptor, happened in self._epoll.poll(self._patience()):
                action, held = self._actions[descriptor]
                try:
                    action(happened)
                except Exception as error:  # see the class
                    self._bug(held, error)
                if self._round_is_over:
                    break  # a number may stand for something else by now; what is left over is told again
            if self._later:
                self._do_what_is_due()
            after()

    def _bug(self, held: Held | None, error: Exception) -> None:
        self._round_is_over = True
        try:
            sys.excepthook(type(error), error, error.__traceback__)
            self._on_bug(held, error)
        except Exception:  # in the log, and then nothing more can be done for that tenant
            sys.excepthook(*sys.exc_info())


def readable(descriptor: int) -> bool:
    """Say whether there is something to read at once."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))
