"""The verb learn: run a tenant once, note the system calls it makes, and let nothing else through from then on."""

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

from isochamber.cli import common
from isochamber.errors import EXIT_BAD_INPUT, IsochamberError, printable

if TYPE_CHECKING:
    from isochamber.build.filters import Learning
    from isochamber.build.pipeline import Pipeline
    from isochamber.spec.learned import Learned

_STAGE = "learn"
_ALL = "all"


def learn(arguments: argparse.Namespace) -> int:
    """Run a tenant once and note its system calls; from then on its filter lets through these and no others."""
    from isochamber.build import filters, registry  # noqa: PLC0415
    from isochamber.spec import learned  # noqa: PLC0415

    pipeline = common.pipeline(arguments, only=arguments.tenant)
    entry = registry.find(pipeline.state, arguments.tenant)
    name = arguments.tenant if entry is None else str(entry["name"])
    if entry is None or name not in pipeline.spec.tenants or pipeline.wanted_entry(name) is None:
        raise IsochamberError("is not configured", stage=_STAGE, tenant=name, hint=f"./doit configure:{name}")
    former = learned.Learned() if arguments.forget else learned.read(pipeline.learned_file(name)) or learned.Learned()
    given = _given(arguments.approve)
    approved = pipeline.tenant(name).seccomp.approved | former.approved | (given - {_ALL})

    filters_of_run = filters.learning(approved)
    notes, status = _run(pipeline, dict(entry), filters_of_run, arguments)
    found, refused = _read(notes)
    asked = former.merged(found).merged(learned.Learned({}, frozenset(given - {_ALL})))
    questions = filters.questions(asked, approved) | {
        row.name: row.why for row in filters_of_run.refused if row.name in refused
    }
    granted = _ask(name, questions, everything=_ALL in given)
    result = asked.merged(learned.Learned({}, granted))
    pipeline.learn(name, result)
    _report(pipeline, name, former, result, sorted(granted & refused))
    return status


def _given(names: list[str]) -> frozenset[str]:
    from isochamber.spec import learned  # noqa: PLC0415

    given = frozenset(word for name in names for word in name.split(",") if word)
    for name in sorted(given - {_ALL}):
        if not learned.approvable(name):
            raise IsochamberError(
                f"{printable(name)} is no call that may be approved", stage=_STAGE,
                hint="docs/explanation/seccomp.md lists them", exit_code=EXIT_BAD_INPUT,
            )  # fmt: skip
    return given


def _run(
    pipeline: "Pipeline", entry: dict[str, object], learning: "Learning", arguments: argparse.Namespace
) -> tuple[list[str], int]:
    """Run the tenant under the launcher's supervision; returns the lines of its notes, and its status."""
    import subprocess  # noqa: PLC0415 - slow to import, and every verb imports this module

    from isochamber.launch import command  # noqa: PLC0415

    learning.wanted.ensure(pipeline.state)
    notes, plan = os.memfd_create("notes", os.MFD_CLOEXEC), os.memfd_create("plan", os.MFD_CLOEXEC)
    try:
        if arguments.command:
            entry["argv"] = arguments.command
        entry["seccomp"] = learning.entry(notes)
        os.write(plan, json.dumps(entry).encode())
        os.lseek(plan, 0, os.SEEK_SET)
        words = ["learn", "--root", str(pipeline.state.root), "--fd", str(plan)]
        if arguments.no_terminal:
            words.append("--no-terminal")
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher forwards it to the tenant
        try:
            status = subprocess.run(command.argv(*words), pass_fds=(notes, plan), check=False).returncode
        finally:
            signal.signal(signal.SIGINT, former)
        os.lseek(notes, 0, os.SEEK_SET)
        with os.fdopen(os.dup(notes)) as file:
            return file.read().splitlines(), status if status >= 0 else 128 - status
    finally:
        os.close(notes)
        os.close(plan)


def _read(notes: list[str]) -> tuple["Learned", frozenset[str]]:
    """Return what was let through, and the names of what was refused."""
    from isochamber.build import filters  # noqa: PLC0415
    from isochamber.spec import learned  # noqa: PLC0415

    calls, refused = [], set()
    for line in notes:
        number, value, name = line.split()
        if name != "-":
            refused.add(name)
            continue
        try:
            calls.append((filters.name_of(int(number)), int(value)))
        except ValueError:
            continue  # a call that does not exist, and was answered so
    return learned.seen(calls, filters.machine()), frozenset(refused)


def _ask(tenant: str, questions: dict[str, str], *, everything: bool) -> frozenset[str]:
    """Say what is dangerous, and ask about each where there is somebody to ask."""
    granted = set()
    terminal = sys.stdin.isatty() and sys.stderr.isatty()
    for name, why in sorted(questions.items()):
        sys.stderr.write(f"isochamber: {tenant}: {name} is dangerous: {why}\n")
        if everything:
            granted.add(name)
        elif terminal:
            sys.stderr.write(f"Let {name} through? [y/N] ")
            sys.stderr.flush()
            if sys.stdin.readline().strip().lower() in {"y", "yes"}:
                granted.add(name)
    left = sorted(set(questions) - granted)
    if left:
        sys.stderr.write(
            f"isochamber: {tenant}: not let through: {', '.join(left)}; to approve: "
            f"isochamber learn --approve {','.join(left)} {tenant}, or seccomp: approved: in tenants.yaml\n"
        )
    return frozenset(granted)


def _report(pipeline: "Pipeline", tenant: str, former: "Learned", result: "Learned", tried: list[str]) -> None:
    new = sorted(result.names() - former.names())
    common.say(f"{tenant}: {len(result.names())} uses of {len(result.calls)} system calls, {len(new)} of them new")
    for name in new if former.calls else ():
        common.say(f"  + {name}")
    common.say(f"{printable(pipeline.learned_file(tenant))}: seccomp mode {pipeline.tenant(tenant).seccomp.mode}")
    if tried:
        common.say(f"{', '.join(tried)}: refused in this run, let through from now on: learn again what follows on it")


def add(verbs: common.Verbs) -> None:
    """Add this verb to the parser."""
    added = common.add_verb(verbs, "learn", learn)
    added.add_argument("tenant", help="name or tid")
    added.add_argument("command", nargs=argparse.REMAINDER, help="run this instead of the package's init")
    added.add_argument(
        "--approve", action="append", default=[], metavar="CALL[,CALL]",
        help="let these dangerous calls through; all: every one that is seen",
    )  # fmt: skip
    added.add_argument("--forget", action="store_true", help="begin anew instead of adding to what is known")
    added.add_argument("--no-terminal", action="store_true", help="no terminal of its own, even on one")
