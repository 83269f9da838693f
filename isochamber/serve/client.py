"""Talking to the supervisor: as lean as the launcher, since `isochamber run` begins here."""

import _socket

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.launch import channel
from isochamber.serve.dump import dump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

VERSION = 1  # of the protocol
OTHER_ROOT = "other state directory"  # the stage of the error of a supervisor that looks after another one


def connect() -> _socket.socket | None:
    """Return a connection to the supervisor, None when there is none; raises IsochamberError when it is not for us."""
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        end.connect(paths.control_socket())
    except PermissionError as error:
        end.close()
        raise IsochamberError.from_os(
            error, stage="serve", path=paths.control_socket(), hint="be root, or join the supervisor's group"
        ) from error
    except OSError:
        end.close()
        return None
    return end


def need() -> _socket.socket:
    """Return a connection to the supervisor; raises IsochamberError when there is none."""
    end = connect()
    if end is None:
        raise IsochamberError(
            "no supervisor runs", stage="serve", path=paths.control_socket(), hint="start it: isochamber serve"
        )
    return end


def ask(end: _socket.socket, request: "dict[str, Any]", descriptors: tuple[int, ...] = ()) -> "dict[str, Any]":
    """Send a request and return its last answer; raises IsochamberError."""
    *_, last = stream(end, request, descriptors)
    return last


def stream(
    end: _socket.socket, request: "dict[str, Any]", descriptors: tuple[int, ...] = ()
) -> "Iterator[dict[str, Any]]":
    """Send a request and yield its answers, the last of them with "ok"; raises IsochamberError."""
    tell(end, request, descriptors)
    yield from answers(end)


def tell(end: _socket.socket, request: "dict[str, Any]", descriptors: tuple[int, ...] = ()) -> None:
    """Send a request; raises IsochamberError."""
    line = (dump({"version": VERSION, **request}) + "\n").encode()
    try:
        sent = end.sendmsg([line], channel.rights(descriptors), _socket.MSG_NOSIGNAL)
        while sent < len(line):
            sent += end.send(line[sent:], _socket.MSG_NOSIGNAL)
    except OSError as error:
        raise _hung_up(error) from error


def _hung_up(error: OSError) -> IsochamberError:
    return IsochamberError.from_os(error, stage="serve", hint="does the supervisor still run?")


def answers(end: _socket.socket) -> "Iterator[dict[str, Any]]":
    """Yield the answers to what was asked, the last of them with "ok"; raises IsochamberError."""
    from isochamber.launch import lean  # noqa: PLC0415 - a run needs no answer but a refusal

    rest = b""
    try:
        while True:
            data = end.recv(65536)
            if not data:
                raise IsochamberError("the supervisor has hung up", stage="serve", hint="does it still run?")
            *lines, rest = (rest + data).split(b"\n")
            for found in lines:
                answer = lean.parse(found)
                if not isinstance(answer, dict):
                    raise IsochamberError("the supervisor speaks something else", stage="serve")
                if "error" in answer:
                    raise _error(answer["error"])
                yield answer
                if "ok" in answer:
                    return
    except OSError as error:
        raise _hung_up(error) from error


def _error(told: "dict[str, Any]") -> IsochamberError:
    return IsochamberError(
        told["what"], stage=told["stage"], tenant=told["tenant"], path=told["path"], errno=told["errno"],
        hint=told["hint"], exit_code=told["exit_code"],
    )  # fmt: skip
