"""The nurseries that keep tenants: the one that starts them, and former ones that keep theirs until they end.

Only the first takes starts. An order about a tenant goes to the nursery that holds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from isochamber import __version__
from isochamber.errors import IsochamberError
from isochamber.serve import link, wire
from isochamber.serve.link import Link, Report


class Nurseries:
    """Connections to every nursery; ``on_report`` hears all of them, ``on_gone`` that one has hung up."""

    def __init__(self, on_report: Callable[[Report], None], on_gone: Callable[[], None]) -> None:
        self._on_report, self._on_gone = on_report, on_gone
        self._current: Link | None = None
        self._former: dict[str, Link] = {}  # socket -> connection
        self._holder: dict[str, Link] = {}  # key of what is held -> who holds it
        self._may_start = asyncio.Event()
        self._foreign: str | None = None  # why the nursery that takes starts can't be told what to start
        self.refused: str | None = None  # why a nursery of another version could not be replaced

    async def connect(self) -> bool:
        """Connect to each that is not connected to, start the one that takes starts if there is none.

        Returns whether that one is new. Raises IsochamberError.
        """
        for path in link.former():
            if path not in self._former:
                end = link.connect(path)
                if end is not None:
                    await self._begin(end, path)
        if self._current is not None:
            return False
        end, fresh = link.find_or_start()
        answer = await self._begin(end, None)
        if not fresh and (answer.get("program") != __version__ or self._foreign is not None):
            try:
                await self.renew()  # what was installed meanwhile takes over: nobody has to stop for it
            except IsochamberError as error:
                self.refused = error.line()
        self._may_start.set()
        return fresh

    async def _begin(self, end: Any, path: str | None) -> Report:
        made: Link
        made = Link(end, lambda report: self._take(made, report), lambda: self._gone(made))
        if path is None:
            self._current = made
        else:
            self._former[path] = made
        answer = await made.ask({"do": "list"})
        if path is None:
            self._foreign = _foreign(answer)
        return answer

    async def renew(self) -> None:
        """Let a new nursery take every start from now on; the former keeps who runs. Raises IsochamberError."""
        former = self._current
        if former is None:
            raise IsochamberError("there is no nursery", stage="serve")
        self._may_start.clear()
        try:
            answer = await former.ask({"do": "retire"})
            self._former[str(answer["path"])] = former
            self._current = None
            end, _ = link.find_or_start()
            await self._begin(end, None)
        finally:
            self._may_start.set()

    def _take(self, origin: Link, report: Report) -> None:
        key = report.get("key")
        if key is not None:
            if report["on"] in ("started", "held"):
                self._holder[key] = origin
            elif self._holder.get(key) not in (None, origin):
                return  # of a start that is over: the tenant has been started by another nursery since
        self._on_report(report)

    def _gone(self, origin: Link) -> None:
        if self._current is origin:
            self._current = None
        self._former = {path: other for path, other in self._former.items() if other is not origin}
        self._on_gone()

    def is_lost(self, key: str) -> bool:
        """Say whether nobody holds ``key`` any more: its nursery has hung up, and none lists it."""
        holder = self._holder.get(key)
        return holder is None or (holder is not self._current and holder not in self._former.values())

    def _link_for(self, order: Report) -> Link:
        found = self._current if order["do"] == "start" else self._holder.get(order.get("key") or order.get("tid", ""))
        found = found or self._current
        if found is None:
            raise IsochamberError("there is no nursery", stage="serve")
        return found

    async def ask(self, order: Report, descriptors: tuple[int, ...] = (), entry: bytes = b"") -> Report:
        """Send an order to who holds what it is about, and return the answer; raises IsochamberError."""
        if order["do"] == "start":
            if self._current is not None:
                await self._may_start.wait()
            if self._foreign is not None:
                hint = "stop its tenants, then restart the supervisor"
                raise IsochamberError(self._foreign, stage="serve", hint=hint)
        return await self._link_for(order).ask(order, descriptors, entry)

    def tell(self, order: Report) -> None:
        """Send an order that needs no answer."""
        try:
            self._link_for(order).tell(order)
        except IsochamberError:
            return
        if order["do"] == "forget":
            self._holder.pop(order["key"], None)

    def quit(self) -> None:
        """End every nursery, and with it every tenant that is still there."""
        for found in (self._current, *self._former.values()):
            if found is not None:
                found.tell({"do": "quit"})

    def close(self) -> None:
        """Hang up; tenants run on."""
        for found in (self._current, *self._former.values()):
            if found is not None:
                found.close()


def _foreign(answer: Report) -> str | None:
    """Return what is wrong with a nursery that answers so, None when it speaks our version: every word is known then.

    Of another version it is told nothing but what all of them know: who is held, signals, and to retire.
    """
    version = answer.get("version")
    if version == wire.VERSION:
        return None
    return f"the nursery speaks version {version} of its protocol, not {wire.VERSION}, and could not be replaced"
