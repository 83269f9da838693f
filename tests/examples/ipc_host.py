"""The host's side of the IPC tests: a service in /tmp/tenant_ipc, in a mount namespace with a /tmp of its own.

python -m tests.examples.ipc_host SCENARIO ROOT, started by test_ipc.py through unshare(1);
prints what happened as JSON. The namespace is a host of its own as far as mounts go, so that
the real path can be used and nothing of it is left on the machine.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from isochamber import paths

IPC = Path(paths.DEFAULT_IPC)
SECONDS = 60


def _isochamber(root: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "isochamber", "--root", root, *words]


def _mounts() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def nng(root: str) -> dict[str, object]:
    """Answer three questions of the tenant ``asker``."""
    import pynng

    heard = []
    with pynng.Rep0(
        listen=f"ipc://{IPC}/nng.sock", recv_timeout=SECONDS * 1000, send_timeout=SECONDS * 1000
    ) as replier:
        (IPC / "nng.sock").chmod(0o666)  # where the file system has no id-mapped mounts
        with subprocess.Popen(_isochamber(root, "run", "asker"), stdout=subprocess.PIPE, text=True) as tenant:
            try:
                for _ in range(3):
                    heard.append(replier.recv().decode())
                    replier.send(f"answer to {heard[-1]}".encode())
                out, _ = tenant.communicate(timeout=SECONDS)
                there = _names()
            finally:
                tenant.kill()
    return {"heard": heard, "out": out.splitlines(), "status": tenant.returncode, "there": there}


def _names() -> list[str]:
    return sorted(path.name for path in IPC.iterdir())


class Inside:
    """A tenant's shell that does what it is told, a line at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._in, self._out = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

    def __call__(self, command: str) -> tuple[int, str]:
        """Return a command's status and what it printed."""
        self._in.write(f"{command}\n")
        self._in.flush()
        said: list[str] = []
        while not (line := self._out.readline()).startswith("end "):
            if not line:
                raise RuntimeError(f"the tenant ended in {command!r} after {said}")
            said.append(line)
        return int(line.split()[1]), "".join(said).rstrip("\n")


@contextlib.contextmanager
def _inside(root: str) -> Iterator[Inside]:
    loop = 'while read -r line; do sh -c "$line" 2>&1 </dev/null; status=$?; echo; echo "end $status"; done'
    words = _isochamber(root, "run", "shell", "/bin/sh", "-c", loop)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Inside(process)
        except BaseException:
            process.kill()
            raise
        finally:
            cast(IO[str], process.stdin).close()
            process.wait(SECONDS)


def _pid_of_tenant(root: str) -> int:
    shown = subprocess.run(
        _isochamber(root, "show", "--json", "shell"), capture_output=True, text=True, check=True, timeout=SECONDS
    )
    record = Path(paths.tenant_record(json.loads(shown.stdout)["tid"]))
    return int(json.loads(record.read_text())["pid"])


def later(root: str) -> dict[str, object]:
    """Make a file and a mount while the tenant runs, and mount in its namespace as root of the host would."""
    found: dict[str, object] = {}
    (IPC / "mnt").mkdir()
    (IPC / "sub").mkdir()
    with _inside(root) as inside:
        found["before"] = inside(f"ls {IPC}")
        (IPC / "later").write_text("a file made later")
        found["file"] = inside(f"cat {IPC}/later")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", IPC / "mnt"], check=True)
        (IPC / "mnt/below").write_text("a mount made later")
        found["mount"] = inside(f"cat {IPC}/mnt/below")
        found["write"] = inside(f"echo x > {IPC}/mnt/new")[0]
        (IPC / "mnt").chmod(0o1777)  # it comes with the host's own options: what others may write, the tenant may
        found["write where all may"] = inside(f"echo x > {IPC}/mnt/new")[0]
        subprocess.run(["umount", IPC / "mnt"], check=True)
        found["unmounted"] = inside(f"ls {IPC}/mnt")
        (IPC / "later").unlink()
        found["removed"] = inside(f"ls {IPC}")
        found["mountinfo"] = inside(f"grep ' {IPC} ' /proc/self/mountinfo")[1]
        before = _mounts()
        enter = ["nsenter", "-t", str(_pid_of_tenant(root)), "-m", "--"]
        subprocess.run([*enter, "/bin/mount", "-t", "tmpfs", "back", str(IPC / "sub")], check=True)
        found["mounted inside"] = inside(f"grep -c ' {IPC}/sub ' /proc/self/mountinfo")[1]
        found["propagated back"] = [target for target in _mounts() if target not in before]
        # The control: a namespace that is still a peer, as the tenant's would be without our steps.
        peer = ["unshare", "--mount", "--propagation", "unchanged", "mount", "-t", "tmpfs", "back", str(IPC / "sub")]
        subprocess.run(peer, check=True)
        found["a peer propagates"] = [target for target in _mounts() if target not in before]
        subprocess.run(["umount", IPC / "sub"], check=True)
    return found


