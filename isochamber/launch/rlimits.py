"""setrlimit(2): soft and hard limits of the process that becomes the tenant."""

from __future__ import annotations

import resource

from isochamber.errors import IsochamberError


def core_handler() -> str | None:
    """Return the program of the host that core dumps are piped to, None where they go to files.

    A limit of 1 byte, which tenants have, keeps it from being started, and one of 0 does not
    (core(5)). So who means to lowers it, and the host's root reads what the tenant wrote.
    """
    try:
        with open("/proc/sys/kernel/core_pattern", encoding="utf-8", errors="surrogateescape") as file:
            pattern = file.read().strip()
    except OSError:
        return None
    return pattern[1:].split(" ")[0] if pattern.startswith("|") else None


def apply(limits: dict[str, int]) -> None:
    """Set each ``RLIMIT_<name>``, soft and hard alike; raises IsochamberError for an unknown name, OSError."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            raise IsochamberError(f"there is no resource limit {name}", stage="launch", hint="see setrlimit(2)")
        try:
            resource.setrlimit(number, (value, value))
        except ValueError as error:
            raise IsochamberError(f"the limit {name} of {value} is refused: {error}", stage="launch") from error
