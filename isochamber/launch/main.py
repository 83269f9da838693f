"""The launcher's own command line, for the build half and the command line above it.

    run  --root ROOT [--shell] [--no-terminal] TENANT [-- COMMAND ...]
    plan --root ROOT --fd N [--no-terminal]
    learn --root ROOT --fd N [--no-terminal]

A plan is an entry that lies in no file; learn runs one as ``run`` would, with its terminal.

TENANT is a name or a tid. Options stand before or after it; COMMAND begins at the
first word after TENANT that is no option, or after ``--``. Kept by hand and not by
argparse: it is imported at every start.
"""

from __future__ import annotations

import os

from isochamber.errors import EXIT_INTERRUPTED, EXIT_SIGNAL_BASE, IsochamberError
from isochamber.launch import capabilities, entry, foreground, running, start, syscalls
from isochamber.launch.constants import SIGSYS
from isochamber.launch.lean import signal
from isochamber.launch.words import Options, on_a_terminal, open_missing_descriptors, say

# A login shell: the base may be without bash, and a plan without a base is none.
_SHELL = ["/bin/sh", "-c", "if [ -x /bin/bash ]; then exec /bin/bash -l; fi; exec /bin/sh -l"]


def _entry(options: Options) -> entry.Entry:
    if options.verb == "plan":
        # A build that is killed takes its sandbox along.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        return entry.read_plan(options.fd)
    if options.verb == "learn":
        return entry.read_plan(options.fd)
    wanted = entry.read(options.root, options.tenant)
    if options.shell:
        # The original's configuration mode: the host's network, an administrator's rights over the tenant's own files.
        wanted.network = "host"
        wanted.read_only = False
        wanted.uid = wanted.gid = 0
        wanted.capabilities = list(capabilities.INSTALL)
        wanted.argv = _SHELL
        wanted.seccomp.forget_learned()
    if options.command:
        wanted.argv = options.command
    return wanted


def _launch(options: Options) -> int:
    wanted = _entry(options)
    try:
        return _run(options, wanted)
    except IsochamberError as error:
        error.tenant = wanted.name  # what failed may know files and namespaces only
        raise
    except OSError as error:
        raise IsochamberError.from_os(error, stage="launch", tenant=wanted.name) from error


def _run(options: Options, wanted: entry.Entry) -> int:
    own_terminal = options.verb != "plan" and not options.no_terminal and on_a_terminal()
    if "TERM" in os.environ and os.isatty(0):
        wanted.env["TERM"] = os.environ["TERM"]
    prepared = start.Prepared(options.root, wanted, own_terminal=own_terminal, listens=True)
    tenant = running.Running(prepared)
    os.close(prepared.lock)  # the keeper holds it from here on: it is free when the keeper has cleaned up
    shown = foreground.Foreground(tenant)
    if wanted.seccomp.mode != "none":
        from isochamber.launch import enforcement  # noqa: PLC0415 - most tenants have no learned filter

        shown.enforcement = enforcement.Enforcement(tenant, options.root, wanted, shown.say)
    code = shown.supervise(wanted.timeout)
    if wanted.seccomp.mode == "none" and code == EXIT_SIGNAL_BASE + SIGSYS:
        from isochamber.launch import refusals  # noqa: PLC0415 - as rare

        shown.say(refusals.death(wanted.name, wanted.seccomp.mode))
    if tenant.failure is not None:
        raise tenant.failure
    return code


def main(words: list[str]) -> int:
    """Run one tenant in the foreground; returns its exit code, or ours with one line on stderr."""
    open_missing_descriptors()
    try:
        return _launch(Options(words))
    except IsochamberError as error:
        for line in error.lines():
            say(line)
        return error.exit_code
    except OSError as error:
        ours = IsochamberError.from_os(error, stage="launch")
        say(ours.line())
        return ours.exit_code
    except KeyboardInterrupt:  # before the tenant was there to take it; what there was of it ends with us
        return EXIT_INTERRUPTED
