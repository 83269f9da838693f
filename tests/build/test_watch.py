"""Watching: which files of a directory were opened, by whomever and under whatever name."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isochamber.build import staged
from isochamber.build.inputs import Inputs
from isochamber.build.watch import Watch


@pytest.fixture
def home(scratch: Path) -> Path:
    path = scratch / f"watched-{os.urandom(4).hex()}"
    (path / "conf.d/deep").mkdir(parents=True)
    for name in ("read", "unread", "conf.d/a", "conf.d/deep/b"):
        (path / name).write_text(name)
    program = path / "program"
    program.write_text("#!/bin/sh\ntrue\n")
    program.chmod(0o755)
    return path


def opened_by(home: Path, *argv: str) -> frozenset[str]:
    with Watch(home) as watch:
        subprocess.run(argv, cwd=home, check=True, capture_output=True)
        return watch.opened()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["true"], set()),
        (["stat", "read", "conf.d"], set()),
        (["cat", "read"], {"read"}),
        (["ls", "conf.d"], {"conf.d"}),
        (["ls"], {""}),
        (["cat", "conf.d/deep/b"], {"conf.d/deep/b"}),
        (["./program"], {"program"}),
        (["ln", "read", "conf.d/other"], set()),
        (["sh", "-c", "ln read other; cat other"], {"read"}),
        (["sh", "-c", "mv read moved; cat moved"], {"read"}),
        (["sh", "-c", "echo more >> read"], {"read"}),
        (["sh", "-c", "setsid -f cat read & wait"], {"read"}),
        (["grep", "-r", "nothing", "--include=none", "."], {"", "conf.d", "conf.d/deep"}),
    ],
)
def test_exactly_what_was_opened_is_reported(home: Path, argv: list[str], expected: set[str]) -> None:
    if argv[0] == "grep":
        with Watch(home) as watch:
            subprocess.run(argv, cwd=home, check=False, capture_output=True)
            assert watch.opened() == expected
        return
    assert opened_by(home, *argv) == expected


def test_a_fifo_that_the_script_makes_is_not_touched(home: Path) -> None:
    assert opened_by(home, "sh", "-c", "mkfifo f; (echo text > f &) ; read x < f; test $x = text") <= {""}


def test_a_file_keeps_its_identity_when_it_is_renamed(home: Path) -> None:
    with Watch(home) as watch:
        (home / "unread").rename(home / "conf.d/new")
        assert watch.path_of(os.stat(home / "conf.d/new")) == "unread"
        (home / "made").write_text("by the script")
        assert watch.path_of(os.stat(home / "made")) is None
        assert watch.opened() == frozenset()


def test_more_opens_than_the_kernel_queues_are_all_reported(home: Path) -> None:
    # 16,384 events are queued at most by default: /proc/sys/fs/fanotify/max_queued_events
    with Watch(home) as watch:
        for _ in range(40_000):
            os.close(os.open(home / "read", os.O_RDONLY))
            os.close(os.open(home / "conf.d/a", os.O_RDONLY))
        assert watch.opened() == {"read", "conf.d/a"}


@pytest.fixture
def short_queue() -> Iterator[None]:
    limit = Path("/proc/sys/fs/fanotify/max_queued_events")
    if not limit.exists():
        pytest.skip("no /proc/sys/fs/fanotify (Linux 5.13)")
    former = limit.read_text()
    limit.write_text("2")
    yield
    limit.write_text(former)


@pytest.mark.usefixtures("short_queue")
def test_when_events_are_lost_everything_counts_as_opened(home: Path) -> None:
    with Watch(home) as watch:
        watch._stop()  # nobody takes events now: the third is one too many
        for name in ("read", "unread", "conf.d/a"):
            os.close(os.open(home / name, os.O_RDONLY))
        watch._drain()
        assert watch.opened() == {"", "conf.d", "conf.d/deep", "conf.d/a", "conf.d/deep/b", "read", "unread", "program"}


names = st.text(st.sampled_from("abc."), min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
trees = st.dictionaries(names, st.text("0123456789abcdef", min_size=8, max_size=8), max_size=8)


@given(trees, st.data())
def test_what_was_observed_has_one_digest_whatever_the_order_of_events(
    shown: dict[str, str], data: st.DataObject
) -> None:
    opened = data.draw(st.lists(st.sampled_from(["", *shown]), max_size=12)) if shown else [""]
    shuffled = data.draw(st.permutations(opened))
    first, second = staged.observed(opened, shown, "a"), staged.observed([*shuffled, *opened], shown, "a")
    assert Inputs.of(first).digest() == Inputs.of(second).digest()


@given(trees, trees)
def test_what_was_not_opened_does_not_count(shown: dict[str, str], others: dict[str, str]) -> None:
    opened = set(shown)
    beside = {**{f"x/{path}": digest for path, digest in others.items()}, **shown}
    assert staged.observed(opened, beside, None) == staged.observed(opened, shown, None)


@given(trees, names)
def test_a_listing_changes_with_a_name_and_not_with_a_content(shown: dict[str, str], name: str) -> None:
    before = staged.seen(staged.ITSELF, shown)
    assert staged.seen(staged.ITSELF, dict.fromkeys(shown, "other")) == before
    if name not in shown:
        assert staged.seen(staged.ITSELF, {**shown, name: "new"}) != before