REFUSED = {
    "create": "touch {ipc}/new",
    "mkdir": "mkdir {ipc}/new",
    "mkfifo": "mkfifo {ipc}/new",
    "symlink": "ln -s /etc {ipc}/new",
    "hard link": "ln {ipc}/file {ipc}/new",
    "socket": "perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => \"{ipc}/new\", Listen => 1) or exit 1'",
    "unlink": "rm -f {ipc}/file",
    "rmdir": "rmdir {ipc}/empty",
    "rename": "mv {ipc}/file {ipc}/other",
    "rename the socket": "mv {ipc}/service.sock {ipc}/other",
    "chmod": "chmod 777 {ipc}/file",
    "chmod the directory": "chmod 777 {ipc}",
    "chown": "chown 0:0 {ipc}/file",
    "touch": "touch {ipc}/file",
    "write": "echo x > {ipc}/file",
    "append": "echo x >> {ipc}/file",
    "run": "{ipc}/program",
}


def speak(root: str) -> dict[str, object]:
    """Speak over a FIFO each way and over a socket both ways; then let the tenant try to change the directory."""
    (IPC / "file").write_text("the host's")
    (IPC / "file").chmod(0o666)
    (IPC / "program").write_text("#!/bin/sh\n")
    (IPC / "program").chmod(0o777)
    (IPC / "empty").mkdir()
    for name in ("to-tenant", "to-host"):
        os.mkfifo(IPC / name)
        (IPC / name).chmod(0o666)
    found: dict[str, object] = {}
    with _inside(root) as inside, socket.socket(socket.AF_UNIX) as service:
        service.bind(str(IPC / "service.sock"))
        (IPC / "service.sock").chmod(0o666)
        service.listen()
        service.settimeout(SECONDS)
        writer = threading.Thread(target=(IPC / "to-tenant").write_text, args=("over a FIFO\n",), daemon=True)
        writer.start()
        found["fifo in"] = inside(f"cat {IPC}/to-tenant")
        heard: list[str] = []
        reader = threading.Thread(target=lambda: heard.append((IPC / "to-host").read_text()), daemon=True)
        reader.start()
        inside(f"echo back over a FIFO > {IPC}/to-host")
        reader.join(SECONDS)
        found["fifo out"] = heard
        found["socket"] = _over_the_socket(inside, service)
        before = _tree()
        found["refused"] = {what: inside(text.format(ipc=IPC))[0] != 0 for what, text in REFUSED.items()}
        found["unchanged"] = _tree() == before
    return found


def _over_the_socket(inside: Inside, service: socket.socket) -> list[str]:
    said: list[str] = []

    def answer() -> None:
        connection, _ = service.accept()
        with connection:
            connection.settimeout(SECONDS)
            said.append(connection.recv(100).decode().strip())
            connection.sendall(b"heard you\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    connect = f'$s = IO::Socket::UNIX->new(Peer => "{IPC}/service.sock") or die "$!"'
    client = f"perl -MIO::Socket::UNIX -e '{connect}; print $s \"hello\\n\"; $s->flush; print <$s>'"
    said.append(inside(client)[1])
    thread.join(SECONDS)
    return sorted(said)


def _tree() -> list[tuple[str, int, int, int, int]]:
    return sorted((str(p), s.st_mode, s.st_uid, s.st_size, s.st_mtime_ns) for p in IPC.rglob("*") for s in [p.lstat()])


if __name__ == "__main__":
    IPC.mkdir()
    json.dump({"nng": nng, "later": later, "speak": speak}[sys.argv[1]](sys.argv[2]), sys.stdout)
