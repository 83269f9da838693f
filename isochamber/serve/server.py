"""The supervisor's socket: who may connect, one JSON object a line, descriptors beside it (reference/protocol.md)."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from isochamber import paths
from isochamber.errors import IsochamberError
from isochamber.serve import api, link, wire
from isochamber.serve.supervisor import Supervisor

VERSION = 1  # of the protocol with clients
_LONGEST = 1 << 20  # bytes a request
_PATIENCE = 5.0  # seconds for who is going to be refused
_SO_PEERGROUPS = 59  # unix(7)


class Server:
    """The listening socket, and a task a connection."""

    def __init__(self, supervisor: Supervisor, listener: socket.socket, group: int | None) -> None:
        self._supervisor, self._listener, self._group = supervisor, listener, group
        self._connections: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except OSError:
            return
        end.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._serve(Connection(end)))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: Connection) -> None:
        try:
            if not may_connect(connection.end, self._group):
                refused = IsochamberError(
                    "you may not talk to the supervisor", stage="serve", hint="be root, or join its group"
                )
                async with asyncio.timeout(_PATIENCE):
                    await connection.request()  # else it would write to a closed socket, and not hear why
                await connection.answer({"error": link.told(refused)})
                return
            while (request := await connection.request()) is not None:
                await self._do(connection, request)
        except (OSError, ValueError):
            pass  # it hung up, or speaks something else
        finally:
            connection.close()

    async def _do(self, connection: Connection, request: dict[str, Any]) -> None:
        descriptors = connection.take_descriptors()
        try:
            with connection.cancelled_when_gone():
                await self._answer(connection, request, descriptors)
        finally:
            wire.close_all(descriptors)

    async def _answer(self, connection: Connection, request: dict[str, Any], descriptors: list[int]) -> None:
        try:
            if request.get("version") != VERSION:
                raise IsochamberError(
                    f"speaks version {VERSION} of its protocol, not {request.get('version')}", stage="serve",
                    hint="restart the supervisor or use its own isochamber command", exit_code=2,
                )  # fmt: skip
            async for item in api.do(self._supervisor, request, descriptors):
                await connection.answer(item)
        except IsochamberError as error:
            await connection.answer({"error": link.told(error)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wrong = IsochamberError(f"bad request: {type(error).__name__}: {error}", stage="serve", exit_code=2)
            await connection.answer({"error": link.told(wrong)})
        except TimeoutError:
            await connection.answer({"error": link.told(IsochamberError("took too long", stage="serve"))})

    def close(self) -> None:
        """Stop listening and hang up."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        for task in tuple(self._connections):
            task.cancel()


class Connection:
    """One client: lines with descriptors in, lines out."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._descriptors: list[int] = []
        self._eof = False
        self._watched = False
        self._waiter: asyncio.Future[None] | None = None  # of a request that is not there yet
        self._working: asyncio.Task[Any] | None = None  # what ends when the client hangs up

    async def request(self) -> dict[str, Any] | None:
        """Return the next request, None when the client has hung up; raises ValueError for what is no JSON object."""
        self._take()  # whoever connects has asked, as a rule
        while b"\n" not in self._buffer:
            if self._is_over:
                return None
            self._watch()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        line, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("a request is a JSON object")
        return found

    @property
    def _is_over(self) -> bool:
        return self._eof or len(self._buffer) > _LONGEST

    def _watch(self) -> None:
        if not self._watched and not self._is_over:
            self._watched = True
            self._loop.add_reader(self.end.fileno(), self._readable)

    def _readable(self) -> None:
        self._take()
        if self._is_over:
            self._loop.remove_reader(self.end.fileno())
            self._watched = False
            if self._working is not None:
                self._working.cancel()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> None:
        """Take what is there to read."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.end, 65536, wire.MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        self._buffer += data
        self._eof = not data

    @contextlib.contextmanager
    def cancelled_when_gone(self) -> Iterator[None]:
        """Cancel the current task when the client hangs up within the block; what it sends meanwhile waits."""
        self._watch()
        self._working = asyncio.current_task()
        try:
            yield
        finally:
            self._working = None

    async def answer(self, item: dict[str, Any]) -> None:
        """Send one line, and wait for a client that is slow to read: only its own answer waits. Raises OSError."""
        data = memoryview(json.dumps(item, ensure_ascii=True).encode() + b"\n")
        while data:
            try:
                data = data[self.end.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await self._until_writable()

    async def _until_writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        number = self.end.fileno()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        self._loop.add_writer(number, wake)
        try:
            await ready
        finally:
            self._loop.remove_writer(number)

    def take_descriptors(self) -> list[int]:
        """Return the descriptors that came so far: whoever takes them closes them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        """Hang up."""
        if self._watched:
            self._loop.remove_reader(self.end.fileno())
        wire.close_all(self._descriptors)
        self.end.close()


def may_connect(end: socket.socket, group: int | None) -> bool:
    """Say whether the peer is root or in ``group`` (SO_PEERCRED, SO_PEERGROUPS: as it was when it connected)."""
    _, uid, gid = struct.unpack("=iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid == 0 or (group is not None and gid == group):
        return True
    if group is None:
        return False
    try:
        found = end.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        return False  # ERANGE: in more than 256 groups, and not by its first
    return group in struct.unpack(f"={len(found) // 4}I", found)


def group_number(name: str | None) -> int | None:
    """Return the gid of a group's name or number; raises IsochamberError."""
    if name is None:
        return None
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise IsochamberError(
            f"there is no group {name}", stage="serve", hint=f"groupadd {name}", exit_code=2
        ) from None


def listen(group: int | None) -> socket.socket:
    """Return the listening socket at its path; raises OSError. The caller holds the supervisors' lock."""
    path = paths.control_socket()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(path)
    os.chmod(path, 0o600 if group is None else 0o660)
    if group is not None:
        os.chown(path, 0, group)
        os.chmod(paths.run_directory(), 0o711)  # noqa: S103 - so that the group gets to the socket; what else is in it is root's
    listener.listen(512)
    return listener
