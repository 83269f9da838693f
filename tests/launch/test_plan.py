"""A plan: the same sandbox for the build half, with a home, directories and a time limit of its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isochamber.launch import capabilities, command, mounts, pins
from tests.launch import tenants
from tests.launch.tenants import Tenant


def _run(tenant: Tenant, script: str, *options: str, fds: tuple[int, ...] = (), **changes: Any) -> tenants.Done:
    plan = os.memfd_create("plan", 0)
    entry = {**tenant.entry, "argv": ["/bin/sh", "-c", script], **changes}
    try:
        os.write(plan, json.dumps(entry).encode())
        os.lseek(plan, 0, os.SEEK_SET)
        words = command.argv("plan", "--root", str(tenant.root), "--fd", str(plan), *options)
        return tenants.run(words, pass_fds=(plan, *fds))
    finally:
        os.close(plan)


@pytest.mark.parametrize("status", [0, 7, 100])
def test_its_exit_codes_are_those_of_run(tenant: Tenant, status: int) -> None:
    assert _run(tenant, f"exit {status}").returncode == status
    assert _run(tenant, "", argv=["/nothing"]).returncode == 127
    assert _run(tenant, "exit 3", "--no-terminal").returncode == 3


def test_it_needs_no_containers_json(tenant: Tenant) -> None:
    tenant.containers.unlink()
    assert _run(tenant, "echo built").stdout == "built\n"


@pytest.mark.guest
def test_an_install_script_has_the_rights_of_dpkg_over_its_own_files_and_no_other(tenant: Tenant) -> None:
    rights = list(capabilities.INSTALL)
    script = (
        "set -e; touch /var/f; chown 33:34 /var/f; chmod 4755 /var/f; stat -c %u:%g:%a /var/f; "
        "chroot / true; perl -e '$) = $( = 33; $> = $< = 33; print qq($<\\n)'; "
        "! mknod /var/dev c 1 3; ! mount -t tmpfs t /mnt"
    )
    done = _run(tenant, script, capabilities=rights)
    assert done.stdout.split() == ["33:34:4755", "33"]
    assert done.returncode == 0, done.stderr
    assert (tenant.upper / "var/f").stat().st_uid == tenant.uid_base + 33
    assert _run(tenant, "chown 33:34 /var/f").returncode != 0, "the control: without them"


@pytest.mark.guest
def test_a_volatile_overlay_is_used_again_after_its_workdir_was_cleared(tenant: Tenant) -> None:
    assert "volatile" in _run(tenant, "grep overlay /proc/mounts", volatile=True).stdout
    # overlayfs.rst, "Volatile mount": the kernel refuses it until somebody has looked at it.
    assert _run(tenant, "true").returncode == 125
    shutil.rmtree(tenant.directory / "workdir" / "work")
    assert "volatile" not in _run(tenant, "grep overlay /proc/mounts").stdout


def _on_disk(tenant: Tenant) -> Path:
    """Return a directory beside the tenant's own: /tmp may be a tmpfs, which no kernel before 6.3 id-maps."""
    made = tenant.directory / "shown"
    made.mkdir()
    return made


def test_a_home_may_be_handed_over_as_a_descriptor(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant()
    given = _on_disk(tenant)
    (given / "given").write_text("given\n")
    user, net = pins.ensure(tenant.tid, tenant.uid_base, tenants.UID_COUNT)
    home = mounts.clone_idmapped(str(given), user)
    try:
        done = _run(tenant, "cat /home/given; stat -c %u /home/given; touch /home/new", fds=(home,), home_fd=home)
    finally:
        for descriptor in (user, net, home):
            os.close(descriptor)
    assert done.stdout.split() == ["given", "0"]
    assert (given / "new").stat().st_uid == 0
    assert not (tenant.home / "new").exists()


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("idmap", [True, False])
def test_directories_of_the_host_may_be_shown(tenant: Tenant, read_only: bool, idmap: bool) -> None:
    directory = _on_disk(tenant)
    (directory / "file").write_text("shown\n")
    bind = {"source": str(directory), "target": "/srv/shown", "read_only": read_only, "idmap": idmap}
    done = _run(
        tenant,
        "cat /srv/shown/file; stat -c %u /srv/shown/file; touch /srv/shown/new && echo wrote; true",
        binds=[bind],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["shown", "0" if idmap else "65534"]
    assert ("wrote" in done.stdout) == (idmap and not read_only)


def test_a_directory_of_the_state_directory_may_be_named_relative_to_it(tenant: Tenant) -> None:
    (tenant.directory / "cache").mkdir()
    bind = {"source": f"tenants_fs/{tenant.tid}/cache", "target": "/var/cache/apt/archives", "idmap": True}
    assert _run(tenant, "touch /var/cache/apt/archives/x", binds=[bind]).returncode == 0
    assert (tenant.directory / "cache" / "x").exists()


def test_a_directory_that_is_not_there_is_our_failure(tenant: Tenant) -> None:
    done = _run(tenant, "echo must not run", binds=[{"source": "/nowhere", "target": "/srv", "idmap": True}])
    assert (done.returncode, done.stdout) == (125, "")
    assert "/nowhere" in done.stderr


def test_a_target_that_is_a_symlink_is_refused(tenant: Tenant, tmp_path: Path) -> None:
    (tenant.upper / "srv").symlink_to(tmp_path)
    done = _run(tenant, "echo must not run", binds=[{"source": "/etc", "target": "/srv", "read_only": True}])
    assert (done.returncode, done.stdout) == (125, "")
    assert "/srv" in done.stderr


def test_what_takes_too_long_is_killed_with_all_it_started(tenant: Tenant) -> None:
    done = _run(tenant, "echo begun; (sleep 1000 &) ; sleep 1000", timeout=1)
    assert (done.returncode, done.stdout) == (137, "begun\n")
    assert tenant.processes() == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"name": "x"}'])
def test_a_plan_that_is_wrong_is_one_line(tenant: Tenant, content: bytes) -> None:
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    done = tenants.run(command.argv("plan", "--root", str(tenant.root), "--fd", str(read)), pass_fds=(read,))
    os.close(read)
    assert done.returncode == 125
    assert len(done.stderr.splitlines()) == 1


def test_a_descriptor_that_is_not_open_is_one_line(tenant: Tenant) -> None:
    done = tenants.run(command.argv("plan", "--root", str(tenant.root), "--fd", "77"))
    assert done.returncode == 125
    assert "EBADF" in done.stderr
    assert len(done.stderr.splitlines()) == 1
