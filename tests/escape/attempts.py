"""What an attempt is: an attack by a tenant, the guards that stop it, and how its outcome is judged.

An attempt says one *word*: ``worked``, ``escaped`` (the host was reached, as the host
judges it), or why not: an errno, or what stood there instead. The same attempt runs
in several worlds: with every guard on (it must not work), with every guard that
stops it off (it must work, or it proves nothing), and, when several guards stop it,
with each of them alone (it must not work: that is what "defended twice" means).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.escape.worlds import Worlds


class Outcome(StrEnum):
    """What became of an attempt with every guard on."""

    BLOCKED = "BLOCKED"  # stopped, and the word says by what
    CONTAINED = "CONTAINED"  # it worked, on what is the tenant's own; the host is unharmed
    ESCAPED = "ESCAPED"
    NOT_TESTABLE = "NOT_TESTABLE"  # this kernel or machine has not what is attacked: never a pass


class NotTestableError(Exception):
    """This machine can't show it; the text says what is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """One thing that stops attempts, and how a test takes it off."""

    name: str
    launcher: str = ""  # statements run in the launcher's own process before it starts the tenant
    entry: tuple[tuple[str, object], ...] = ()  # keys of containers.json that are given another value
    patches: tuple[tuple[str, object], ...] = ()  # "module:attribute" of the build half -> what stands there instead

    def __str__(self) -> str:
        return self.name


Off = frozenset[Guard]
ALL_ON: Off = frozenset()

# What a call says when it was stopped for want of a right, by a filter, or because nothing is there.
REFUSALS = frozenset({"EPERM", "EACCES", "ENOSYS", "EROFS", "SIGSYS"})


Run = Callable[["Worlds", Off, "Attempt"], str]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One row of the table."""

    row: str  # of the list of threats it comes from
    title: str
    guards: tuple[Guard, ...]
    run: Run
    script: str = ""  # for those that run in a batch
    refused: frozenset[str] = REFUSALS  # words that mean "stopped"; any other word is "worked"
    inside: bool = False  # working is allowed, as long as the host is not reached
    peers: bool = False  # makes sense below another container runtime too
    batch: str = "calls"  # attempts of one batch share a tenant: what one changes, the next one sees

    @property
    def name(self) -> str:
        """Name the attempt, once in the table."""
        return f"{self.row}: {self.title}"

    def worlds(self) -> Iterator[Off]:
        """Yield every world it runs in: all guards on, each alone, all off."""
        yield ALL_ON
        if len(self.guards) > 1:
            for guard in self.guards:
                yield frozenset(self.guards) - {guard}
        yield frozenset(self.guards)

    def works(self, word: str) -> bool:
        """Say whether ``word`` means that the attempt got what it wanted."""
        if self.inside:
            return word == "escaped"
        return word not in self.refused

    def outcome(self, word: str) -> Outcome:
        """Judge what it said with every guard on."""
        if self.works(word):
            return Outcome.ESCAPED
        return Outcome.CONTAINED if word == "worked" else Outcome.BLOCKED
