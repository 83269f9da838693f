"""The protocol of a durable write, checked on a trace of system calls (strace -f -y): a small ALICE.

What it holds: everything below a name that is published (given to a place outside
staging/) is on disk when it gets that name; the directory that the name is in is synced
after it; nothing outside staging/ is written in place; and when the traced process has
ended, nothing that counts is unsynced. Logs, cache/ and new_tenants/ do not count.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LINE = re.compile(r"^(\d+)\s+(?:[\d.]+\s+)?(\w+)\((.*)\)\s*= (-?\d+)(?:<((?:[^>\\]|\\.)*)>)?")
_UNFINISHED = re.compile(r"^(\d+)\s+(\w+\(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+)\s+<\.\.\. (\w+) resumed>(.*)$")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_AT = re.compile(r'(?:(AT_FDCWD|\d+)(?:<((?:[^>\\]|\\.)*)>)?, )?"((?:[^"\\]|\\.)*)"')
_FD = re.compile(r"^(\d+)<((?:[^>\\]|\\.)*)>")

_CONTENT = {
    "write", "pwrite64", "writev", "ftruncate", "fallocate", "fchmod", "fchown", "fsetxattr", "fremovexattr",
    "copy_file_range", "sendfile",
}  # fmt: skip
_STATUS = {"chmod", "fchmodat", "chown", "lchown", "fchownat", "setxattr", "lsetxattr", "utimensat", "truncate"}
_MADE = {"mkdir", "mkdirat", "symlink", "symlinkat", "mknod", "mknodat"}
_GONE = {"unlink", "unlinkat", "rmdir"}
_RENAMES = {"rename", "renameat", "renameat2"}
SYNCS = {"fsync", "fdatasync", "syncfs"}
TRACED = ",".join(sorted({"open", "openat", "openat2", "creat", "link", "linkat", *_CONTENT, *_STATUS, *_MADE, *_GONE,
                          *_RENAMES, *SYNCS}))  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One system call that succeeded."""

    name: str
    arguments: str
    result: int
    opened: str | None  # the path of the descriptor that was returned
    line: str


def calls(trace: str) -> Iterator[Call]:
    """Yield the calls of a trace in the order in which they ended; those that failed are left out."""
    waiting: dict[str, str] = {}
    for line in trace.splitlines():
        unfinished, resumed = _UNFINISHED.match(line), _RESUMED.match(line)
        if unfinished:
            waiting[unfinished[1]] = unfinished[2]
            continue
        whole = f"{resumed[1]} {waiting.pop(resumed[1], '')}{resumed[3]}" if resumed else line
        found = _LINE.match(whole)
        if found and int(found[4]) >= 0:
            yield Call(found[2], found[3], int(found[4]), found[5], whole)


