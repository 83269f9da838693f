"""A hostile tenant gets nothing: every attempt of the table, in every world that says something about it."""

from collections import Counter
from pathlib import Path

import pytest

from tests.escape.attempts import ALL_ON, Attempt, NotTestableError, Off, Outcome
from tests.escape.conftest import OUTCOMES
from tests.escape.guards import FILTER, RIGHTS
from tests.escape.host import Host
from tests.escape.table import ATTEMPTS
from tests.escape.worlds import Worlds

# What a call says that this kernel was built without, when nothing of ours stands before it.
_MISSING = frozenset({"ENOSYS", "EAFNOSUPPORT", "ESOCKTNOSUPPORT", "EPROTONOSUPPORT", "EIO", "absent"})


_PERF = Path("/proc/sys/kernel/perf_event_paranoid")  # above 2, which only Debian's kernels know, no user has a counter


@pytest.fixture(scope="module", autouse=True)
def unharmed_host(worlds: Worlds) -> None:
    """Run the batches with every guard on first, and look at the host before and after."""
    before = Host.now(worlds)
    for name in ("calls", "view"):
        worlds.batch(ALL_ON, name)
    assert Host.now(worlds) == before, "the host is not as it was before the attempts"


def _named(off: Off) -> str:
    return " and ".join(sorted(map(str, off))) or "nothing"


def _tried(worlds: Worlds, attempt: Attempt) -> tuple[Outcome, str]:
    """Run ``attempt`` in each of its worlds; returns its outcome with all guards on, and the word."""
    all_off = frozenset(attempt.guards)
    try:
        word = attempt.run(worlds, ALL_ON, attempt)
        control = attempt.run(worlds, all_off, attempt)
    except NotTestableError as missing:
        return Outcome.NOT_TESTABLE, str(missing)
    outcome = attempt.outcome(word)
    if outcome is Outcome.ESCAPED:
        return outcome, word
    if not attempt.works(control):
        if control in _MISSING:
            return Outcome.NOT_TESTABLE, f"not in this kernel: {attempt.title.removesuffix(', by an install script')}"
        if "a performance counter" in attempt.title and int(_PERF.read_text()) > 2:
            return Outcome.NOT_TESTABLE, f"this machine gives no user a performance counter: {_PERF} is above 2"
        pytest.fail(f"the control says {control!r} with {_named(all_off)} off: the attempt proves nothing")
    if len(attempt.guards) > 1:
        for guard in attempt.guards:
            alone = attempt.run(worlds, all_off - {guard}, attempt)
            assert not attempt.works(alone), f"{guard} alone does not stop it: it says {alone!r}"
    return outcome, word


def _on_the_second_kernel_too() -> set[str]:
    """Return what runs there at every ./doit test: a call of each row in the same few worlds, and three that differ."""
    calls = {
        attempt.row: attempt.name
        for attempt in reversed(ATTEMPTS)
        if attempt.script and attempt.batch == "calls" and set(attempt.guards) <= {FILTER, RIGHTS}
        and "(syscall)" in attempt.title
    }  # fmt: skip
    alone = {"R02: filling /tmp", "C05: running before it is in its group", "F05: /dev/mqueue is a link in its root"}
    return {*calls.values(), *alone}


_THERE_TOO = _on_the_second_kernel_too()
_ALL = [
    pytest.param(attempt, id=attempt.name, marks=[pytest.mark.guest] if attempt.name in _THERE_TOO else [])
    for attempt in ATTEMPTS
]


@pytest.mark.parametrize("attempt", _ALL)
def test_an_attempt_gets_nothing_and_would_without_its_guards(worlds: Worlds, attempt: Attempt) -> None:
    outcome, word = _tried(worlds, attempt)
    OUTCOMES[attempt.name] = outcome, word
    if outcome is Outcome.NOT_TESTABLE:
        pytest.skip(f"NOT_TESTABLE: {word}")
    assert outcome is not Outcome.ESCAPED, f"it says {word!r}"


def test_there_are_enough_attempts_each_named_once_and_from_every_group() -> None:
    assert len(ATTEMPTS) >= 150
    assert [name for name, count in Counter(attempt.name for attempt in ATTEMPTS).items() if count > 1] == []
    assert {attempt.row[0] for attempt in ATTEMPTS} >= set("FKCRPI")
