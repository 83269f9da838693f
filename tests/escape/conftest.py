"""The worlds of the escape suite, and its summary at the end of the run."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.build.state import State
from tests.escape import table
from tests.escape.attempts import Outcome
from tests.escape.worlds import Worlds, compile_probe

OUTCOMES: dict[str, tuple[Outcome, str]] = {}  # attempt -> what became of it, and its word


@pytest.fixture(scope="session")
def worlds(make_root: Callable[[], Path], scratch: Path, request: pytest.FixtureRequest) -> Iterator[Worlds]:
    """A state directory with a base, the compiled probe, and a host to be harmed; batches hold what is asked for."""
    asked = {
        item.callspec.params.get("attempt") for item in request.session.items if hasattr(item, "callspec")
    }  # fmt: skip
    attempts = [attempt for attempt in table.ATTEMPTS if attempt in asked]
    root = make_root()
    State(root).create()  # before there are tenants, who are made by hand here
    (product,) = (root / "base_fs").iterdir()
    made = Worlds(root, f"base_fs/{product.name}/rootfs", compile_probe(scratch), scratch, attempts)
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many attempts had which outcome, and what was not testable here."""
    if not OUTCOMES:
        return
    counts = Counter(outcome for outcome, _ in OUTCOMES.values())
    terminalreporter.section("escape attempts")
    for outcome in Outcome:
        terminalreporter.write_line(f"{outcome:12} {counts[outcome]:4}")
    reasons = Counter(word for outcome, word in OUTCOMES.values() if outcome is Outcome.NOT_TESTABLE)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"not testable here, {count}: {reason}")
