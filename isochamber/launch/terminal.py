"""The tenant's own terminal: a pty of its own devpts instance, so that the operator's is out of its reach.

With a terminal shared, TIOCSTI would let a tenant type into the operator's shell
(CVE-2017-5226). Where the descriptors are no terminals they are passed as they are.
"""

import fcntl
import os
import termios

from isochamber.launch import mounts, syscalls

_TIOCGPTPEER = 0x5441  # ioctl_tty(2)
_TIOCSPTLCK = 0x40045431


def make(root: int, owner: int) -> "tuple[int, int]":
    """Return (master, slave) of a new pty of the instance at /dev/pts, bound to /dev/console too. Raises OSError."""
    master, slave = open_pair(root, owner)
    _bind_console(root, slave)
    return master, slave


def open_pair(root: int, owner: int) -> "tuple[int, int]":
    """Return (master, slave) of a new pty of the instance at /dev/pts. Raises OSError."""
    below = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS
    master = syscalls.openat2(root, "dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY, resolve=below)
    fcntl.ioctl(master, _TIOCSPTLCK, b"\0\0\0\0")
    # By ioctl and not by name: a name could be the tenant's by now.
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.chown(slave, owner, owner + 5)
    return master, slave


def _bind_console(root: int, slave: int) -> None:
    dev = mounts.reopen(root, "dev")
    os.close(os.open("console", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dev))
    target = syscalls.openat2(dev, "console", os.O_PATH | os.O_NOFOLLOW)
    clone = syscalls.open_tree(slave, b"", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
    syscalls.move_mount(clone, target)
    for descriptor in (clone, target, dev):
        os.close(descriptor)


def become_controlling(slave: int) -> None:
    """Make ``slave`` the session leader's controlling terminal, and descriptors 0, 1 and 2."""
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(slave, descriptor)
