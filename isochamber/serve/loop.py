"""The nursery's loop: descriptors, and what is done when there is something to read on one."""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from isochamber.serve.held import Held


class Loop:
    """epoll(7), and an action a descriptor."""

    __slots__ = ("_actions", "_epoll", "_later", "_round_is_over", "over")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._actions: dict[int, Callable[[int], None]] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._round_is_over = False
        self.over = False

    def watch(self, descriptor: int, action: Callable[[int], None], held: Held | None = None) -> None:
        """Do ``action`` whenever ``descriptor`` can be read or has hung up; ``held`` remembers that it is watched."""
        self._epoll.register(descriptor, select.EPOLLIN)
        self._actions[descriptor] = action
        if held is not None:
            held.fds.add(descriptor)

    def unwatch(self, descriptor: int, held: Held | None = None) -> None:
        """Watch it no more; one that is not watched is fine."""
        if self._actions.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)
            self._round_is_over = True
        if held is not None:
            held.fds.discard(descriptor)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do ``action`` once, in ``seconds``."""
        self._later.append((time.monotonic() + seconds, action))

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        due = [action for when, action in self._later if when <= now]
        self._later = [(when, action) for when, action in self._later if when > now]
        for action in due:
            action()

    def _patience(self) -> float | None:
        if not self._later:
            return None  # for ever: a nursery that has nothing to do does nothing
        return max(0.0, min(when for when, _ in self._later) - time.monotonic())

    def run(self, after: Callable[[], None]) -> None:
        """Go round until ``over``, and do ``after`` after every round."""
        while not self.over:
            self._round_is_over = False
            for descriptor, happened in self._epoll.poll(self._patience()):
                self._actions[descriptor](happened)
                if self._round_is_over:
                    break  # a number may stand for something else by now; what is left over is told again
            if self._later:
                self._do_what_is_due()
            after()


def readable(descriptor: int) -> bool:
    """Say whether there is something to read at once."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))
