"""The system call filters that an entry names, checked; :mod:`isochamber.launch.seccomp` loads them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from isochamber.errors import IsochamberError


class Seccomp:
    """The system call filters of an entry: digests of compiled programs, and what the last one does to a call."""

    __slots__ = ("filters", "learned", "learning", "mode")

    MODES = ("none", "log", "notify", "errno", "kill")

    def __init__(self, given: object, wrong: Callable[[str, str], IsochamberError]) -> None:
        """Check ``given``; ``wrong`` makes the error that names the entry's tenant."""
        if not isinstance(given, dict) or not isinstance(given.get("filters"), list):
            raise wrong("seccomp", "an object with a list of filters")
        self.filters: list[str] = given["filters"]
        self.learned: str | None = given.get("learned")
        self.mode: str = given.get("mode")  # type: ignore[assignment] # looked at here
        self.learning: Learning | None = Learning(given["learning"]) if "learning" in given else None  # only a plan
        modes = self.MODES if self.learning is None else ("learn",)
        if self.mode not in modes or (self.mode == "none") != (self.learned is None):
            raise wrong("seccomp: mode", f"one of {', '.join(self.MODES)}; none where nothing was learned")
        for digest in [*self.filters, *([] if self.learned is None else [self.learned])]:
            if not isinstance(digest, str) or len(digest) != 40 or not set(digest) <= set("0123456789abcdef"):
                raise wrong("seccomp: a filter", "40 hex digits")

    def forget_learned(self) -> None:
        """Leave only the filters that every tenant has."""
        self.learned, self.mode = None, "none"


class Learning:
    """How a plan that learns answers: which argument of a call is noted, and which calls are refused all the same."""

    __slots__ = ("matters", "notes", "refused")

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.notes: int = raw["notes"]  # the descriptor that notes are written to
        self.matters: dict[int, int] = {int(number): index for number, index in raw["matters"].items()}
        # call: rows of a name, an errno, and the conditions (index, mask, value) that must all be true
        self.refused: dict[int, list[tuple[str, int, list[tuple[int, int, int]]]]] = {
            int(number): rows for number, rows in raw["refused"].items()
        }
