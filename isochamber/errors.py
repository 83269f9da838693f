"""Every error a user can cause, as one printable line.

Shared by both halves, so it imports nothing outside the standard library and
nothing slow from inside it. An error is raised once, where the cause is known,
and printed once, by whoever owns the terminal (``cli``, ``tasks.action`` or
``launch.__main__``).
"""

import os
from errno import errorcode

# Exit codes as podman's: podman-run(1), section "Exit Status".
EXIT_OURS = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNAL_BASE = 128
EXIT_INTERRUPTED = EXIT_SIGNAL_BASE + 2  # SIGINT
EXIT_BAD_INPUT = 2

# Format characters that reorder or hide text on a terminal (CVE-2021-42574).
_INVISIBLE = frozenset(
    [0x00AD, 0x061C, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)]
)


def printable(text: object) -> str:
    r"""Return ``text`` with every character escaped that could steer a terminal.

    C0 and C1 controls (ESC, CR, newline, NUL ...), DEL, bidirectional and other
    invisible format characters and lone surrogates (bytes that were not UTF-8)
    become ``\xNN`` or ``\uNNNN``. Names and output of tenants pass through here
    before they reach the operator's terminal.
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():
        return whole  # nearly every line of a log: an install script may flood us with them
    out = []
    for char in whole:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:
            out.append(f"\\x{code - 0xDC00:02x}")
        elif code < 0x20 or 0x7F <= code < 0xA0:
            out.append(f"\\x{code:02x}")
        elif code in _INVISIBLE or 0xD800 <= code <= 0xDFFF or 0xFFF9 <= code <= 0xFFFB or code >= 0xE0000:
            out.append(f"\\u{code:04x}")
        else:
            out.append(char)
    return "".join(out)


def exit_code_of(status: int) -> int:
    """Return the exit code that tells the wait status ``status`` (wait(2)): 128+N after signal N."""
    if os.WIFSIGNALED(status):
        return EXIT_SIGNAL_BASE + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


class IsochamberError(Exception):
    """Something failed for a reason the user can act on.

    ``what`` says what was being done or is wrong, ``stage`` names the step
    ("base", "layer", "home", "configure", "launch" ...), ``hint`` says what to do.
    ``errno`` is the kernel's number where there is one. ``notes`` are further
    lines (the last lines of an install script's log, a clean-up that failed too).
    """

    def __init__(
        self,
        what: str,
        *,
        stage: str,
        tenant: str | None = None,
        path: str | os.PathLike[str] | None = None,
        errno: int | None = None,
        hint: str | None = None,
        exit_code: int = EXIT_OURS,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.stage = stage
        self.tenant = tenant
        self.path = None if path is None else os.fspath(path)
        self.errno = errno
        self.hint = hint
        self.exit_code = exit_code
        self.notes = notes

    @classmethod
    def from_os(
        cls,
        error: OSError,
        *,
        stage: str,
        tenant: str | None = None,
        path: str | os.PathLike[str] | None = None,
        hint: str | None = None,
    ) -> "IsochamberError":
        """Give an ``OSError`` its stage and tenant; its own file name is the path unless ``path`` is given."""
        where = path if path is not None else error.filename
        if isinstance(where, int):
            where = f"descriptor {where}"
        if isinstance(where, bytes):
            where = os.fsdecode(where)
        return cls(
            error.strerror or str(error) or type(error).__name__,
            stage=stage,
            tenant=tenant,
            path=where,
            errno=error.errno,
            hint=hint,
        )

    def line(self) -> str:
        """Return ``tenant: stage: path: what (ERRNO): hint``, parts that are unknown left out, escaped."""
        parts = [part for part in (self.tenant, self.stage, self.path) if part]
        what = self.what
        if self.errno is not None:
            what += f" ({errorcode.get(self.errno, self.errno)})"
        parts.append(what)
        if self.hint:
            parts.append(self.hint)
        return printable(": ".join(parts))

    def lines(self) -> list[str]:
        """Return :meth:`line` and then every note, each escaped."""
        return [self.line(), *(f"    {printable(note)}" for note in self.notes)]

    def __str__(self) -> str:
        return self.line()


class SpecError(IsochamberError):
    """The input is wrong: all problems at once, each ``file:line:column: tenant: what, what is allowed``.

    Raised before anything is written; the exit code is 2.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems[0] if problems else "bad input", stage="spec", exit_code=EXIT_BAD_INPUT)
        self.problems = problems

    def lines(self) -> list[str]:
        """Return one escaped line a problem."""
        return [printable(problem) for problem in self.problems]

    def line(self) -> str:
        """Return the first problem, and how many more there are."""
        more = len(self.problems) - 1
        return printable(self.what) + (f" (and {more} more)" if more > 0 else "")
