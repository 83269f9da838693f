"""containers.json as the supervisor reads it: the whole file once a version, looked up by name or tid."""

from __future__ import annotations

import json
import os
from typing import Any

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch.entry import VERSION, Entry

Raw = dict[str, Any]


class Containers:
    """The entries, read again when the file was replaced."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.path = f"{root}/{paths.CONTAINERS}"
        self._identity: tuple[int, ...] | None = None
        self._by_tid: dict[str, Raw] = {}
        self._by_name: dict[str, Raw] = {}
        self._texts: dict[str, bytes] = {}
        self._problem: str | None = None

    def refresh(self) -> bool:
        """Read the file if it is another one than last time; returns whether it was. A damaged one leaves no entry."""
        try:
            status = os.stat(self.path)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError:
            identity = None
        if identity == self._identity and identity is not None:
            return False
        former, self._identity = self._identity, identity
        self._by_tid, self._by_name, self._texts, self._problem = {}, {}, {}, None
        if identity is not None:
            try:
                with open(self.path, "rb") as file:
                    entries = json.loads(file.read())
                good = [entry for entry in entries if isinstance(entry, dict) and entry.get("version") == VERSION]
                self._by_tid = {entry["tid"]: entry for entry in good}
                self._by_name = {entry["name"]: entry for entry in good}
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                self._problem = f"{type(error).__name__}: {error}"
        return identity != former

    def all(self) -> list[Raw]:
        """Return every entry, by name."""
        self.refresh()
        return sorted(self._by_tid.values(), key=lambda entry: str(entry["name"]))

    def by_tid(self) -> dict[str, Raw]:
        """Return every entry, for who looks at many: the file is asked for once. Not to be changed."""
        self.refresh()
        return self._by_tid

    def find(self, tenant: str) -> Raw | None:
        """Return the entry of a name or tid, or None."""
        self.refresh()
        return self._by_tid.get(tenant) or self._by_name.get(tenant)

    def need(self, tenant: str) -> Raw:
        """Return the entry of a name or tid; raises IsochamberError."""
        entry = self.find(tenant)
        if entry is None:
            if self._problem:
                raise IsochamberError(f"is damaged: {self._problem}", stage="entry", path=self.path)
            raise IsochamberError(
                "is not configured", stage="entry", tenant=tenant, path=self.path, hint=f"./doit configure:{tenant}"
            )
        return entry

    def text_of(self, raw: Raw) -> bytes:
        """Return an entry as JSON on one line: made once a version of the file, for it is asked for at every start."""
        tid = raw["tid"]
        if self._by_tid.get(tid) is not raw:
            return json.dumps(raw).encode()  # the file was replaced meanwhile
        text = self._texts.get(tid)
        if text is None:
            text = self._texts[tid] = json.dumps(raw).encode()
        return text

    def checked(self, tenant: str) -> tuple[Raw, Entry]:
        """Return an entry as it stands and as the launcher reads it; raises IsochamberError."""
        raw = self.need(tenant)
        return raw, Entry(raw)


def service(raw: Raw) -> dict[str, Any]:
    """Return the part of an entry that is for the supervisor; an entry without one is not supervised."""
    found = raw.get("service")
    return found if isinstance(found, dict) else {}


def counts_refusals(raw: Raw | None) -> bool:
    """Say whether we hear of the calls that a tenant's learned list refuses: in two stages the kernel alone does."""
    seccomp = raw.get("seccomp") if raw is not None else None
    return not isinstance(seccomp, dict) or seccomp.get("mode") not in ("log", "errno")


def has_network(raw: Raw | None) -> bool:
    """Say whether a tenant has a network whose bytes can be counted."""
    return raw is None or raw.get("network") != "none"
