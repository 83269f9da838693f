"""``python -m isochamber.build.diskfill IMAGE MOUNT FILESYSTEM HOME``: copy a tenant's directories onto its new disk.

A process of its own, in a mount namespace of its own: when it is killed, nothing
stays mounted. With - for IMAGE the disk is the directory MOUNT, as it is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from isochamber.build import tree
from isochamber.build.disk import TOGETHER
from isochamber.launch import disk, mounts, syscalls

_NOT_THESE = ("home", "staging", "lost+found")  # of a disk that this one is to replace: HOME is given


def main(words: list[str]) -> int:
    """Copy FILESYSTEM's content, but its /home, and HOME below MOUNT, synced; returns the exit code of what copied."""
    image, mount, filesystem, home = words
    if image != "-":
        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.make_private()
        file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        disk.mount(file, image, mount)
        Path(mount, "lost+found").rmdir()  # a name that the tenant's root would not expect
    inside = os.open(mount, tree.DIRECTORY)
    shutil.copystat(filesystem, mount)
    Path(mount, "home").mkdir(0o755)
    parts = sorted(name for name in os.listdir(filesystem) if name not in _NOT_THESE)
    for sources, target in (([f"{filesystem}/{name}" for name in parts], mount), ([f"{home}/."], f"{mount}/home")):
        status = subprocess.run(
            [*TOGETHER, "cp", "-a", "--sparse=always", "--", *sources, target], check=False
        ).returncode
        if status:
            return status
    os.mkdir("staging", 0o700, dir_fd=inside)
    syscalls.syncfs(inside)
    os.close(inside)
    if image != "-":
        syscalls.umount2(mount)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
