"""A virtual machine that a test boots, gives commands, and turns off as a power cut would."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

QEMU = "qemu-system-x86_64"
BOOT = 400.0  # seconds; a boot takes three on a quiet machine
_SHOWN = 4000  # characters of the console in a failure

Done = subprocess.CompletedProcess[str]


class MachineError(Exception):
    """The machine did not do what it was told in time, or is gone; the message ends with what its console said."""


@dataclass(frozen=True)
class Parts:
    """What a machine is made of: files that many machines can share, none of them written to."""

    image: Path
    initrd: Path
    root: Path


@dataclass(frozen=True)
class Saved:
    """A machine that was stopped while it waited, from which others go on (see :mod:`tests.vm.warm`)."""

    memory: Path
    root: Path  # its root disk, with what it had written there


@dataclass
class Machine:
    """One virtual machine. As a context manager it boots, and is turned off at the end.

    ``data`` is a disk image that keeps what is written to it; everything else is
    forgotten when the machine is turned off. Killing the emulator is a power cut:
    what the guest had not flushed to its disks is gone.
    """

    parts: Parts
    directory: Path
    data: Path | None = None
    data_options: str = "rw,noatime"
    write_log: Path | None = None  # the data disk's writes and flushes, in dm-log-writes' format
    memory: str = "2G"
    cpus: int = 2
    command_line: str = ""
    saved: Saved | None = None  # it does not boot, but goes on from there
    more: tuple[str, ...] = ()  # more words for the emulator
    keeps_root: bool = False  # what is written to the root disk is kept: the image has to be its own
    boots: int = 0
    was_cut: bool = False
    _process: "subprocess.Popen[bytes] | None" = None
    _channel: socket.socket | None = None
    _buffer: bytearray = field(default_factory=bytearray)

    @property
    def console(self) -> str:
        """What the guest's kernel and PID 1 said since the last boot."""
        path = self.directory / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()

    def _argv(self, channel: int) -> list[str]:
        kernel_words = (
            # No check of the timer: an emulator that gets no processor time for a moment would fail it, and panic.
            "console=ttyS0 panic=-1 quiet no_timer_check cgroup_no_v1=all random.trust_cpu=on mitigations=off "
            f"isochamber.data={self.data_options} {self.command_line}"
        )
        return [
            "setpriv", "--pdeathsig", "KILL", "--",  # a test run that is killed leaves no machine behind
            QEMU, "-accel", "tcg,thread=multi", "-cpu", "Nehalem,+rdrand", "-smp", str(self.cpus), "-m", self.memory,
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-kernel", str(self.parts.image), "-initrd", str(self.parts.initrd), "-append", kernel_words,
            "-serial", f"file:{self.directory}/console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,fd={channel}",
            "-device", "virtserialport,chardev=agent,name=isochamber.agent",
            "-drive", f"if=none,id=root,cache=unsafe,{self._root()}",
            "-device", "virtio-blk-pci,drive=root",
            *self._data_words(),
            *([] if self.saved is None else ["-incoming", f"exec:cat {self.saved.memory}"]),
            *self.more,
        ]  # fmt: skip

    def _root(self) -> str:
        image = self.parts.root if self.saved is None else self.saved.root
        return f"format=raw,snapshot={'off' if self.keeps_root else 'on'},file={image}"

    def _data_words(self) -> list[str]:
        if self.data is None:
            return []
        disk = f"driver=raw,node-name=data,file.driver=file,file.filename={self.data}"
        words = ["-blockdev", disk, "-device", "virtio-blk-pci,drive=" + ("logged" if self.write_log else "data")]
        if self.write_log is not None:
            log = f"driver=raw,node-name=log,file.driver=file,file.filename={self.write_log}"
            words[2:2] = ["-blockdev", log, "-blockdev", "driver=blklogwrites,node-name=logged,file=data,log=log"]
        return words

    def boot(self, deadline: float = BOOT) -> None:
        """Turn it on, and wait until it takes commands; raises MachineError. A saved one waits for :meth:`say`."""
        assert self._process is None, "it is on"
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "console").write_bytes(b"")
        self._buffer.clear()
        self._channel, theirs = socket.socketpair()
        with theirs, (self.directory / "qemu").open("wb") as said:
            self._process = subprocess.Popen(
                self._argv(theirs.fileno()), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=said,
                stderr=said, env={**os.environ, "TMPDIR": str(self.directory)}, start_new_session=True,
            )  # fmt: skip
        self.boots += 1
        self.was_cut = False
        if self.saved is not None:
            return
        try:
            message = self._message(time.monotonic() + deadline)
        except MachineError:
            self.kill()
            raise
        assert "ready" in message, message

    def cut(self) -> None:
        """Cut the power; what the guest had written to its port until then can still be read. Fine when it is off."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
            self.was_cut = True

    def kill(self) -> None:
        """Cut the power and forget the rest; nothing is said to the guest."""
        self.cut()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def reboot(self) -> None:
        """Shut down in order (synced, mounts read-only) and boot again."""
        self.check("sh", "-c", "sync; echo s > /proc/sysrq-trigger; echo u > /proc/sysrq-trigger; sync")
        self.kill()
        self.boot()

    def shut_down(self, *argv: str, deadline: float = BOOT) -> None:
        """Run what makes the guest's own init turn it off, and wait until it is off; raises MachineError."""
        assert self._process is not None, "it is off"
        self.say({"argv": list(argv), "env": {}, "cwd": "/", "direct": False})
        try:
            self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise MachineError(self._failure(f"is still on {deadline} seconds after {argv}")) from None
        finally:
            self.kill()

    def run(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        timeout: float = 120,
        log: Path | None = None,
    ) -> Done:
        """Run a command inside to its end; raises MachineError when it takes longer than ``timeout`` seconds.

        What it writes is in the file ``log`` as soon as it came.
        """
        texts: dict[str, list[str]] = {"out": [], "err": []}
        status = None
        with contextlib.nullcontext() if log is None else log.open("w", buffering=1) as written:
            for kind, value in self.stream(*argv, env=env, cwd=cwd, timeout=timeout, said=texts):
                if kind == "status":
                    status = int(value)
                elif written is not None:
                    written.write(value)
                    written.flush()
        assert status is not None
        return subprocess.CompletedProcess(argv, status, "".join(texts["out"]), "".join(texts["err"]))

    def check(self, *argv: str, **options: Any) -> str:
        """Run a command inside that must succeed, and return what it wrote."""
        done = self.run(*argv, **options)
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def stream(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        timeout: float,
        said: dict[str, list[str]] | None = None,
        direct: bool = False,
    ) -> Iterator[tuple[str, str]]:
        """Yield ("out" or "err", text) as the command writes, then ("status", number); raises MachineError.

        With ``direct`` the command's standard output is the port itself: it writes the agent's messages, and each
        has arrived when its write returns.
        """
        texts = {"out": [], "err": []} if said is None else said
        deadline = time.monotonic() + timeout
        self.say({"argv": list(argv), "env": dict(env or {}), "cwd": cwd, "direct": direct})
        try:
            yield from self.follow(deadline, texts)
        except MachineError as error:
            wrote = "".join(texts["out"] + texts["err"])[-_SHOWN:]
            raise MachineError(f"{error}\nwhile it ran {argv}, which had written:\n{wrote}") from None

    def say(self, message: dict[str, Any]) -> None:
        """Send one message to who reads the port inside; raises MachineError."""
        self._send(json.dumps(message).encode() + b"\n")

    def follow(self, deadline: float, texts: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
        """Yield what a command that runs writes, as :meth:`stream` does; raises MachineError."""
        while True:
            message = self._message(deadline)
            for kind in ("out", "err"):
                if kind in message:
                    text = str(message[kind]).encode("latin-1").decode(errors="replace")
                    texts[kind].append(text)
                    yield kind, text
            if "status" in message:
                yield "status", str(message["status"])
                return

    def _send(self, data: bytes) -> None:
        assert self._channel is not None, "it is off"
        try:
            self._channel.sendall(data)
        except OSError as error:
            raise MachineError(self._failure(f"takes no command: {error}")) from error

    def _message(self, deadline: float) -> dict[str, Any]:
        """Return the agent's next message."""
        assert self._channel is not None, "it is off"
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._channel], [], [], left)[0]:
                raise MachineError(self._failure("said nothing until the deadline"))
            try:
                data = self._channel.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise MachineError(self._failure("is gone"))
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        message: dict[str, Any] = json.loads(line)
        return message

    def _failure(self, what: str) -> str:
        said = (self.directory / "qemu").read_text(errors="replace")
        return f"the machine {what}; its emulator said: {said!r}; its console:\n{self.console[-_SHOWN:]}"
