"""Stopping a tenant from outside: ask, wait, then kill; returns when nothing of it is left."""

from __future__ import annotations

import os
import select

from isochamber.launch import records
from isochamber.launch.lean import signal

_A_MOMENT = 0.005  # seconds


def stop(tid: str, grace_seconds: float = 0.0) -> bool:
    """Stop the tenant ``tid``; returns whether it ran. No-op when it does not run.

    SIGTERM first when ``grace_seconds`` is positive, SIGKILL to its PID 1 when the
    grace is over: the kernel then kills the rest of its PID namespace
    (pid_namespaces(7)). The keeper cleans up and ends after it, and that is waited
    for: a tenant that somebody starts again at once is not stopped a second time.
    """
    ran = False
    while record := records.settled(tid):
        ran = True
        try:
            keeper = os.pidfd_open(record.keeper)
        except ProcessLookupError:
            continue
        try:
            if records.alive(record):  # so its keeper is too, and the number is still the keeper's
                _end(record, grace_seconds)
                if record.shared:
                    _wait_for_record(tid, record)
                else:
                    _wait(keeper)
                break
        finally:
            os.close(keeper)
    return ran


def _end(record: records.Record, grace_seconds: float) -> None:
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if not records.alive(record):
            return  # the number was given to another process in between
        if grace_seconds > 0:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            _wait(pidfd, grace_seconds)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended
    finally:
        os.close(pidfd)


def _wait_for_record(tid: str, record: records.Record) -> None:
    """Return when a keeper of many has cleaned up after this tenant: nothing says when, but it takes milliseconds."""
    while records.held(tid):
        now = records.read(tid)
        if now is not None and now.start_time != record.start_time:
            break  # started again already
        select.select([], [], [], _A_MOMENT)


def _wait(pidfd: int, seconds: float | None = None) -> None:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll(None if seconds is None else seconds * 1000)
