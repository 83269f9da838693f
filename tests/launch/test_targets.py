"""What a tenant leaves where the launcher mounts can't lead a mount out of its root file system (CVE-2021-30465)."""

import json
import os
from pathlib import Path

import pytest

from isochamber.launch import command
from tests.launch import tenants
from tests.launch.tenants import Tenant

TARGETS = ("proc", "sys", "dev", "tmp", "home")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of the host with the names that a redirected mount would go to."""
    for name in (*TARGETS, "shm", "pts", "mqueue", "tenant_ipc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "canary").write_text("untouched\n")
    return tmp_path


def _own(tenant: Tenant, path: Path) -> None:
    os.chown(path, tenant.uid_base, tenant.uid_base, follow_symlinks=False)


def _untouched(outside: Path) -> bool:
    canaries = sorted(outside.glob("*/canary"))
    return len(canaries) == 9 and all(canary.read_text() == "untouched\n" for canary in canaries)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", ["absolute link", "relative link", "link to proc", "file", "fifo", "dangling link"])
def test_something_else_where_a_mount_belongs_refuses_the_start(
    tenant: Tenant, outside: Path, name: str, kind: str
) -> None:
    path = tenant.upper / name
    match kind:
        case "absolute link":
            path.symlink_to(outside / name)
        case "relative link":
            path.symlink_to("../" * 20 + str(outside / name).lstrip("/"))
        case "link to proc":
            path.symlink_to("/proc/self/root" + str(outside / name))
        case "dangling link":
            path.symlink_to("/nowhere")
        case "file":
            path.write_text("")
        case "fifo":
            os.mkfifo(path)
    _own(tenant, path)
    before = tenants.host_mounts()
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout) == (125, "")
    (line,) = done.stderr.splitlines()
    for part in (tenant.name, f"/{name}", "the tenant has put something else there"):
        assert part in line
    assert _untouched(outside)
    assert tenants.host_mounts() == before
    # The control: without it, the same tenant starts.
    path.unlink()
    assert tenant.run("/bin/echo", "runs").stdout == "runs\n"


@pytest.mark.parametrize("name", TARGETS)
def test_a_mount_point_that_the_tenant_removed_is_made_again(tenant: Tenant, name: str) -> None:
    os.mknod(tenant.upper / name, 0o20000, os.makedev(0, 0))  # a whiteout: overlayfs.rst
    assert tenant.output(f"grep -c ' /{name} ' /proc/mounts; stat -c %u /{name}").split()[0] == "1"


def test_what_lies_below_the_fresh_file_systems_is_not_the_tenants_to_prepare(tenant: Tenant, outside: Path) -> None:
    # /dev/pts, /dev/shm and /tmp/tenant_ipc as links in the upper lie below the fresh /dev and /tmp.
    for directory, names in (("dev", ("pts", "shm", "mqueue", "null", "console")), ("tmp", ("tenant_ipc",))):
        (tenant.upper / directory).mkdir()
        _own(tenant, tenant.upper / directory)
        for name in names:
            (tenant.upper / directory / name).symlink_to(outside / name)
    tenant.change(ipc=str(outside / "tenant_ipc"))
    seen = tenant.output("cat /tmp/tenant_ipc/canary; ls -A /dev/shm /tmp; test -c /dev/null && test ! -L /dev/null")
    assert seen.split() == ["untouched", "/dev/shm:", "/tmp:", "tenant_ipc"]
    assert _untouched(outside)


@pytest.mark.parametrize("to", ["outside", "/opt"])
def test_a_directory_on_the_way_that_is_a_link_refuses_the_start_and_nothing_is_made_behind_it(
    tenant: Tenant, outside: Path, to: str
) -> None:
    # Mount points may lie deeper than the root, and a missing last part is made: never behind a link.
    (outside / "cache").mkdir()
    (tenant.upper / "opt/cache").mkdir(parents=True)
    (tenant.upper / "var").symlink_to(outside if to == "outside" else to)
    before = sorted(outside.rglob("*"))
    for target in ("/var/cache", "/var/cache/apt"):
        plan = {**tenant.entry, "argv": ["/bin/echo", "must not run"], "binds": [{"source": "/etc", "target": target}]}
        read, write = os.pipe()
        os.write(write, json.dumps(plan).encode())
        os.close(write)
        done = tenants.run(command.argv("plan", "--root", str(tenant.root), "--fd", str(read)), pass_fds=(read,))
        os.close(read)
        assert (done.returncode, done.stdout) == (125, "")
        assert target in done.stderr
        assert "ELOOP" in done.stderr
    assert sorted(outside.rglob("*")) == before
    assert not (tenant.upper / "opt/cache/apt").exists()


@pytest.mark.parametrize("kind", ["file link", "directory", "link of etc", "fifo"])
def test_a_resolver_file_that_the_tenant_replaced_is_left_alone(tenant: Tenant, outside: Path, kind: str) -> None:
    (outside / "resolv.conf").write_text("the host's\n")
    etc = tenant.upper / "etc"
    if kind == "link of etc":
        etc.symlink_to(outside)
    else:
        etc.mkdir()
        if kind == "file link":
            (etc / "resolv.conf").symlink_to(outside / "resolv.conf")
        elif kind == "directory":
            (etc / "resolv.conf").mkdir()
        else:
            os.mkfifo(etc / "resolv.conf")
    before = tenants.host_mounts()
    tenant.change(network="host")
    done = tenant.run("/bin/grep", "-c", "resolv", "/proc/self/mountinfo")
    assert done.stdout == "0\n", done.stderr
    assert (outside / "resolv.conf").read_text() == "the host's\n"
    assert tenants.host_mounts() == before


def test_a_root_that_its_tenant_closed_to_itself_fails_cleanly(tenant: Tenant) -> None:
    tenant.upper.chmod(0)
    done = tenant.run("/bin/echo", "must not run")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, "", 1)


@pytest.mark.guest
def test_a_tenant_that_removed_all_its_programs_is_told_so(tenant: Tenant) -> None:
    for name in ("usr", "bin", "lib", "lib64"):
        os.mknod(tenant.upper / name, 0o20000, os.makedev(0, 0))  # a whiteout: overlayfs.rst
    done = tenant.run("/bin/sh", "-c", "echo must not run")
    assert (done.returncode, done.stdout) == (127, "")
    assert "/bin/sh" in done.stderr


def test_a_program_that_names_the_launcher_itself_gets_none_of_the_hosts_root(tenant: Tenant) -> None:
    # CVE-2019-5736: "#!/proc/self/exe" runs what executes it, which is the host's Python.
    (tenant.home / "me").write_text("#!/proc/self/exe\n")
    (tenant.home / "me").chmod(0o755)
    interpreter = Path(os.path.realpath("/proc/self/exe"))
    before = (interpreter.stat().st_mtime_ns, interpreter.stat().st_size)
    tenant.run("/home/me")
    attack = "open(F, '+<', '/proc/1/exe') ? print 'open' : print 'refused'"
    assert tenant.perl(attack) == "refused"
    assert (interpreter.stat().st_mtime_ns, interpreter.stat().st_size) == before


@pytest.mark.parametrize("name", TARGETS)
def test_a_tenant_cannot_move_its_mount_points_away_while_it_runs(tenant: Tenant, name: str) -> None:
    done = tenant.sh(f"mv /{name} /moved; rmdir /{name}; rm -f /{name}/etc; stat -c %F /{name}")
    assert done.stdout == "directory\n"
    assert tenant.output(f"grep -c ' /{name} ' /proc/mounts") == "1"