@dataclass
class Checker:
    """The state of a disk as far as it is promised: which paths have something that is not on it yet."""

    root: str
    dirty: dict[str, str] = field(default_factory=dict)  # path -> the call that made it so
    violations: list[str] = field(default_factory=list)
    synced: int = 0
    published: int = 0

    def _counts(self, path: str) -> bool:
        if not path.startswith(f"{self.root}/") and path != self.root:
            return False
        rest = path[len(self.root) + 1 :]
        return rest.partition("/")[0] not in ("logs", "cache", "new_tenants", "reserve")

    def _is_staged(self, path: str) -> bool:
        rest = path[len(self.root) + 1 :]
        return rest.startswith("staging/") or any(part.startswith(".tmp-") for part in rest.split("/"))

    def _touch(self, path: str, call: Call) -> None:
        if self._counts(path):
            self.dirty[path] = f"{call.name}({call.arguments})"

    def _touch_parent(self, path: str, call: Call) -> None:
        parent = path.rpartition("/")[0]
        # What goes on in staging/ itself is nobody's promise: a name there may come back or be lost.
        if parent != f"{self.root}/staging":
            self._touch(parent, call)

    def take(self, call: Call) -> None:
        """Follow one call."""
        paths = _paths(call)
        if call.name in SYNCS:
            self._sync(call)
        elif call.name in _RENAMES and len(paths) == 2:
            self._rename(call, *paths)
        elif call.name in ("link", "linkat") and len(paths) == 2:
            self._publish(call, paths[0], paths[1])
            self._touch_parent(paths[1], call)
        elif call.name in ("open", "openat", "openat2", "creat"):
            path = call.opened or (paths[0] if paths else "")
            if call.opened == "/dev/null" and "O_CREAT" in call.arguments:
                self.say_success()
            elif "O_CREAT" in call.arguments and call.opened and self._counts(path):
                self._write_in_place(call, path)
                self._touch(path, call)
                self._touch_parent(path, call)
            elif "O_TRUNC" in call.arguments:
                self._write_in_place(call, path)
                self._touch(path, call)
        elif call.name in _CONTENT:
            found = _FD.match(call.arguments)
            if found:
                self._write_in_place(call, found[2])
                self._touch(found[2], call)
        elif call.name in _STATUS and paths:
            self._touch(paths[0], call)
        elif call.name in _MADE and paths:
            self._touch_parent(paths[-1], call)  # there is nothing in it yet that could be lost
        elif call.name in _GONE and paths:
            self.dirty = {path: why for path, why in self.dirty.items() if not _below(path, paths[0])}
            self._touch_parent(paths[0], call)

    def _write_in_place(self, call: Call, path: str) -> None:
        """Complain of a change of content under a published name; /home's own files come by rename too."""
        if self._counts(path) and not self._is_staged(path) and call.name not in ("fchmod", "fchown"):
            self.violations.append(f"written in place: {path}: {call.line}")

    def _sync(self, call: Call) -> None:
        found = _FD.match(call.arguments)
        if not found or not self._counts(found[2]):
            return
        self.synced += 1
        if call.name == "syncfs":
            self.dirty.clear()
        else:
            self.dirty.pop(found[2], None)

    def _publish(self, call: Call, source: str, target: str) -> None:
        """Complain when something gets a name for good that is not on disk."""
        if not self._counts(target) or self._is_staged(target):
            return
        self.published += 1
        self.violations += [
            f"published before it was synced: {path} ({why}): {call.line}"
            for path, why in self.dirty.items()
            if _below(path, source)
        ]

    def _rename(self, call: Call, source: str, target: str) -> None:
        self._publish(call, source, target)
        exchanged = "RENAME_EXCHANGE" in call.arguments
        moved = {}
        for path, why in self.dirty.items():
            if _below(path, source):
                moved[target + path[len(source) :]] = why
            elif exchanged and _below(path, target):
                moved[source + path[len(target) :]] = why
            else:
                moved[path] = why
        self.dirty = moved
        self._touch_parent(source, call)
        self._touch_parent(target, call)

    def say_success(self) -> None:
        """Complain of what is not on disk now."""
        self.violations += [
            f"not on disk when success was said: {path} ({why})"
            for path, why in self.dirty.items()
            if not self._is_staged(path)
        ]


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")


def _paths(call: Call) -> list[str]:
    """Return the absolute paths that a call names, in order."""
    found = []
    text = call.arguments
    if call.name in ("symlink", "symlinkat"):  # the first string is a link's text
        text = text[_STRING.match(text).end() :].lstrip(", ") if _STRING.match(text) else text  # type: ignore[union-attr]
    if call.name in ("setxattr", "lsetxattr"):
        text = text.split('", ')[0] + '"'
    for descriptor, base, path in _AT.findall(text):
        if path.startswith("/"):
            found.append(_through_proc(path, call))
        elif descriptor and base:
            found.append(f"{base}/{path}" if path else base)
    return found


def _through_proc(path: str, _call: Call) -> str:
    return path


def check(trace: str, root: str) -> Checker:
    """Follow a whole trace."""
    checker = Checker(root)
    for call in calls(trace):
        checker.take(call)
    checker.say_success()
    return checker
