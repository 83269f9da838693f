"""Live progress of a build: what is downloaded and unpacked, how long, how far; plain lines when nobody watches.

Everything goes to stderr; stdout is the tenant's. What a tenant wrote is escaped
before it is shown (isochamber.errors.printable), and can say nothing worse than a
wrong number.
"""

import contextlib
import multiprocessing
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from isochamber.errors import printable

_WIDTH = 100  # columns of a shown line
_SUMMARY_SECONDS = 2.0

# apt-get(8) and dpkg(1) in the C locale, then debootstrap(8).
_NEWLY = re.compile(r"\d+ upgraded, (\d{1,6}) newly installed")
_NEED = re.compile(r"Need to get ([\d.,]+ [kMG]?B)")
_PACKAGE = r"((?!the )[a-z0-9][a-z0-9+-]*(?:\.[a-z0-9+-]+)*)"
_STEPS = (
    ("downloading", re.compile(rf"(?:Get:\d+ \S+ \S+ \S+|I: Retrieving) {_PACKAGE}")),
    ("checking", re.compile(rf"I: Validating {_PACKAGE}")),
    ("unpacking", re.compile(rf"(?:I: )?Unpacking {_PACKAGE}")),
    ("setting up", re.compile(rf"(?:Setting up|I: Configuring) {_PACKAGE}")),
)
_INSTALLING = ("unpacking", "setting up")  # what a package is sure to go through, cached or not


class Steps:
    """What apt's, dpkg's and debootstrap's lines tell: which step, how many packages, how many there will be."""

    def __init__(self) -> None:
        self.done = 0
        self.total: int | None = None
        self.text = ""
        self._packages = 0  # of the current transaction: a tool may have several
        self._need = ""
        self._counts: dict[str, int] = {}
        self._announced = False

    def learn(self, line: str) -> bool:
        """Take one line; says whether it was a step."""
        newly, need = _NEWLY.search(line), _NEED.match(line)
        if newly:
            begun = any(step in self._counts for step in _INSTALLING)
            former = (self.total or 0) - (0 if begun else len(_INSTALLING) * self._packages)  # said once more
            self._announced = True
            self._packages, self._counts, self._need = int(newly[1]), {}, ""
            self.total = former + len(_INSTALLING) * self._packages
        if need:
            self._need = f" ({need[1]})"
        step, name = next(((word, found[1]) for word, form in _STEPS if (found := form.match(line))), ("", ""))
        if not step:
            return False
        self._counts[step] = self._counts.get(step, 0) + 1
        if step == "checking" and not self._announced:
            self._packages += 1  # debootstrap checks every package once, downloaded or cached
            self.total = len(_INSTALLING) * self._packages
        self.done += step in _INSTALLING
        count = f"{self._counts[step]}/{self._packages}" if self._packages >= self._counts[step] else ""
        self.text = f"{step} {name} {count}{self._need if step == 'downloading' else ''}".rstrip()
        return True

    @property
    def fraction(self) -> tuple[int, int | None]:
        """Return (done, total) of the packages' steps; no total while it is not known, or was wrong."""
        return self.done, self.total if self.total and self.done <= self.total else None


