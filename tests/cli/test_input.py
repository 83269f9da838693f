"""The command line on bad input: exit 2, every line at once on stderr, no traceback, nothing on disk changed."""

import subprocess
import sys
from pathlib import Path

import pytest

from isochamber import cli
from tests.conftest import PROJECT
from tests.spec import packages

MISTAKES = """\
tenants:
  good: {package: good}
  Bad: {}
  odd: {package: odd, ipx: none}
  "\\e[2J": {}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """tenants.yaml with several mistakes, two packages (one hostile), no state directory."""
    packages.make(tmp_path / "good")
    packages.make(tmp_path / "state/new_tenants/dropped")
    (tmp_path / "state/new_tenants/dropped/progs/link").symlink_to("/etc/shadow")
    (tmp_path / "tenants.yaml").write_text(MISTAKES)
    return tmp_path


def _words(place: Path, *words: str) -> list[str]:
    return ["-f", str(place / "tenants.yaml"), "--root", str(place / "state"), *words]


@pytest.mark.parametrize("verb", ["check", "prune"])
def test_every_mistake_is_a_line_and_nothing_is_touched(
    place: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = packages.snapshot(place)
    assert cli.main(_words(place, verb)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(": ")[1].removeprefix(f"{place}/") for line in lines] == [
        "tenants.yaml:3:3", "tenants.yaml:4:23", "tenants.yaml:5:3", "state/new_tenants/dropped/progs/link",
    ]  # fmt: skip
    assert all(line.startswith("isochamber: ") and packages.harmless(line) for line in lines)
    assert packages.snapshot(place) == before


@pytest.mark.parametrize(
    "program",
    [
        ("-m", "isochamber", "check"),
        (
            "-m",
            "isochamber.tasks",
        ),
    ],
)
def test_both_front_doors_say_the_same_and_exit_with_2(place: Path, program: tuple[str, ...]) -> None:
    before = packages.snapshot(place)
    environment = {
        "ISOCHAMBER_TENANTS": str(place / "tenants.yaml"), "ISOCHAMBER_ROOT": str(place / "state"),
        "ISOCHAMBER_RUN": str(place.parent / "run"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *program],
        cwd=PROJECT, env=environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 4
    assert "Traceback" not in done.stderr
    assert packages.snapshot(place) == before


def test_without_the_mistakes_check_says_what_there_is_and_touches_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "tenants.yaml").write_text("tenants:\n  good: {package: good}\n")
    (place / "state/new_tenants/dropped/progs/link").unlink()
    before = packages.snapshot(place)
    assert cli.main(_words(place, "check")) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{place}/tenants.yaml: 1 bases, 2 tenants, no problem\n", "")
    assert packages.snapshot(place) == before


@pytest.mark.parametrize("name", ["", "A", "a/b", "../x", "a\n", "x" * 64, "0a" * 16, "\x1b[2J", "a\udcffb"])
def test_init_refuses_a_name_that_is_none_and_makes_nothing(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = packages.snapshot(place)
    assert cli.main(_words(place, "init", "--", name)) == 125
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no name for a tenant" in line
    assert packages.harmless(line)
    assert packages.snapshot(place) == before


def test_init_never_writes_over_a_package(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = packages.snapshot(place)
    assert cli.main(_words(place, "init", "good", str(place / "good"))) == 125
    assert "File exists" in capsys.readouterr().err
    assert packages.snapshot(place) == before


@pytest.mark.parametrize(
    "words", [("show", "nobody"), ("delete", "--yes", "nobody"), ("delete", "--yes", "a\udcff"), ("show", "x" * 5000)]
)
def test_a_tenant_that_is_not_there_is_one_line(
    place: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(_words(place, *words)) == 125
    (line,) = capsys.readouterr().err.splitlines()
    assert packages.harmless(line)


def test_ls_of_a_damaged_containers_json_is_one_line_that_says_what_to_do(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "state/containers.json").write_text('[\n{"tid": ')
    assert cli.main(_words(place, "ls")) == 125
    (line,) = capsys.readouterr().err.splitlines()
    assert "run ./doit: it is made anew" in line
