"""Every command that the documentation shows exists, with the options it is shown with."""

import re
import shlex
from pathlib import Path

import pytest

from isochamber import cli
from isochamber.build.pipeline import Pipeline
from isochamber.build.progress import Reporter
from isochamber.spec import load
from isochamber.tasks import checks, graph
from tests.conftest import PROJECT
from tests.docs.pages import Page, commands, page, pages

# What a fresh Debian has, or what the page before it made.
_OTHERS = {"cd", "cp", "exit", "export", "ln", "rm", "systemctl", ".venv/bin/python", "examples/courier/host/desk.py"}
_DOIT_COMMANDS = {"list", "info", "help", "run"}


def _words(line: str) -> list[str]:
    """Split a command line or a synopsis: what is optional is there, what may follow is not."""
    return [word.strip("[]") for word in shlex.split(line) if word.strip("[]") != "..."]


def _verbs() -> set[str]:
    (verbs,) = [action for action in cli.parser()._actions if action.dest == "verb"]
    return set(verbs.choices or ())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of every task of the project's own tenants.yaml."""
    spec = load.load(PROJECT / "tenants.yaml", root=tmp_path_factory.mktemp("state"))
    pipeline = Pipeline(spec, Reporter(quiet=True))
    made = [*graph.tasks(pipeline), *checks.check_tasks(PROJECT)]
    return {f"{task['basename']}:{task['name']}" if task.get("name") else str(task["basename"]) for task in made}


def _check_doit(words: list[str], tasks: set[str], line: str) -> None:
    basenames = {task.partition(":")[0] for task in tasks}
    if words[:1] == ["--no-install"]:
        words = words[1:]
    if words[:1] == ["-n"]:
        words = words[2:]
    if words and words[0] in _DOIT_COMMANDS:
        words = [word for word in words[1:] if word not in ("--all", "run")]
    for word in words:
        # A tenant's name may be the reader's own; a task of the project's checks may not.
        known = word in tasks if word.startswith("test") else word.partition(":")[0] in basenames
        assert known or word == "TASK", f"{line}: there is no task {word}"


def _check_isochamber(words: list[str], line: str) -> None:
    if len(words) == 1:
        assert words[0] in _verbs(), f"{line}: there is no such command"
        return
    try:
        cli.parser().parse_args(words)
    except SystemExit as error:
        assert error.code == 0, f"{line}: is not understood"


@pytest.mark.parametrize("of", pages(), ids=str)
def test_every_command_exists(of: Page, tasks: set[str]) -> None:
    for line in commands(of):
        words = _words(line)
        if words[0] == "./doit":
            _check_doit(words[1:], tasks, line)
        elif words[0] == "isochamber":
            _check_isochamber(words[1:], line)
        else:
            assert words[0] in _OTHERS, f"{of}: {line}: what is that?"
            assert not words[0].startswith("examples/") or (PROJECT / words[0]).exists()


def test_the_reference_names_every_task_and_no_other(tasks: set[str]) -> None:
    table = page("docs/reference/commands.md").section("./doit")
    documented = {
        word.partition(":")[0] if word.partition(":")[2].isupper() else word
        for row in table.splitlines()
        if row.startswith("| `")
        for word in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    existing = {task if task.startswith("test") else task.partition(":")[0] for task in tasks}
    parts = {"test:lint", "test:format", "test:types", "test:contracts", "test:unit"}
    assert documented == existing - parts
    assert all(f"`{part}`" in table for part in parts & existing)


def test_the_reference_names_every_command_of_isochamber_and_no_other() -> None:
    text = page("docs/reference/commands.md").section("isochamber")
    documented = {row.split("`")[1].split()[1] for row in text.splitlines() if row.startswith("| `isochamber ")}
    assert documented == _verbs()


def test_the_reference_names_every_variable_that_is_read_and_no_other() -> None:
    read = set()
    for file in [*(PROJECT / "isochamber").rglob("*.py"), PROJECT / "doit"]:
        read |= set(re.findall(r"ISOCHAMBER_[A-Z]+", file.read_text()))
    text = page("docs/reference/commands.md").section("Environment")
    assert set(re.findall(r"ISOCHAMBER_[A-Z]+", text)) == read


def test_a_command_that_does_not_exist_would_be_found(tasks: set[str]) -> None:
    with pytest.raises(AssertionError):
        _check_doit(["rum:hello"], tasks, "./doit rum:hello")
    with pytest.raises(AssertionError):
        _check_doit(["test:everything"], tasks, "./doit test:everything")
    with pytest.raises(AssertionError):
        _check_isochamber(["rum", "hello"], "isochamber rum hello")


def test_the_files_of_the_project_that_pages_name_exist() -> None:
    for of in pages():
        for path in re.findall(r"(?<![\w/.])(?:examples|schemas|isochamber|tests)/[\w./-]*\w", of.text):
            assert (PROJECT / path).exists(), f"{of}: {path}"


def test_the_wrapper_is_named_as_it_lies() -> None:
    assert (PROJECT / "doit").is_file()
    assert Path(cli.__file__).is_relative_to(PROJECT)
