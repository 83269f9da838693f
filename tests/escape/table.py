"""Every attempt there is."""

from tests.escape import exhaustion, filesystem, hosts_files, installs, kernel, learned, packages, resources
from tests.escape.attempts import Attempt

ATTEMPTS: list[Attempt] = [
    *kernel.attempts(), *filesystem.attempts(), *exhaustion.attempts(), *packages.attempts(), *installs.attempts(),
    *resources.attempts(), *learned.attempts(), *hosts_files.attempts(),
]  # fmt: skip
