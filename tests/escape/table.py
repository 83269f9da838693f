"""Every attempt there is."""

from tests.escape import exhaustion, filesystem, installs, kernel, packages
from tests.escape.attempts import Attempt

ATTEMPTS: list[Attempt] = [
    *kernel.attempts(), *filesystem.attempts(), *exhaustion.attempts(), *packages.attempts(), *installs.attempts(),
]  # fmt: skip
