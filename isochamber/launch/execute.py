"""execve(2): the last step of a start, and what is said when the tenant's program can't be run."""

from __future__ import annotations

import errno
import os

from isochamber.errors import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, IsochamberError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.entry import Entry


def program(entry: Entry) -> None:
    """execve(2) the tenant's program; raises IsochamberError with podman's exit code."""
    failure = _try_each(entry)
    missing = failure.errno == errno.ENOENT
    raise IsochamberError(
        failure.strerror or str(failure),
        stage="launch",
        path=entry.argv[0],
        errno=failure.errno,
        hint="is it (or the interpreter that its first line names) in progs/, the layer or the base?"
        if missing
        else "is it executable, and for this architecture?",
        exit_code=EXIT_NOT_FOUND if missing else EXIT_NOT_EXECUTABLE,
    )


def _try_each(entry: Entry) -> OSError:
    """execve(2) along PATH as execvp(3): what may not be run is passed over, and told if nothing else is found."""
    name = entry.argv[0]
    if "/" in name:
        directories = [""]
    else:
        directories = [f"{path}/" for path in entry.env.get("PATH", "/usr/bin:/bin").split(":") if path]
    found = OSError(errno.ENOENT, "is not on the PATH")
    for directory in directories:
        try:
            os.execve(directory + name, entry.argv, entry.env)  # noqa: S606 - an argv list, no shell
        except OSError as error:
            if directory and error.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            found = error
            if error.errno != errno.EACCES:
                break
    return found
