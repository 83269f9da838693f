"""setrlimit(2): soft and hard limits of the process that becomes the tenant."""

from __future__ import annotations

import resource

from isochamber.errors import IsochamberError


def core_socket() -> str | None:
    """Return the socket of the host that core dumps are sent to (Linux 6.16), None where there is none.

    It is asked whatever the limit is. A program that they are piped to is not: the limit of
    1 byte that tenants have keeps it from being started (core(5)), and the filter keeps the limit.
    """
    try:
        with open("/proc/sys/kernel/core_pattern", encoding="utf-8", errors="surrogateescape") as file:
            pattern = file.read().strip()
    except OSError:
        return None
    return pattern.lstrip("@").split(" ")[0] if pattern.startswith("@") else None


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
