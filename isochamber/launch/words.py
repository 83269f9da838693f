"""The words of the launcher's command line, and the little that who only asks the supervisor needs of the launcher.

Imported at every start, also where the supervisor does the rest, so it imports next to nothing.
"""

import os

from isochamber.errors import EXIT_BAD_INPUT, IsochamberError

_USAGE = (
    "usage: run --root ROOT [--shell] [--no-terminal] TENANT [-- COMMAND ...]"
    " | plan|learn --root ROOT --fd N [--no-terminal]"
)


class Options:
    """The words of the command line, sorted."""

    __slots__ = ("command", "fd", "no_terminal", "root", "shell", "tenant", "verb")

    def __init__(self, words: list[str]) -> None:
        """Sort ``words``; raises IsochamberError with exit code 2."""
        self.verb = words[0] if words else ""
        self.root, self.fd, self.shell, self.no_terminal = "", -1, False, False
        self.tenant = ""
        self.command: list[str] = []
        self._sort(words[1:])
        planned = self.fd >= 0 and not self.tenant
        complete = {"run": bool(self.tenant), "plan": planned, "learn": planned}.get(self.verb, False)
        if not complete or not os.path.isabs(self.root):
            raise _usage()

    def _sort(self, rest: list[str]) -> None:
        only_names = False  # after "--"
        while rest:
            word = rest.pop(0)
            if only_names or not word.startswith("-"):
                if self.tenant:
                    self.command = [word, *rest]
                    return
                self.tenant = word
            elif word == "--":
                only_names = True
            elif word == "--shell":
                self.shell = True
            elif word == "--no-terminal":
                self.no_terminal = True
            elif word == "--root" and rest:
                self.root = rest.pop(0)
            elif word == "--fd" and rest and rest[0].isdecimal():
                self.fd = int(rest.pop(0))
            else:
                raise _usage(f"{word} is not known, or its value is missing; ")


def _usage(what: str = "") -> IsochamberError:
    return IsochamberError(what + _USAGE, stage="launch", exit_code=EXIT_BAD_INPUT)


def open_missing_descriptors() -> None:
    """Put /dev/null where 0, 1 or 2 is closed: else what we open next would stand there, in the tenant too."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, True)


def say(line: str) -> None:
    """Print one line of ours on standard error."""
    try:
        os.write(2, f"isochamber: {line}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody reads; the exit code says it too


def on_a_terminal() -> bool:
    """Say whether we stand on a terminal, both ways."""
    return os.isatty(0) and os.isatty(1)
