"""Exit codes are podman's (podman-run(1), "Exit Status"), and each failure of ours is one line."""

import json
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from isochamber.launch import command
from tests.launch import tenants
from tests.launch.tenants import Tenant


def _one_line(done: tenants.Done) -> str:
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("isochamber: ")
    return lines[0]


@pytest.mark.parametrize("status", [0, 1, 7, 125, 255])
def test_the_tenants_own_status_is_the_launchers(tenant: Tenant, status: int) -> None:
    done = tenant.sh(f"exit {status}")
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.guest
def test_a_tenant_that_is_killed_gives_128_and_the_signal(tenant: Tenant) -> None:
    with tenant.started("echo ready; exec sleep 1000") as started:
        os.kill(started.record.pid, signal.SIGKILL)
        assert started.end() == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("/nothing", 127, "ENOENT"),
        ("nothing-on-the-path", 127, "not on the PATH"),
        ("/home/lost-interpreter", 127, "ENOENT"),
        ("/etc/passwd", 126, "EACCES"),
        ("/etc", 126, "EACCES"),
        ("/etc/passwd/x", 126, "ENOTDIR"),
        ("/home/data", 126, "ENOEXEC"),
    ],
)
def test_a_program_that_is_missing_is_127_and_one_that_cannot_run_126(
    tenant: Tenant, program: str, status: int, reason: str
) -> None:
    for name, text in (("lost-interpreter", "#!/no/such/interpreter\n"), ("data", "no program\n")):
        (tenant.home / name).write_text(text)
        (tenant.home / name).chmod(0o755)
    done = tenant.run(program)
    assert done.returncode == status
    line = _one_line(done)
    assert tenant.name in line
    assert program in line
    assert reason in line


def test_the_path_is_searched_as_execvp_does_past_what_may_not_be_run(tenant: Tenant) -> None:
    (tenant.home / "first").mkdir()
    (tenant.home / "second").mkdir()
    (tenant.home / "first" / "tool").write_text("#!/bin/sh\necho first\n")
    (tenant.home / "second" / "tool").write_text("#!/bin/sh\necho second\n")
    (tenant.home / "second" / "tool").chmod(0o755)
    tenant.entry["env"] = {"PATH": "/home/first:/etc/passwd:/home/second"}
    assert tenant.run("tool").stdout == "second\n"
    tenant.entry["env"] = {"PATH": "/home/first:/nowhere"}
    done = tenant.run("tool")
    assert done.returncode == 126
    assert "EACCES" in _one_line(done)


def test_a_working_directory_that_is_not_there_is_our_failure(tenant: Tenant) -> None:
    tenant.change(cwd="/nowhere")
    done = tenant.run()
    assert done.returncode == 125
    assert "/nowhere" in _one_line(done)


@pytest.mark.guest
def test_a_step_that_fails_is_one_line_with_tenant_step_path_and_errno(tenant: Tenant) -> None:
    tenant.home.rmdir()
    done = tenant.run("/bin/echo", "must not be seen")
    tenant.home.mkdir()
    assert (done.returncode, done.stdout) == (125, "")
    line = _one_line(done)
    for part in (tenant.name, "bind /home", tenant.entry["home"], "ENOENT"):
        assert part in line


def test_a_lower_that_is_gone_is_our_failure(tenant: Tenant) -> None:
    tenant.change(lowers=["layers/gone/rootfs", *tenant.entry["lowers"]])
    done = tenant.run()
    assert done.returncode == 125
    assert "layers/gone/rootfs" in _one_line(done)


def test_what_the_tenant_writes_before_it_ends_arrives_and_its_input_reaches_it(tenant: Tenant) -> None:
    done = tenant.run("/bin/sh", "-c", "cat; echo problem >&2; exit 3", stdin=None, input="through\n")
    assert (done.stdout, done.stderr, done.returncode) == ("through\n", "problem\n", 3)


@pytest.mark.parametrize(
    ("closed", "numbers"), [("<&-", [0]), (">&-", [1]), ("2>&-", [2]), ("<&- >&- 2>&-", [0, 1, 2])]
)
def test_a_launcher_started_with_closed_descriptors_gives_the_tenant_dev_null_there(
    tenant: Tenant, closed: str, numbers: list[int]
) -> None:
    # By device number: the link's text is not "/dev/null" where the host's root is a chroot.
    script = 'open F, ">", "/home/seen"; print F join " ", map { (stat "/proc/self/fd/$_")[6] } 0..2'
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {closed}', "sh", *tenant.words("/usr/bin/perl", "-e", script)],
        stdin=subprocess.PIPE, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = (tenant.home / "seen").read_text().split()
    null = str(os.stat(os.devnull).st_rdev)
    assert [device == null for device in seen] == [number in numbers for number in range(3)]


def test_our_own_errors_keep_their_code_when_nobody_can_read_them(tenant: Tenant) -> None:
    words = tenant.words("/nothing")
    done = subprocess.run(["/bin/sh", "-c", '"$@" 2>&-', "sh", *words], check=False, timeout=60)
    assert done.returncode == 127


def test_no_tenant_runs_with_a_directory_of_the_host_as_a_descriptor(tenant: Tenant) -> None:
    # CPython itself refuses to start so; that is relied on, and therefore tested.
    for redirect in ("0< /etc", "1< /etc", "2< /etc"):
        words = tenant.words("/usr/bin/touch", "/home/ran")
        done = subprocess.run(
            ["/bin/sh", "-c", f'"$@" {redirect}', "sh", *words], capture_output=True, check=False, timeout=60
        )
        assert done.returncode != 0
    assert not (tenant.home / "ran").exists()


@pytest.mark.parametrize(
    "words",
    [
        [], ["run"], ["plan"], ["fly", "--root", "/x", "a"], ["run", "--root"], ["run", "--root", "relative", "a"],
        ["run", "--root", "/x", "--colour", "a"], ["plan", "--root", "/x", "--fd", "x"], ["run", "--root", "/x"],
    ],
)  # fmt: skip
def test_a_command_line_that_is_wrong_is_exit_2_and_one_line_of_usage(words: list[str]) -> None:
    done = tenants.run(command.argv(*words))
    assert done.returncode == 2
    assert "usage: " in _one_line(done)


def test_options_may_stand_before_and_after_the_tenant_and_a_command_may_have_its_own(tenant: Tenant) -> None:
    tenant.change(argv=["/bin/echo", "its own"])
    root = str(tenant.root)
    for words, expected in (
        (["--root", root, tenant.name], "its own"),
        ([tenant.name, "--root", root, "--no-terminal"], "its own"),
        (["--root", root, tenant.tid, "--", "/bin/echo", "--shell"], "--shell"),
        (["--root", root, "--", tenant.name, "/bin/echo", "--", "x"], "-- x"),
        (["--root", root, tenant.name, "/bin/echo", "-n", "--root"], "--root"),
        (["--root", root, tenant.name, "--no-terminal", "--", "/bin/echo", "both"], "both"),
    ):
        assert tenants.run(command.argv("run", *words)).stdout.rstrip("\n") == expected


def test_an_entry_with_a_text_that_steers_terminals_is_printed_escaped(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(argv=["/x\x1b]52;c;eA\x07"])
    done = tenant.run()
    assert done.returncode == 127
    assert "\x1b" not in done.stderr
    assert "\\x1b" in _one_line(done)
    assert json.loads(tenant.containers.read_text())
