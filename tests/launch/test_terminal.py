"""A tenant on a terminal: one of its own, with the operator's size, keys and hang-up; never the operator's itself."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.launch import tenants
from tests.launch.tenants import Tenant


class Operator:
    """The operator's side: what the screen shows, what the keys send."""

    def __init__(self, master: int, slave: int, launcher: "subprocess.Popen[bytes]") -> None:
        self.master, self.slave, self.launcher = master, slave, launcher
        self.screen = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def shows(self, text: str) -> bool:
        """Read until ``text`` is on the screen; at most a minute, which only a failing test waits."""
        return self.until(lambda: text in self.screen)

    def until(self, happens: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 2 * tenants.DEADLINE
        while not happens():
            if time.monotonic() > deadline:
                return False
            if select.select([self.master], [], [], 0.02)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        return True

    def end(self) -> int:
        """Return the launcher's exit code, its whole output on the screen."""
        assert self.until(lambda: self.launcher.poll() is not None), self.screen
        while select.select([self.master], [], [], 0)[0]:
            self.screen += os.read(self.master, 4096).decode(errors="replace")
        return self.launcher.returncode


@contextmanager
def at_a_terminal(tenant: Tenant, *words: str, size: tuple[int, int] = (24, 80)) -> Iterator[Operator]:
    """Start the launcher as a shell would: in a session and on a terminal of its own."""
    tenants.write_entries(tenant.containers, [tenant.entry])
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    launcher = subprocess.Popen(
        tenant.words(*words), stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_the_terminal,  # noqa: PLW1509 - no other thread runs in this test
        env={**os.environ, "TERM": "xterm-test"},
    )  # fmt: skip
    try:
        yield Operator(master, slave, launcher)
    finally:
        launcher.send_signal(signal.SIGCONT)
        launcher.kill()
        launcher.wait(tenants.DEADLINE)
        os.close(master)
        os.close(slave)
        tenants.wait_until_free(tenant.tid)


def test_a_tenant_has_a_terminal_of_its_own_and_it_is_not_the_operators(tenant: Tenant) -> None:
    script = "tty; readlink /proc/self/fd/0; test -t 1 && test -t 2 && echo both; echo to tty > /dev/tty"
    with at_a_terminal(tenant, "/bin/sh", "-c", f"{script}; echo dev=$(stat -Lc %d:%r /dev/stdin) done") as operator:
        mine = os.fstat(operator.slave)
        assert operator.end() == 0
    assert operator.screen.split("\r\n")[:4] == ["/dev/pts/0", "/dev/pts/0", "both", "to tty"], operator.screen
    (line,) = [line for line in operator.screen.splitlines() if line.startswith("dev=")]
    assert line != f"dev={mine.st_dev}:{mine.st_rdev} done"


def test_a_tenant_can_type_nothing_into_the_operators_terminal(tenant: Tenant) -> None:
    """TIOCSTI (CVE-2017-5226) into what it has: at most its own terminal, read by nobody once it has ended."""
    typing = 'ioctl(STDIN, 0x5412, $_) or print "no: $!\n" for split //, "echo typed\n"; print "tried\n"'
    probe = f"perl -e '{typing}'"
    with at_a_terminal(tenant, "/bin/sh", "-c", f"{probe}; exit 0") as operator:
        assert operator.end() == 0
        assert "tried" in operator.screen
        # What stands in the operator's own input would be read by the shell that gets the terminal back.
        waiting = struct.unpack("i", fcntl.ioctl(operator.slave, termios.FIONREAD, b"\0" * 4))[0]
    assert waiting == 0


def test_the_window_size_is_the_operators_and_follows_it(tenant: Tenant) -> None:
    script = "stty size; trap 'stty size; exit 0' WINCH; echo ready; while :; do read -r line; done"
    with at_a_terminal(tenant, "/bin/sh", "-c", script, size=(33, 111)) as operator:
        assert operator.shows("ready"), operator.screen
        assert "33 111" in operator.screen
        fcntl.ioctl(operator.master, termios.TIOCSWINSZ, struct.pack("4H", 44, 99, 0, 0))
        assert operator.shows("44 99"), operator.screen
        operator.type("\n")


def test_term_is_the_operators(tenant: Tenant) -> None:
    with at_a_terminal(tenant, "/bin/sh", "-c", "echo TERM=$TERM.") as operator:
        assert operator.end() == 0
    assert "TERM=xterm-test." in operator.screen


def test_keys_arrive_once_and_are_echoed_by_the_tenants_terminal(tenant: Tenant) -> None:
    with at_a_terminal(tenant, "/bin/sh", "-c", 'echo ready; read -r line; echo "got $line"') as operator:
        assert operator.shows("ready")
        operator.type("hello\r")
        assert operator.end() == 0
    assert operator.screen.split("\r\n")[-3:] == ["hello", "got hello", ""]


def test_ctrl_c_ends_a_tenant_that_does_not_heed_it_with_130(tenant: Tenant) -> None:
    with at_a_terminal(tenant, "/bin/sh", "-c", "echo ready; exec sleep 1000") as operator:
        assert operator.shows("ready")
        operator.type("\x03")
        assert operator.end() == 130


def test_ctrl_c_is_the_tenants_when_it_handles_it(tenant: Tenant) -> None:
    script = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.05; done"
    with at_a_terminal(tenant, "/bin/sh", "-c", script) as operator:
        assert operator.shows("ready")
        operator.type("\x03")
        assert operator.end() == 7
    assert "caught" in operator.screen


def test_ctrl_d_is_the_end_of_input(tenant: Tenant) -> None:
    with at_a_terminal(tenant, "/bin/sh", "-c", "echo ready; cat; echo over") as operator:
        assert operator.shows("ready")
        operator.type("\x04")
        assert operator.end() == 0
    assert operator.screen.endswith("over\r\n")


def test_ctrl_z_stops_tenant_and_launcher_and_fg_continues_both(tenant: Tenant) -> None:
    with at_a_terminal(tenant, "/bin/sh", "-c", 'echo ready; read -r line; echo "got $line"') as operator:
        assert operator.shows("ready")
        before = termios.tcgetattr(operator.master)
        operator.type("\x1a")
        assert operator.until(lambda: _state(operator.launcher.pid) == "T"), "the launcher did not stop"
        assert termios.tcgetattr(operator.master)[3] & termios.ICANON, "the shell would get a raw terminal"
        assert not before[3] & termios.ICANON
        operator.launcher.send_signal(signal.SIGCONT)
        operator.type("again\r")
        assert operator.end() == 0, operator.screen
    assert "got again" in operator.screen


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_the_terminals_settings_are_given_back_however_it_ends(tenant: Tenant) -> None:
    # Who says so has no handler for Ctrl-C; a shell has one, which its exec of another program takes away.
    stays = "perl -e '$| = 1; print qq(ready\\n); sleep 1000'"
    for script, keys in (("echo ready", ""), ("echo ready; stty raw -echo; exit 3", ""), (f"exec {stays}", "\x03")):
        with at_a_terminal(tenant, "/bin/sh", "-c", script) as operator:
            before = termios.tcgetattr(operator.slave)
            assert operator.shows("ready")
            operator.type(keys)
            operator.end()
            after = termios.tcgetattr(operator.slave)
        assert after[3] & termios.ICANON
        assert after[3] & termios.ECHO
        assert len(before) == len(after)


def test_a_terminal_that_hangs_up_ends_the_tenant(tenant: Tenant) -> None:
    with at_a_terminal(tenant, "/bin/sh", "-c", "echo ready; exec sleep 1000") as operator:
        assert operator.shows("ready")
        replacement, spare = pty.openpty()
        os.dup2(replacement, operator.master)  # the master is closed by this: the operator's window is gone
        os.close(replacement)
        assert operator.launcher.wait(2 * tenants.DEADLINE) in (129, 125)
        os.close(spare)
    assert tenant.processes() == []
