"""Bases: a Debian root from a bootstrap tool, the same wherever it is built, with the operator's files in it."""

import dataclasses
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isochamber.build import base, bootstrap, contents, manifest, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from isochamber.spec import load
from isochamber.spec.model import Base
from tests.build.products import Lines, eventually

MIRROR = "http://deb.debian.org/debian"
NOWHERE = "http://127.0.0.1:9/debian"  # discard: nobody answers

PLAIN = Base(
    name="default", tool="mmdebstrap", suite="bookworm", mirror=MIRROR, snapshot=None, variant="minbase",
    architecture=load.host_architecture(), packages=(), files={},
)  # fmt: skip


def digest(path: Path) -> str:
    return contents.digest_with_mode(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mode)


def product(state: State) -> Path:
    return next(path for path in (state.root / "base_fs").iterdir())


# What it is made of.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool", "debootstrap"),
        ("suite", "trixie"),
        ("mirror", "http://mirror.example/debian"),
        ("snapshot", "20250101T000000Z"),
        ("variant", "buildd"),
        ("architecture", "riscv64"),
        ("packages", ("ca-certificates",)),
    ],
)
def test_every_field_makes_another_product_and_says_so(field: str, value: object) -> None:
    changed: dict[str, Any] = {field: value}
    former, now = (base.inputs(one, digest) for one in (PLAIN, dataclasses.replace(PLAIN, **changed)))
    assert former.digest() != now.digest()
    assert len(now.changed_from(former)) == 1


def test_a_mirror_does_not_count_when_a_snapshot_replaces_it() -> None:
    first = dataclasses.replace(PLAIN, snapshot="20250101T000000Z")
    second = dataclasses.replace(first, mirror="http://mirror.example/debian")
    assert base.inputs(first, digest) == base.inputs(second, digest)


def test_an_operators_file_counts_by_its_content_and_its_execute_bit(tmp_path: Path) -> None:
    file = tmp_path / "libx.so"
    file.write_text("one")
    with_file = dataclasses.replace(PLAIN, files={"/lib/libx.so": file})
    products = [base.product(with_file, digest)]
    file.write_text("two")
    products.append(base.product(with_file, digest))
    file.chmod(0o755)
    products.append(base.product(with_file, digest))
    os.utime(file, (1, 1))
    assert base.product(with_file, digest) == products[-1]
    assert len(set(products)) == 3


# What is in it.


