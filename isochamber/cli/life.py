"""The verbs that start and end tenants through the supervisor: start, stop, restart, kill, pause, resume, wait."""

import argparse
from typing import Any

from isochamber.cli import common
from isochamber.errors import EXIT_BAD_INPUT, IsochamberError, printable


def _do(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    from isochamber.serve import client  # noqa: PLC0415

    everything = getattr(arguments, "all", False)
    if bool(arguments.tenant) == everything:
        raise IsochamberError("name tenants, or --all", stage=arguments.verb, exit_code=EXIT_BAD_INPUT)
    request = {"verb": arguments.verb, "tenants": arguments.tenant, "all": everything, **more}
    return client.ask(client.need(), request)


def _names(arguments: argparse.Namespace, **more: Any) -> int:
    answer = _do(arguments, **more)
    for name in answer["tenants"]:
        common.say(printable(name))
    return 0


def start(arguments: argparse.Namespace) -> int:
    """Start tenants in the background and return when their programs run."""
    terminal = arguments.tty or arguments.interactive
    code = _names(arguments, terminal=terminal)
    if arguments.attach or arguments.interactive:
        from isochamber.cli import enter  # noqa: PLC0415

        common.flush()
        return enter.attach_to(arguments.tenant[0])
    return code


def stop(arguments: argparse.Namespace) -> int:
    """Stop tenants: their signal, their grace, then SIGKILL; returns when nothing of them is left."""
    if not common.supervised():
        return _stop_alone(arguments)
    return _names(arguments, time=arguments.time)


def _stop_alone(arguments: argparse.Namespace) -> int:
    """Without a supervisor: what was started in the foreground, or outlived the supervisor, is found by its record."""
    from isochamber.build import registry  # noqa: PLC0415
    from isochamber.launch import stop as stopping  # noqa: PLC0415

    state = common.state_of(arguments)
    entries = registry.read(state)
    names = list(entries) if arguments.all else arguments.tenant
    for name in names:
        entry = registry.find(state, name)
        if entry is None:
            raise IsochamberError("is not configured", stage="stop", tenant=name, hint="isochamber ls")
        grace = entry["service"]["stop"]["grace"] if arguments.time is None else arguments.time
        if stopping.stop(entry["tid"], grace) and not arguments.all:
            common.say(printable(name))
    return 0


def restart(arguments: argparse.Namespace) -> int:
    """Stop tenants and start them again."""
    return _names(arguments, time=arguments.time)


def kill(arguments: argparse.Namespace) -> int:
    """Send a signal to the first process of tenants, SIGKILL by default."""
    return _names(arguments, signal=arguments.signal)


def pause(arguments: argparse.Namespace) -> int:
    """Freeze every process of tenants."""
    return _names(arguments)


def resume(arguments: argparse.Namespace) -> int:
    """Let paused tenants go on."""
    return _names(arguments)


def wait(arguments: argparse.Namespace) -> int:
    """Wait until tenants have ended (or are ready, ...) and print the exit code of each."""
    answer = _do(arguments, condition=arguments.condition)
    for code in answer["codes"]:
        common.say(str(code))
    return 0


def add(verbs: common.Verbs) -> None:
    """Add these verbs to the parser."""
    for function in (start, stop, restart, kill, pause, resume, wait):
        added = common.add_verb(verbs, function.__name__, function)
        added.add_argument("tenant", nargs="*", help="names or tids")
        if function is not wait:
            added.add_argument(
                "-a" if function is not start else "--all-tenants", "--all", action="store_true", help="every one"
            )
        if function is start:
            added.add_argument("-a", "--attach", action="store_true", help="show its output until it ends")
            added.add_argument("-i", "--interactive", action="store_true", help="attach its input too")
            added.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
        elif function in (stop, restart):
            added.add_argument("-t", "--time", type=int, metavar="SECONDS", help="grace, in place of its own")
        elif function is kill:
            added.add_argument("-s", "--signal", default="KILL", help="a name or a number")
        elif function is wait:
            words = ("stopped", "running", "ready", "healthy", "unhealthy", "warm", "restarting")
            added.add_argument("--condition", default="stopped", choices=words)