class Product:
    """One build in progress. Its methods may be called from any thread of the process that made it."""

    def __init__(self, title: str, reporter: "Reporter", *, every_line: bool) -> None:
        self.title = title
        self.steps = Steps()
        self._reporter = reporter
        self._every_line = every_line
        self._told = 0.0  # seconds, when the last summary was printed
        self._begun = time.monotonic()
        self._bar = reporter.add_bar(title)
        if self._bar is None:
            reporter.say(f"{title}: building")

    @property
    def seconds(self) -> float:
        """How long it has been going."""
        return time.monotonic() - self._begun

    def phase(self, text: str) -> None:
        """Show what is being done now: a step of ours, which no tool's output tells."""
        if self._bar is None:
            self._reporter.say(f"{self.title}: {text}")
        else:
            self._bar.show(text, *self.steps.fraction)

    def line(self, text: str) -> None:
        """Show one line of the build's output, and learn from it how far it is."""
        text = printable(text.rstrip("\n"))
        step = self.steps.learn(text)
        if self._bar is not None:
            self._bar.show(self.steps.text if step else text, *self.steps.fraction)
        elif not step:
            if self._every_line:
                self._reporter.say(f"{self.title}: {text}")
        elif self.seconds - self._told >= _SUMMARY_SECONDS:
            self._told = self.seconds
            self._reporter.say(f"{self.title}: {self.steps.text}, {self.seconds:.0f} s")

    def close(self, outcome: str) -> None:
        """Say how it ended."""
        if self._bar is not None:
            self._bar.remove()
            self._bar = None
        self._reporter.say(f"{self.title}: {outcome} in {self.seconds:.1f} s")


class _Bar:
    """One line of the terminal's display."""

    def __init__(self, reporter: "Reporter", display: Any, title: str) -> None:
        self._reporter, self._display = reporter, display
        self._task = display.add_task("", total=None, title=printable(title), line="")

    def show(self, text: str, done: int, total: int | None) -> None:
        self._display.update(self._task, total=total, completed=done, line=printable(text)[:_WIDTH])

    def remove(self) -> None:
        self._display.remove_task(self._task)
        self._reporter.bar_removed()


class Reporter:
    """Where builds say what they do, from any thread.

    ``live`` None means: bars on a terminal, plain lines elsewhere. ``quiet`` says
    nothing at all: what matters then is the status and the error.
    """

    def __init__(self, *, live: bool | None = None, quiet: bool = False) -> None:
        self._live = live
        self._quiet = quiet
        self._lock = threading.RLock()
        self._display: Any = None  # rich's, one for all bars of this process, while there are any
        self._bars = 0

    def __getstate__(self) -> dict[str, Any]:
        """Let doit hand it to its worker processes, where everything begins anew."""
        return {"live": self._live, "quiet": self._quiet}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__getstate__`."""
        self.__init__(**state)  # type: ignore[misc] # an object without threads yet

    def say(self, text: str) -> None:
        """Print one line, above the bars where there are any."""
        if self._quiet:
            return
        with self._lock:
            if self._display is None:
                sys.stderr.write(f"{printable(text)}\n")
                sys.stderr.flush()
            else:
                self._display.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def reasons(self, title: str, reasons: tuple[str, ...]) -> None:
        """Say why a product is built again: ``layer of sensor: install_deps.sh changed``."""
        for reason in reasons:
            self.say(f"{title}: {reason}")

    @contextlib.contextmanager
    def product(self, title: str, *, every_line: bool = True) -> Iterator[Product]:
        """Show a build from its begin to its end; without ``every_line`` only how far it is."""
        product = Product(title, self, every_line=every_line)
        try:
            yield product
        except BaseException:
            product.close("failed")
            raise
        product.close("built")

    def add_bar(self, title: str) -> _Bar | None:
        """Return a line of the terminal's display, or None when there is no terminal to show one."""
        # Two displays of two processes would write over each other: doit's workers print lines.
        alone = multiprocessing.parent_process() is None
        if self._quiet or not alone or not (sys.stderr.isatty() if self._live is None else self._live):
            return None
        with self._lock:
            if self._display is None:
                self._display = _display()
                self._display.start()
            self._bars += 1
            return _Bar(self, self._display, title)

    def bar_removed(self) -> None:
        """Stop the display with its last bar."""
        with self._lock:
            self._bars -= 1
            if self._bars == 0:
                self._display.stop()
                self._display = None


def _display() -> Any:
    from rich import progress  # noqa: PLC0415 - 50 ms that only a build on a terminal pays
    from rich.console import Console  # noqa: PLC0415

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.fields[title]}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[line]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