def test_a_base_carries_nothing_of_the_host_and_nothing_that_gets_stale(debian_state: State) -> None:
    rootfs = product(debian_state) / "rootfs"
    assert (rootfs / "etc/resolv.conf").read_text() == ""
    assert not (rootfs / "etc/resolv.conf").is_symlink()
    assert (rootfs / "etc/machine-id").read_text() == ""
    assert (rootfs / "etc/hostname").read_text() != Path("/proc/sys/kernel/hostname").read_text()
    assert "localhost" in (rootfs / "etc/hosts").read_text()
    assert [path.name for path in (rootfs / "var/lib/apt/lists").iterdir()] == ["partial"]
    assert list((rootfs / "var/cache/apt").rglob("*.deb")) == []
    for name in ("dev", "run", "tmp"):
        assert list((rootfs / name).iterdir()) == []
    assert stat.S_IMODE((rootfs / "tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE(rootfs.stat().st_mode) == 0o755
    descriptor = os.open(rootfs, tree.DIRECTORY)
    try:
        kinds = {item.kind for item in tree.walk(descriptor, stage="test")}
    finally:
        os.close(descriptor)
    assert kinds == {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
    described = manifest.read(rootfs.parent)
    assert manifest.describe_tree(rootfs) == (described.tree, described.size)


def test_no_package_can_start_a_service_in_a_base(debian_state: State) -> None:
    policy = product(debian_state) / "rootfs/usr/sbin/policy-rc.d"
    assert subprocess.run([policy, "nginx", "start"], check=False).returncode == 101


def test_debootstrap_makes_a_base_from_the_same_cache_with_the_operators_files_under_any_umask(
    debian_state: State, tmp_path: Path
) -> None:
    library, tool = tmp_path / "libx.so", tmp_path / "tool"
    library.write_bytes(b"\x7fELF library")
    library.chmod(0o600)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o700)
    inside = {"/lib/libsunneedclient.so": library, "/opt/new/dir/tool": tool, "/etc/issue": library}
    wanted = dataclasses.replace(PLAIN, name="other", tool="debootstrap", files=inside)
    umask = os.umask(0o077)
    try:
        built = base.build(debian_state, wanted, digest, Lines())
    finally:
        os.umask(umask)
    log = debian_state.log("base-other").read_text()
    assert "Valid Release signature" in log
    retrieved = re.findall(r"Retrieving (\S+)", log)
    assert "Validating libc6" in log
    assert "libc6" not in retrieved, "it was in the cache"
    rootfs = debian_state.base(built) / "rootfs"
    assert os.readlink(rootfs / "lib") == "usr/lib"
    placed = rootfs / "usr/lib/libsunneedclient.so"
    assert placed.read_bytes() == b"\x7fELF library"
    assert stat.S_IMODE(placed.stat().st_mode) == 0o644
    assert stat.S_IMODE((rootfs / "opt/new/dir/tool").stat().st_mode) == 0o755
    assert (rootfs / "etc/issue").read_bytes() == b"\x7fELF library"
    for path in ("", "opt/new", "opt/new/dir", "etc", "home", "usr/sbin", "usr/sbin/policy-rc.d"):
        assert stat.S_IMODE((rootfs / path).stat().st_mode) == 0o755, path
    assert debian_state.base(built).joinpath("settings").exists() is False
    assert base.build(debian_state, wanted, digest, Lines()) == built


def test_an_operators_file_can_not_leave_the_root(tmp_path: Path) -> None:
    rootfs, host = tmp_path / "rootfs", tmp_path / "host"
    for directory in (rootfs, host):
        directory.mkdir()
    (rootfs / "lib").symlink_to(host)
    (rootfs / "up").symlink_to("../../../../../../../../../../../etc")
    descriptor = os.open(rootfs, tree.DIRECTORY)
    try:
        with pytest.raises(OSError, match=r"File exists|No such file"):
            base._place(descriptor, "lib/x", b"text", 0o644)  # host's path does not exist inside
        (rootfs / "etc").mkdir()
        base._place(descriptor, "up/isochamber-test", b"text", 0o644)
    finally:
        os.close(descriptor)
    assert list(host.iterdir()) == []
    assert (rootfs / "etc/isochamber-test").read_bytes() == b"text"
    assert not Path("/etc/isochamber-test").exists()


def test_an_operators_file_that_changes_during_the_build_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("one")
    named_by = digest(file)
    file.write_text("two")
    with pytest.raises(IsochamberError, match="changed while the base was built"):
        base._operators(PLAIN, file, named_by)


# When it can't be built.


@pytest.mark.parametrize("tool", ["mmdebstrap", "debootstrap"])
def test_a_failed_download_is_one_line_with_the_log_and_its_last_lines_and_leaves_nothing(
    debian_state: State, tool: str
) -> None:
    before = sorted((debian_state.root / "base_fs").iterdir())
    wanted = dataclasses.replace(PLAIN, name="unreachable", tool=tool, mirror=NOWHERE)
    with pytest.raises(IsochamberError) as failed:
        base.build(debian_state, wanted, digest, Lines())
    line, *notes = failed.value.lines()
    assert line.startswith(f"unreachable: base: {debian_state.log('base-unreachable')}: {tool} exited with ")
    assert "127.0.0.1" in "\n".join(notes)
    assert sorted((debian_state.root / "base_fs").iterdir()) == before
    assert list(debian_state.staging.iterdir()) == []


def test_a_proxy_of_the_environment_is_used_and_said_without_its_password(
    debian_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9/")
    reporter = Lines()
    with pytest.raises(IsochamberError):
        base.build(debian_state, dataclasses.replace(PLAIN, name="proxied", tool="debootstrap"), digest, reporter)
    (said,) = [line for line in reporter.said if "proxy" in line]
    assert said == "base proxied: downloads go through a proxy: http_proxy=http://***@127.0.0.1:9/"
    assert "Failed getting release file" in debian_state.log("base-proxied").read_text()


def test_settings_of_the_host_reach_no_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.delenv("http_proxy", raising=False)
    bootstrap.write_settings(tmp_path / "settings")
    environment = bootstrap.environment(tmp_path / "settings")
    assert not {"TMPDIR", "SOURCE_DATE_EPOCH", "http_proxy"} & set(environment)
    shell = ["apt-config", "shell", "proxy", "Acquire::http::Proxy", "parts", "Dir::Etc::parts"]
    told = subprocess.run(shell, env=environment, check=True, capture_output=True, text=True).stdout
    assert told == "parts='/dev/null'\n"


CHECK = """
import dataclasses, sys
from isochamber.build import bootstrap
from isochamber.errors import IsochamberError
from tests.build.test_base import PLAIN
try:
    bootstrap.check_tool(dataclasses.replace(PLAIN, tool=sys.argv[1]))
except IsochamberError as error:
    print(*error.lines(), sep="\\n")
"""


@pytest.mark.parametrize(
    ("tool", "hidden", "expected"),
    [
        ("mmdebstrap", "/usr/bin/mmdebstrap", "base: mmdebstrap is not installed: apt-get install mmdebstrap"),
        ("debootstrap", "/usr/sbin/debootstrap", "base: debootstrap is not installed: apt-get install debootstrap"),
        (
            "mmdebstrap",
            str(bootstrap.KEYRING.parent),
            f"default: base: {bootstrap.KEYRING}: the keys of Debian's archive are not installed: "
            "apt-get install debian-archive-keyring",
        ),
    ],
)
def test_what_is_missing_on_the_host_is_one_line_that_names_its_package(tool: str, hidden: str, expected: str) -> None:
    # Really missing, in a mount namespace of its own: covered by a file without an x bit, or an empty directory.
    cover = f"test -d {hidden} && mount -t tmpfs none {hidden} || mount --bind /dev/null {hidden}"
    argv = ["unshare", "--mount", "sh", "-c", f'{cover}; exec "$@"', "sh", sys.executable, "-c", CHECK, tool]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [expected]


@pytest.mark.parametrize(
    ("status", "handler", "expected"),
    [
        (None, None, "binfmt_misc is not mounted"),
        ("enabled\n", None, "no handler is registered"),
        ("enabled\n", "disabled\ninterpreter /x\nflags: F\n", "the handler is disabled"),
        ("enabled\n", "enabled\ninterpreter /x\nflags: OC\n", "lacks the flag F"),
        ("enabled\n", "enabled\ninterpreter /x\nflags: POCF\n", None),
    ],
)
def test_what_a_foreign_architecture_needs_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None, handler: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(bootstrap, "BINFMT", tmp_path)
    for name, text in (("status", status), ("qemu-riscv64", handler)):
        if text is not None:
            (tmp_path / name).write_text(text)
    foreign = dataclasses.replace(PLAIN, architecture="riscv64")
    if expected is None:
        bootstrap.check_tool(foreign)
        return
    with pytest.raises(IsochamberError, match=expected) as failed:
        bootstrap.check_tool(foreign)
    (line,) = failed.value.lines()
    assert line.startswith("default: base: ")
    assert "qemu-user-static" in line or "echo 1 >" in line


BUILDER = """
import sys
from pathlib import Path
from isochamber.build import base
from isochamber.build.state import State
from tests.build.products import Lines
from tests.build.test_base import PLAIN, digest
import dataclasses
base.build(State(Path(sys.argv[1])), dataclasses.replace(PLAIN, name="killed", packages=("tree",)), digest, Lines())
"""


def _processes_naming(text: str) -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                if text.encode() in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
            except OSError:
                continue
    return found


def test_the_tool_works_on_a_volatile_overlay_and_when_the_builder_is_killed_it_dies_and_no_mount_stays(
    debian_state: State,
) -> None:
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, debian_state.root], cwd=Path(__file__).parents[2])
    log = debian_state.log("base-killed")
    assert eventually(lambda: log.exists() and "Unpacking" in log.read_text(errors="replace"))
    staging = str(debian_state.staging)
    assert len(_processes_naming(staging)) > 1
    seen = [Path(f"/proc/{pid}/mountinfo").read_text().splitlines() for pid in _processes_naming(staging)]
    assert any(staging in line and "volatile" in line for lines in seen for line in lines), "every file is synced"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert eventually(lambda: not _processes_naming(staging))
    assert staging not in Path("/proc/self/mountinfo").read_text()
    assert [path.name for path in (debian_state.root / "base_fs").iterdir() if path.name.startswith("killed")] == []
