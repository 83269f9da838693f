"""Learning on five real programs of Debian: one run, then nothing else goes through, and the work is still done."""

import os
import platform
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isochamber.build import filters
from isochamber.errors import SpecError
from isochamber.spec import arguments, learned, policy
from isochamber.spec.learned import Learned
from tests.docs.pages import page
from tests.seccomp import programs, tables
from tests.seccomp.probes import SIGSYS
from tests.seccomp.programs import Programs

IPV6 = ["/usr/bin/python3", "-c", "import socket; socket.socket(socket.AF_INET6); print('socket')"]


@pytest.fixture(scope="module")
def five(
    make_root: Callable[[], Path], master_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    """A world with the five in one layer, built once."""
    root = make_root()
    yield programs.make(tmp_path_factory.mktemp("five"), root, master_root)
    shutil.rmtree(root)


def _learn(five: Programs, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    done = (
        five.world.cli("learn", "--forget", *words[:-1], name) if words else five.world.cli("learn", "--forget", name)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", programs.COMMANDS)
def test_a_program_still_does_its_work_when_everything_else_kills_it(five: Programs, name: str) -> None:
    five.settings(name)
    done = _learn(five, name)
    assert "done" in done.stdout
    assert five.world.cli("learn", name).returncode == 0  # what a server does in its loop may differ from run to run
    assert five.world.entry(name)["seccomp"]["mode"] == "kill"
    for _ in range(2):
        worked = five.world.cli("run", name)
        assert (worked.returncode, worked.stdout) == (0, "done\n"), worked.stderr
    known = learned.read(five.persist(name) / learned.FILE)
    assert known is not None
    assert known.architectures == {platform.machine()}
    assert len(known.calls) > 10


def test_a_call_that_was_not_learned_is_stopped_as_the_original_did(five: Programs) -> None:
    five.settings("python")
    _learn(five, "python")
    done = five.world.cli("run", "python", *IPV6)
    assert (done.returncode, done.stdout) == (128 + SIGSYS, "")
    assert "isochamber learn python" in done.stderr, "the remedy"
    assert "python: seccomp:" in done.stderr
    five.settings("python", "{mode: none}")
    assert five.world.cli("run", "python", *IPV6).stdout == "socket\n", "the control: without the list"


def test_in_the_other_stages_it_is_refused_with_a_report_or_only_logged(five: Programs) -> None:
    five.settings("python")
    _learn(five, "python")
    five.settings("python", "{mode: notify}")
    done = five.world.cli("run", "python", *IPV6)
    assert "PermissionError" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("isochamber: ")]
    program = line.split(" of ")[1].split(" was ")[0]
    assert line == (
        f"isochamber: python: seccomp: socket(AF_INET6) of {program} was refused: isochamber learn python allows it"
    )
    assert program.startswith("/usr/bin/python3")
    five.settings("python", "errno")
    done = five.world.cli("run", "python", *IPV6)
    assert "PermissionError" in done.stderr
    five.settings("python", "{mode: log}")
    assert five.world.cli("run", "python", *IPV6).stdout == "socket\n"


def test_work_that_hands_many_calls_over_is_not_disturbed(five: Programs) -> None:
    # Threads and children that are all stopped and answered at once.
    script = (
        "import os, threading\n"
        "def ask():\n    for _ in range(500): os.sched_getaffinity(0)\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "for t in threads: t.start()\n"
        "pids = [os.fork() for _ in range(2)]\n"
        "if 0 in pids:\n    ask(); os._exit(0)\n"
        "for p in pids: os.waitpid(p, 0)\n"
        "for t in threads: t.join()\n"
        "print('done')\n"
    )
    five.settings("busybox")
    done = five.world.cli("learn", "busybox", "--", "/usr/bin/python3", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done\n")
    known = learned.read(five.persist("busybox") / learned.FILE)
    assert known is not None
    assert "sched_getaffinity" in known.calls
    assert len(known.calls["clone"]) >= 2, "a thread and a fork"


def test_a_program_that_makes_up_uses_without_end_is_refused_more_of_them(five: Programs) -> None:
    """What a run notes is kept in the launcher's memory and on the host's disk, and compiled into a filter."""
    script = (
        "import errno, fcntl, sys\n"
        "refused = set()\n"
        "for number in range(int(sys.argv[1])):\n"
        "    try: fcntl.ioctl(0, 0x70000000 + number)\n"
        "    except OSError as error: error.errno == errno.EPERM and refused.add(number)\n"
        "print(min(refused, default=0) > 1900, refused >= set(range(2000, 4000)))\n"
    )
    five.settings("busybox")
    (five.persist("busybox") / learned.FILE).unlink(missing_ok=True)
    done = five.world.cli("learn", "busybox", "--", "/usr/bin/python3", "-c", script, "4000")
    assert done.stdout.startswith("True True\nbusybox: 2000 uses of"), done
    five.settings("busybox", "errno")
    done = five.world.cli("run", "busybox", "/usr/bin/python3", "-c", script, "10")
    assert (done.returncode, done.stdout) == (0, "False False\n"), done
    (five.persist("busybox") / learned.FILE).unlink()


def test_a_second_run_adds_and_says_what_is_new_and_its_exit_status_comes_out(five: Programs) -> None:
    five.settings("python")
    _learn(five, "python")
    before = (five.persist("python") / learned.FILE).read_text()
    script = "import socket, sys; socket.socket(socket.AF_INET6); sys.exit(7)"
    done = five.world.cli("learn", "python", "--", "/usr/bin/python3", "-c", script)
    assert done.returncode == 7
    assert "  + socket:AF_INET6\n" in done.stdout
    after = (five.persist("python") / learned.FILE).read_text()
    removed = [line for line in before.splitlines() if line not in after.splitlines()]
    assert removed == [], "a list only grows, a line a use"
    assert five.world.cli("run", "python", *IPV6).stdout == "socket\n", "recompiled by learn itself"


def test_a_list_that_the_operator_edits_is_compiled_by_the_next_doit(five: Programs) -> None:
    five.settings("python")
    _learn(five, "python")
    path = five.persist("python") / learned.FILE
    former = five.world.entry("python")["seccomp"]["learned"]
    assert five.world.executed("configure:python") == set()
    path.write_text(
        path.read_text().replace("calls:\n", "calls:\n  socket: [AF_INET6]\n  getpeername:\n  getsockname:\n")
    )
    assert five.world.executed("configure:python") == {"configure:python"}
    assert five.world.entry("python")["seccomp"]["learned"] != former
    assert five.world.cli("run", "python", *IPV6).stdout == "socket\n"
    path.write_text("version: 1\ncalls: {socket: [AF_NOTHING], open: 3}\n")
    done = five.world.doit("configure:python")
    assert done.returncode != 0
    assert f"{path}:2:" in done.stdout + done.stderr
    path.unlink()
    assert five.world.executed("configure:python") == {"configure:python"}
    assert five.world.entry("python")["seccomp"]["learned"] is None


PTRACE = "import ctypes; print('answer', ctypes.CDLL(None, use_errno=True).ptrace(0, 0, 0, 0), ctypes.get_errno())"
KEYS = (
    "import ctypes; c = ctypes.CDLL(None, use_errno=True); print('keys', c.syscall(250, 0, -3, 1), ctypes.get_errno())"
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of keyctl")
def test_a_dangerous_call_is_said_with_its_reason_and_let_through_only_when_approved(five: Programs) -> None:
    five.settings("python")
    _learn(five, "python")
    words = ["--", "/usr/bin/python3", "-c", f"{PTRACE}; {KEYS}"]
    done = five.world.cli("learn", "python", *words)
    assert "answer 0" in done.stdout
    assert "keys -1 1\n" in done.stdout, "what is always refused is refused while learning too"
    for name in ("ptrace", "keyctl"):
        why = policy.DANGEROUS.get(name) or policy.DENIED[name].why
        assert f"python: {name} is dangerous: {why}" in done.stderr
    assert "isochamber learn --approve keyctl,ptrace python" in done.stderr
    assert five.world.cli("run", "python", *words[1:]).returncode == 128 + SIGSYS, "seen, and not approved"

    done = five.world.cli("learn", "--approve", "keyctl,ptrace", "python", *words)
    assert "dangerous" not in done.stderr
    done = five.world.cli("run", "python", *words[1:])
    assert "answer 0" in done.stdout
    assert "keys -1" not in done.stdout or "keys -1 1\n" not in done.stdout
    text = (five.persist("python") / learned.FILE).read_text()
    assert "approved:\n  - keyctl\n  - ptrace\n" in text

    _learn(five, "python")  # begun anew: without approvals
    five.settings("python", "{approved: [ptrace]}")
    five.world.cli("learn", "python", *words)
    done = five.world.cli("run", "python", *words[1:])
    assert "answer 0" in done.stdout, "approved in tenants.yaml"
    assert "keys -1 1\n" in done.stdout


def test_on_a_terminal_the_operator_is_asked(five: Programs) -> None:
    five.settings("curl")
    controller, terminal = pty.openpty()
    words = [
        sys.executable,
        "-m",
        "isochamber",
        "learn",
        "--no-terminal",
        "curl",
        "--",
        "/usr/bin/python3",
        "-c",
        PTRACE,
    ]
    with subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=five.world.environment, cwd=five.world.directory
    ) as process:
        os.close(terminal)
        seen, asked = b"", False
        while True:
            assert select.select([controller], [], [], 60)[0], seen
            try:
                data = os.read(controller, 4096)
            except OSError:
                break
            if not data:
                break
            seen += data
            if not asked and b"Let ptrace through? [y/N] " in seen:
                asked = True
                os.write(controller, b"y\n")
        assert process.wait(60) == 0, seen
    os.close(controller)
    assert asked
    known = learned.read(five.persist("curl") / learned.FILE)
    assert known is not None
    assert known.approved == {"ptrace"}


def test_what_a_learned_list_says_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    known = Learned(
        {"clone": ("CLONE_VM|CLONE_VFORK|SIGCHLD", "SIGCHLD"), "ioctl": ("0x1234abcd", "TCGETS"), "openat": (),
         "socket": ("AF_INET",)}, frozenset({"ptrace"}), frozenset({"x86_64", "aarch64"}),
    )  # fmt: skip
    path = tmp_path / learned.FILE
    path.write_text(learned.text(known, "some"))
    assert learned.read(path) == known
    assert learned.text(known.merged(Learned()), "some") == learned.text(known, "some")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "must be a mapping"), ("version: 2\ncalls: {}", "version must be 1"),
        ("version: 1\ncalls: [a]", "calls"),
        ("version: 1\ncalls: {A: }", "no name"), ("version: 1\ncalls: {read: [1]}", "takes no values"),
        ("version: 1\ncalls: {socket: }", "must name the values"), ("version: 1\ncalls: {socket: [x]}", "no value"),
        ("version: 1\ncalls: {}\napproved: [mount]", "can't be approved"), ("version: 1\nmore: 1\ncalls: {}", "more"),
        ("version: 1\ncalls: {}\napproved: ptrace", "list of texts"), ("a: [", "is not YAML"), ("\0", "is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_learned_list_is_a_line_with_its_place(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / learned.FILE
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        learned.read(path)
    assert any(reason in problem and str(path) in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("architecture", ["aarch64", "riscv64"])
def test_a_list_learned_here_is_compiled_for_a_machine_whose_calls_have_other_numbers(architecture: str) -> None:
    old = {"open": (), "stat": (), "poll": (), "fork": (), "epoll_wait": (), "rename": (), "socket": ("AF_INET",)}
    new = {"openat": (), "newfstatat": (), "ppoll": (), "clone": ("SIGCHLD",), "epoll_pwait": (), "renameat": (),
           "renameat2": (), "socket": ("AF_INET",)}  # fmt: skip
    programs_of = [
        filters.compiled(filters.learned(Learned(calls), frozenset(), "kill", architecture)) for calls in (old, new)
    ]
    assert programs_of[0] == programs_of[1], "what it lacks is replaced by what it has"
    fewer = filters.compiled(filters.learned(Learned({"openat": ()}), frozenset(), "kill", architecture))
    assert programs_of[0] != fewer


def test_every_name_of_the_policy_is_a_system_call() -> None:
    library = filters.library()
    names = {row.call for row in policy.DENIED.values()} | {name.partition(":")[0] for name in policy.DANGEROUS}
    for name in (*names, *policy.ALWAYS, *policy.REPLACED, *arguments.MATTERS):
        assert library.resolve_syscall(library.system_arch(), name) != -1, name


def test_the_page_about_system_calls_lists_what_is_asked_about_and_what_every_program_needs() -> None:
    text = page("docs/explanation/seccomp.md").text
    assert "\n".join(tables.dangerous()) in text
    for name in policy.ALWAYS:
        assert f"`{name}`" in text, name
