"""Each binding does what its manual page says, and raises OSError with the path."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from isochamber.launch import syscalls


@pytest.mark.guest
def test_openat2_stays_below_its_directory_and_says_which_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "inside").symlink_to("file")
    root = os.open(tmp_path, os.O_PATH)
    try:
        descriptor = syscalls.openat2(root, "file", os.O_RDONLY, resolve=syscalls.RESOLVE_BENEATH)
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        for path, resolve, number in (
            ("link", syscalls.RESOLVE_BENEATH, errno.EXDEV),
            ("../x", syscalls.RESOLVE_BENEATH, errno.EXDEV),
            ("inside", syscalls.RESOLVE_NO_SYMLINKS, errno.ELOOP),
            ("link", syscalls.RESOLVE_IN_ROOT, errno.ENOENT),
        ):
            with pytest.raises(OSError) as caught:
                syscalls.openat2(root, path, os.O_RDONLY, resolve=resolve)
            assert (caught.value.errno, caught.value.filename) == (number, path)
    finally:
        os.close(root)


def test_rename_noreplace_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        syscalls.rename_noreplace(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "b"
    syscalls.rename_noreplace(str(tmp_path / "a"), str(tmp_path / "c"))
    assert (tmp_path / "c").read_text() == "a"


@pytest.mark.guest
def test_rename_exchange_swaps(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    syscalls.rename_exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [(tmp_path / name).read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        syscalls.rename_exchange(str(tmp_path / "a"), str(tmp_path / "none"))


@pytest.mark.guest
def test_syncfs_takes_any_descriptor_of_the_file_system(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    syscalls.syncfs(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError) as caught:
        syscalls.syncfs(descriptor)
    assert caught.value.errno == errno.EBADF


@pytest.mark.guest
def test_clone3_gives_a_child_with_a_pidfd_in_a_namespace_of_its_own() -> None:
    read, write = os.pipe()
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWPID)
    if pid == 0:
        os.write(write, str(os.getpid()).encode())
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert os.read(read, 8) == b"1"
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, 0)
    for descriptor in (read, write, pidfd):
        os.close(descriptor)


@pytest.mark.parametrize("call", ["mount", "umount2", "open_tree", "setns", "pivot_root", "sethostname"])
def test_a_refused_call_raises_with_the_kernels_number(call: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    calls: dict[str, tuple[Callable[[], None], int]] = {
        "mount": (lambda: syscalls.mount("x", missing, "tmpfs"), errno.ENOENT),
        "umount2": (lambda: syscalls.umount2(missing), errno.ENOENT),
        "open_tree": (lambda: os.close(syscalls.open_tree(syscalls.AT_FDCWD, missing, 1)), errno.ENOENT),
        "setns": (lambda: syscalls.setns(-1, 0), errno.EBADF),
        "pivot_root": (lambda: syscalls.pivot_root(missing, missing), errno.ENOENT),
        "sethostname": (lambda: syscalls.sethostname("x" * 100), errno.EINVAL),
    }
    attempt, number = calls[call]
    with pytest.raises(OSError) as caught:
        attempt()
    assert caught.value.errno == number
    if number == errno.ENOENT:
        assert missing in str(caught.value)


def test_a_call_that_the_kernel_lacks_names_the_kernel_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "NR_OPENAT2", 9999)  # no kernel has it, so the real one answers ENOSYS
    with pytest.raises(OSError, match=r"this kernel has no openat2\(2\), Linux 5.6 brought it") as caught:
        syscalls.openat2(syscalls.AT_FDCWD, "/", os.O_RDONLY)
    assert caught.value.errno == errno.ENOSYS


def test_an_architecture_whose_numbers_are_not_known_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "NR_PIVOT_ROOT", -1)
    with pytest.raises(OSError, match="is not known"):
        syscalls.pivot_root(".", ".")
