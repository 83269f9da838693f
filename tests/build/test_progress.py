"""Progress: plain lines without a terminal, bars on one, and nothing of a tenant's steers it."""

import os
import pickle
import pty
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.build.progress import Reporter, Steps

APT = """\
Get:1 http://deb.debian.org/debian bookworm InRelease [151 kB]
Reading package lists...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Need to get 53.1 kB of archives.
Get:1 http://deb.debian.org/debian bookworm/main amd64 hello amd64 2.10-3 [53.1 kB]
Selecting previously unselected package hello.
Unpacking hello (2.10-3) ...
Unpacking tree (2.1.0-1) ...
Setting up hello (2.10-3) ...
Setting up tree (2.1.0-1) ...
"""

DEBOOTSTRAP = """\
I: Retrieving InRelease
I: Valid Release signature (key id 4D64FEC119C2029067D6E791F8D2585B8783D481)
I: Retrieving libc6 2.36-9
I: Validating libc6 2.36-9
I: Extracting libc6...
I: Unpacking libc6:amd64...
I: Unpacking the base system...
I: Configuring libc6:amd64...
"""


def learned(text: str) -> list[tuple[str, int, int | None]]:
    steps = Steps()
    return [(steps.text, *steps.fraction) for line in text.splitlines() if steps.learn(line)]


def test_apt_tells_what_is_downloaded_unpacked_and_set_up() -> None:
    assert learned(APT) == [
        ("downloading hello 1/2 (53.1 kB)", 0, 4),
        ("unpacking hello 1/2", 1, 4),
        ("unpacking tree 2/2", 2, 4),
        ("setting up hello 1/2", 3, 4),
        ("setting up tree 2/2", 4, 4),
    ]


def test_debootstrap_tells_it_too() -> None:
    assert [text for text, _, _ in learned(DEBOOTSTRAP)][-3:] == [
        "checking libc6 1/1", "unpacking libc6 1/1", "setting up libc6 1/1",
    ]  # fmt: skip


def test_a_second_transaction_adds_to_the_total_and_a_repeated_announcement_does_not() -> None:
    announced = "0 upgraded, 2 newly installed, 0 to remove"
    steps = Steps()
    for line in [announced, announced, *APT.splitlines()[6:], announced]:
        steps.learn(line)
    assert steps.fraction == (4, 8)


@given(st.lists(st.text() | st.sampled_from([*APT.splitlines(), "9 upgraded, 999999999 newly installed"])))
def test_no_output_of_a_script_makes_the_fraction_absurd(lines: list[str]) -> None:
    steps = Steps()
    for line in lines:
        steps.learn(line)
        done, total = steps.fraction
        assert total is None or 0 <= done <= total


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().product("layer of sensor") as product:
        product.line("compiling things")
        product.phase("sealing")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["layer of sensor: building", "layer of sensor: compiling things", "layer of sensor: sealing"]
    assert lines[3].startswith("layer of sensor: built in ")


def test_a_failed_build_is_called_failed_and_its_error_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="reason"), Reporter().product("base x"):
        raise ValueError("reason")
    assert "base x: failed in " in capsys.readouterr().err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    reporter.say("something")
    reporter.reasons("base x", ("suite changed",))
    with reporter.product("base x") as product:
        product.line("text")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["\x1b]52;c;ZXZpbA==\x07", "\x1b[2J", "a\rb", "[red]x[/red]\x1b[31m", "\u202egpj.exe"])
def test_a_tenants_output_can_not_steer_the_terminal(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with Reporter().product("layer of x") as product:
        product.line(text)
    shown = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(shown)


ON_A_TERMINAL = """
import threading
from isochamber.build.progress import Reporter
reporter = Reporter()
def one(title):
    with reporter.product(title) as product:
        barrier.wait()
        product.line("0 upgraded, 1 newly installed, 0 to remove")
        product.line("evil \\x1b]52;c;ZXZpbA==\\x07 [bold]text[/bold]")
        reporter.say(title + ": a line above the bars")
        barrier.wait()
barrier = threading.Barrier(3)
threads = [threading.Thread(target=one, args=(f"layer of {name}",)) for name in ("a", "b", "c")]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_on_a_terminal_several_builds_share_one_display_and_it_is_gone_afterwards() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=slave, stdout=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # EIO: the last slave is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    assert child.wait() == 0, shown
    assert b"\x1b]52" not in shown
    assert b"Traceback" not in shown
    for name in (b"a", b"b", b"c"):
        assert shown.count(b"layer of " + name + b": a line above the bars") == 1
        assert b"layer of " + name + b": built in" in shown
    assert shown.rstrip().endswith(b"s"), shown[-200:]


def test_a_reporter_can_be_handed_to_a_worker_process(capsys: pytest.CaptureFixture[str]) -> None:
    copy = pickle.loads(pickle.dumps(Reporter(live=False)))
    copy.say("from the worker")
    assert capsys.readouterr().err == "from the worker\n"


def test_lines_of_several_threads_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(live=False)

    def speak(word: str) -> None:
        for _ in range(50):
            reporter.say(word * 40)

    threads = [threading.Thread(target=speak, args=(word,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 200
    assert set(lines) == {word * 40 for word in "abcd"}
