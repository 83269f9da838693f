"""`run`: through the supervisor when one runs, else by the launcher itself. Lean: it is imported at every start."""

import os
import sys

from isochamber.errors import EXIT_INTERRUPTED, IsochamberError
from isochamber.launch import words as said


def argv(*words: str) -> list[str]:
    """Return the command that runs a tenant with the launcher's ``words``, isolated as the launcher is."""
    here = os.path.dirname(os.path.abspath(__file__))
    return [sys.executable, "-I", "-S", os.path.join(here, "__main__.py"), *words]


def take_over(words: list[str]) -> int:
    """Go on with what run.pl began: our end of the channel, the connection and the tenant's pidfd, then its words."""
    end, control, pidfd = (int(word) for word in words[:3])
    return main(words[3:], (end, control, pidfd))


def main(words: list[str], begun: tuple[int, int, int] | None = None) -> int:
    """Run one tenant in the foreground; returns its exit code, or ours with one line on stderr.

    ``begun`` is what :func:`take_over` was given: it is asked for already, and not asked for again.
    """
    said.open_missing_descriptors()
    try:
        options = said.Options(words)
        if options.verb == "run" and not options.shell:
            from isochamber.serve import remote  # noqa: PLC0415 - what the launcher alone does not need

            if begun is not None:
                code = remote.take_over(options.tenant, *begun)
            else:
                code = remote.run_tenant(options.root, options.tenant, options.command, no_terminal=options.no_terminal)
            if code is not None:
                return code
    except IsochamberError as error:
        for line in error.lines():
            said.say(line)
        return error.exit_code
    except KeyboardInterrupt:  # before the tenant was there to take it: the nursery ends it when we hang up
        return EXIT_INTERRUPTED
    from isochamber.launch import main as launcher  # noqa: PLC0415 - what a run through the supervisor does not need

    return launcher.main(words)
