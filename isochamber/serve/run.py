"""`run`: through the supervisor when one runs, else by the launcher itself. Lean: it is imported at every start."""

from __future__ import annotations

import os
import sys

from isochamber.errors import IsochamberError
from isochamber.launch import main as launcher


def argv(*words: str) -> list[str]:
    """Return the command that runs a tenant with the launcher's ``words``, isolated as the launcher is."""
    here = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, "-I", "-S", os.path.join(here, "__main__.py"), *words]


def main(words: list[str]) -> int:
    """Run one tenant in the foreground; returns its exit code, or ours with one line on stderr."""
    launcher.open_missing_descriptors()
    try:
        options = launcher.Options(words)
        if options.verb == "run" and not options.shell:
            from isochamber.serve import remote  # noqa: PLC0415 - what the launcher alone does not need

            code = remote.run_tenant(options.root, options.tenant, options.command, no_terminal=options.no_terminal)
            if code is not None:
                return code
    except IsochamberError as error:
        for line in error.lines():
            launcher.say(line)
        return error.exit_code
    return launcher.main(words)
