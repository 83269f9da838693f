"""setrlimit(2): soft and hard limits of the process that becomes the tenant."""

from __future__ import annotations

import resource

from isochamber.errors import IsochamberError


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
