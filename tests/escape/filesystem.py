"""The file system: what of the host is in the tenant's view, and what it prepares for who mounts, reads or deletes."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator

from tests.escape import races
from tests.escape.attempts import ALL_ON, Attempt, Guard, NotTestableError, Off, Run
from tests.escape.guards import (
    BELOW_ROOT,
    CLOSED,
    ENVIRONMENT,
    FRESH_DEV,
    IPC,
    LOCK,
    MASKS,
    NETWORK,
    NO_DEVICES,
    NO_DEVICES_AT_HOME,
    NO_NEW_PRIVS,
    NO_SETUID,
    OLD_ROOT,
    PIDS,
    PRIVATE,
    PRIVATE_STATE,
    READ_ONLY_IPC,
    READ_ONLY_SYS,
    RIGHTS,
    ROOT,
    UTS,
)
from tests.escape.worlds import Worlds, scripted
from tests.launch import tenants

# What the shell says of an open that was refused.
SAID = frozenset({
    "absent",
    "Permission denied", "Read-only file system", "Operation not permitted", "Directory nonexistent", "nothing",
    "No such file or directory", "nonexistent", "No such device or address", "No such process", "Not a directory",
})  # fmt: skip

# Settings of the host, and what keeps them from a tenant's hand.
_WRITES = (
    ("F01", "/proc/sys/kernel/core_pattern", (MASKS, RIGHTS)),
    ("F01", "/proc/sys/kernel/modprobe", (MASKS, RIGHTS)),
    ("F01", "/proc/sys/kernel/hostname", (MASKS, RIGHTS)),
    ("F01", "/proc/sys/vm/drop_caches", (MASKS, RIGHTS)),
    ("F01", "/proc/sys/net/ipv4/ip_forward", (MASKS, RIGHTS)),
    ("F01", "/proc/irq/default_smp_affinity", (MASKS, RIGHTS)),
    ("F01", "/sys/kernel/uevent_helper", (READ_ONLY_SYS, RIGHTS)),
    ("F01", "/sys/kernel/mm/transparent_hugepage/enabled", (READ_ONLY_SYS, RIGHTS)),
    ("F01", "/sys/power/state", (READ_ONLY_SYS, RIGHTS)),
    ("F02", "/proc/sysrq-trigger", (MASKS, RIGHTS)),
)
_READS = (
    ("F03", "/proc/kcore", (MASKS, RIGHTS)),
    ("F03", "/proc/kallsyms", (MASKS,)),
    ("F03", "/proc/timer_list", (MASKS, RIGHTS)),
    ("F03", "/proc/interrupts", (MASKS,)),
    ("F03", "/proc/latency_stats", (MASKS,)),
)


def _writes(row: str, path: str, guards: tuple[Guard, ...]) -> Attempt:
    # Opened and not written to: the control is the real host's.
    script = f"""[ -e {path} ] || exec echo absent
        error=$({{ : >> {path}; }} 2>&1) && echo worked || echo "${{error##*: }}" """
    return Attempt(row, f"writing to {path}", guards, scripted, script, refused=SAID, peers=True, batch="view")


def _reads(row: str, path: str, guards: tuple[Guard, ...]) -> Attempt:
    script = f"""[ -e {path} ] || exec echo absent
        error=$(head -c 64 {path} 2>&1 >/tmp/read)
        if [ -s /tmp/read ]; then echo worked; else error=${{error##*: }}; echo "${{error:-nothing}}"; fi"""
    return Attempt(row, f"reading {path}", guards, scripted, script, refused=SAID, peers=True, batch="view")


# What of the host is in view.


def _dot_dot(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    return worlds.word(off, f"cd /; cat ../../../..{worlds.canary} 2>&1 | sed 's/.*: //'")


def _under_root(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    places = f"/..{worlds.canary_below_the_old_root} /../../{worlds.canary}"
    return worlds.word(off, f"cat {places} 2>&1 | sed 's/.*: //' | sort -u | tail -1")


def _leaked(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """The operator's shell has a directory of the host open, and lets programs inherit it."""
    tenant = worlds.tenant(off)
    directory = os.open(worlds.public, os.O_RDONLY)
    os.set_inheritable(directory, True)
    try:
        script = "for n in /proc/self/fd/*; do cat $n/canary; done 2>&1 | grep untouched || echo nothing"
        done = worlds.start(tenant, off, "/bin/sh", "-c", script, pass_fds=(directory,))
    finally:
        os.close(directory)
    return done.stdout.strip().splitlines()[-1]


def _working_directory(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """CVE-2024-21626: the entry's working directory is a descriptor of the launcher's."""
    words = [
        worlds.word(off, "cat ../canary canary ../../../canary 2>&1 | grep untouched || echo nothing",
                    cwd=f"/proc/self/fd/{number}")
        for number in (3, 5, 7, 8, 9)
    ]  # fmt: skip
    return "untouched" if "untouched" in words else "nothing"


def _environment(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    tenant = worlds.tenant(off)
    script = 'env | grep SECRET= || tr "\\0" "\\n" < /proc/1/environ | grep SECRET= || echo nothing'
    done = worlds.start(tenant, off, "/bin/sh", "-c", script, env={**os.environ, "SECRET": "token"})
    return done.stdout.strip()


def _hosts_shm(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    made = tenants.run(["ipcmk", "-M", "4096"]).stdout.split()[-1]
    try:
        return worlds.word(off, f"grep -c ' {made} ' /proc/sysvipc/shm | sed s/^0$/nothing/")
    finally:
        tenants.run(["ipcrm", "-m", made])


def _hosts_name(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    word = worlds.word(off, "cat /proc/sys/kernel/hostname", sabotage="syscalls.sethostname = lambda name: None\n")
    own = "(none)" if UTS not in off else ""
    return "escaped" if word == os.uname().nodename and not own else "nothing"


def _abstract_socket(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"isochamber-escape-{os.getpid()}"
        listener.bind(f"\0{name}")
        listener.listen()
        there = f'pack("Sa*", 1, "\\0{name}")'
        script = f'use Socket; socket A, PF_UNIX, SOCK_STREAM, 0; print connect(A, {there}) ? "worked" : $!'
        return worlds.word(off, f"perl -e '{script}'")


def _loopback(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        there = f"sockaddr_in({port}, INADDR_LOOPBACK)"
        script = f'use Socket; socket T, PF_INET, SOCK_STREAM, 0; print connect(T, {there}) ? "worked" : $!'
        return worlds.word(off, f"perl -e '{script}'")


def _hosts_root_by_proc(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    return worlds.word(off, f"cat /proc/{worlds.sentinel.pid}/root{worlds.canary} 2>&1 | sed 's/.*: //'")


def _kill_everybody(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """kill(-1, 9) reaches whoever is visible and has its ids; a process of the host is given them to be reached."""
    tenant = worlds.tenant(off)
    victim = subprocess.Popen(["sleep", "infinity"], user=tenant.uid_base, group=tenant.uid_base)
    try:
        worlds.start(tenant, off, "/bin/sh", "-c", "kill -9 -1")
        return "escaped" if victim.poll() is not None else "worked"
    finally:
        victim.kill()
        victim.wait()


def _propagates(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """On a host whose mounts are shared, as systemd makes them: does a mount of the start arrive on the host?"""
    tenant = worlds.tenant(off)
    tenants.write_entries(tenant.containers, [tenant.entry])
    look = "cut -d' ' -f5 /proc/self/mountinfo | sort"
    words = [word for word in worlds.words(tenant, off, "/bin/true") if word not in ("unshare", "-m")]
    private = "mount --make-rprivate / && mount --make-rshared /"  # shared with nobody outside of this test
    script = f'{private}; {look} > "$0/before"; "$@" > /dev/null 2>&1; {look} > "$0/after"'
    place = worlds.public
    tenants.run(["unshare", "-m", "/bin/sh", "-c", script, str(place), *words])
    before, after = (set((place / name).read_text().splitlines()) for name in ("before", "after"))
    new = {path for path in after - before if "/ns/" not in path}
    return "escaped" if new else "nothing"


# What the tenant prepares for the launcher.


def _link_at(name: str, to: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        tenant = worlds.tenant(off)
        (worlds.public / name).mkdir(exist_ok=True)
        (tenant.upper / name).symlink_to(str(worlds.public / name) if to == "host" else to)
        os.lchown(tenant.upper / name, tenant.uid_base, tenant.uid_base)
        done = worlds.start(tenant, off, "/bin/echo", "it ran")
        if "it ran" in done.stdout or "escaped" in done.stdout:
            return "escaped"
        return "the start is refused" if off == ALL_ON else f"refused: {done.stderr}{done.stdout}"

    return run


def _prepared_dev(name: str, to: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        tenant = worlds.tenant(off)
        path = tenant.upper / "dev" / name
        path.parent.mkdir(parents=True)
        path.symlink_to(to)
        for made in (tenant.upper / "dev", path.parent, path):
            os.lchown(made, tenant.uid_base, tenant.uid_base)
        done = worlds.start(tenant, off, "/bin/sh", "-c", f"[ -L /dev/{name} ] && echo worked || echo its own")
        return done.stdout.strip() or "the start is refused"

    return run


def _device_in(where: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """A node that is there already (an archive, an operator's copy): /dev/zero, the most harmless of all."""
        tenant = worlds.tenant(off)
        directory = tenant.upper if where == "/" else tenant.home
        os.mknod(directory / "node", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        os.chmod(directory / "node", 0o666)
        script = f"head -c 1 {where.rstrip('/')}/node | wc -c | sed s/^0$/nothing/"
        return worlds.start(tenant, off, "/bin/sh", "-c", script).stdout.strip()

    return run


# The second start must not clear the first one's cgroup away.
_BESIDE = (
    "start.cgroup.groups_of = lambda tid, controllers, trees: start.cgroup.Groups({}, None)\n"
    "start.cgroup.make_v1 = lambda groups, tid, found: None\n"
)


def _two_at_once(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    tenant = worlds.tenant(off)
    with tenant.started("echo ready; read line"):
        done = worlds.start(tenant, off, "/bin/echo", "worked", sabotage=_BESIDE if off else "")
    return done.stdout.strip() or "runs already"


def _launchers_program(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """CVE-2019-5736: the launcher executes itself by /proc/self/exe, with a dynamic linker of the tenant's making.

    The linker is the tenant's code with the host's program as its /proc/self/exe, and tries to open that for writing.
    """
    linker = "lib64/ld-linux-x86-64.so.2"
    if os.uname().machine != "x86_64":
        raise NotTestableError("the linker's code is written for x86_64")
    tenant = worlds.tenant(off, argv=["/proc/self/exe"])
    program = races.compiled(worlds.scratch, "linker", "-nostdlib", "-static-pie", "-fPIE", "-ffreestanding")
    target = tenant.upper / "usr" / linker
    target.parent.mkdir(parents=True)
    shutil.copy(program, target)
    target.chmod(0o755)
    code = worlds.start(tenant, off).returncode
    if code == 125:
        raise NotTestableError("this base has its dynamic linker elsewhere")
    return os.strerror(code) if code else "worked"


# What the tenant leaves for the host.


def _set_uid_for_the_host(where: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        """Another user of the host runs a set-uid program that the tenant made."""
        tenant = worlds.tenant(off)
        script = f"cp /usr/bin/id {where}/id; chmod 6755 {where}/id; stat -c %a {where}/id"
        done = worlds.start(tenant, off - {PRIVATE_STATE}, "/bin/sh", "-c", script)
        assert done.stdout.strip() == "6755", done.stderr
        program = (tenant.home if where == "/home" else tenant.upper / where.lstrip("/")) / "id"
        opened = [program.parent]
        while opened[-1].parent != worlds.scratch.parent:
            opened.append(opened[-1].parent)
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in opened}
        try:
            if PRIVATE_STATE in off:
                for path in opened:
                    path.chmod(0o755)
            ran = subprocess.run([program, "-u"], user=65534, group=65534, capture_output=True, text=True, check=False,
                                 extra_groups=[])  # fmt: skip
            return "escaped" if ran.stdout.strip() == "0" else f"ran as {ran.stdout.strip()}"
        except PermissionError:
            return "EACCES"
        finally:
            for path, mode in modes.items():
                path.chmod(mode)

    return run


def _owner_on_disk(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    tenant = worlds.tenant(off)
    worlds.start(tenant, off, "/bin/sh", "-c", "touch /var/made; mkdir /var/made.d")
    owners = {(tenant.upper / "var" / name).stat().st_uid for name in ("made", "made.d")}
    return "escaped" if 0 in owners else "its own ids"


def _set_uid_inside(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """A user of the tenant gets its root by a set-uid program that root left."""
    tenant = worlds.tenant(off)
    worlds.start(tenant, off, "/bin/sh", "-c", "cp /usr/bin/perl /var/p; chmod 6755 /var/p")
    tenant.change(uid=1000, gid=1000)
    done = worlds.start(tenant, off, "/var/p", "-e", "print $>")
    return "worked" if done.stdout == "0" else f"runs as {done.stdout}"


def _ipc(script: str) -> Run:
    def run(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
        directory = worlds.public / "ipc"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "file").write_text("the host's\n")
        attack = f"cd /tmp/tenant_ipc; error=$({{ {script}; }} 2>&1) && echo worked || echo ${{error##*: }}"
        return worlds.word(off, attack, ipc=str(directory))

    return run


def _ipc_fifo(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """Writing to the host daemon's FIFO is what IPC is for; the FIFO itself stays as it is."""
    directory = worlds.public / "ipc-fifo"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    os.mkfifo(directory / "fifo", 0o666)
    reader = os.open(directory / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        script = "echo hello > /tmp/tenant_ipc/fifo; rm -f /tmp/tenant_ipc/fifo; chmod 0 /tmp/tenant_ipc/fifo; true"
        worlds.word(off, script, ipc=str(directory))
        if not (directory / "fifo").is_fifo() or stat.S_IMODE((directory / "fifo").stat().st_mode) & 0o600 != 0o600:
            return "escaped"
        return "worked" if os.read(reader, 100) == b"hello\n" else "nothing"
    finally:
        os.close(reader)


def _lower_overwritten(worlds: Worlds, off: Off, _attempt: Attempt) -> str:
    """A tenant changes every program of its base: its own copy, nobody else's."""
    tenant = worlds.tenant(off)
    base = worlds.root / worlds.base / "etc/hostname"
    before = (worlds.root / worlds.base / "etc/passwd").stat().st_mtime_ns, base.exists()
    word = worlds.start(tenant, off, "/bin/sh", "-c", "echo evil > /etc/passwd && rm -rf /usr/share/doc && echo worked")
    after = (worlds.root / worlds.base / "etc/passwd").stat().st_mtime_ns, base.exists()
    if before != after or not (worlds.root / worlds.base / "usr/share/doc").is_dir():
        return "escaped"
    other = worlds.word(frozenset(), "grep -c root:x:0 /etc/passwd")
    return word.stdout.strip() if other == "1" else "escaped"


_NOT_THERE = frozenset({"No such file or directory", "nothing", "Permission denied"})


def attempts() -> Iterator[Attempt]:
    """Yield every attempt of this group."""
    yield from (_writes(*row) for row in _WRITES)
    yield from (_reads(*row) for row in _READS)
    own = {"refused": _NOT_THERE}
    yield Attempt("F11", "the host's root by ..", (ROOT,), _dot_dot, refused=_NOT_THERE)
    yield Attempt("F11", "the host's root below its own", (OLD_ROOT,), _under_root, refused=_NOT_THERE)
    yield Attempt("F10", "a directory of the host as a descriptor", (CLOSED,), _leaked, **own)  # type: ignore[arg-type]
    yield Attempt("I07", "the operator's environment", (ENVIRONMENT,), _environment, refused=_NOT_THERE)
    yield Attempt("K22", "shared memory of the host", (IPC,), _hosts_shm, refused=_NOT_THERE)
    yield Attempt("K22", "the host's name", (UTS,), _hosts_name, refused=_NOT_THERE)
    refused = frozenset({"Connection refused"})
    yield Attempt("N01", "an abstract socket of the host", (NETWORK,), _abstract_socket, refused=refused)
    yield Attempt("N02", "the host's loopback", (NETWORK,), _loopback, refused=refused)
    yield Attempt("K13", "the host's root by /proc/PID/root", (PIDS, RIGHTS), _hosts_root_by_proc, refused=_NOT_THERE)
    yield Attempt("K14", "kill of everybody", (PIDS,), _kill_everybody, inside=True)
    yield Attempt("F15", "a mount that propagates to the host", (PRIVATE,), _propagates, refused=_NOT_THERE)
    stopped = frozenset({"the start is refused"})
    for name in ("proc", "sys", "dev", "tmp", "home"):
        run = _link_at(name, "host")
        yield Attempt("F06", f"/{name} is a link to a directory of the host", (BELOW_ROOT,), run, refused=stopped)
    yield Attempt(
        "F08", "/proc is a link to /proc/self", (BELOW_ROOT,), _link_at("proc", "/proc/self"), refused=stopped
    )
    yield Attempt("F08", "/sys is a link to /proc", (BELOW_ROOT,), _link_at("sys", "/proc"), refused=stopped)
    for row, name, to in (
        ("F04", "null", "/proc/sys/kernel/core_pattern"), ("F05", "console", "/proc/kcore"),
        ("F05", "tty", "/etc/shadow"), ("F05", "pts/0", "/proc/sysrq-trigger"),
        ("F05", "shm", "/home"), ("F05", "mqueue", "/etc"),
    ):  # fmt: skip
        yield Attempt(
            row, f"/dev/{name} is a link in its root", (FRESH_DEV,), _prepared_dev(name, to),
            refused=frozenset({"its own", "the start is refused"}),
        )  # fmt: skip
    yield from races.attempts()
    yield Attempt(
        "F09", "the launcher's own program", (RIGHTS,), _launchers_program, refused=frozenset({"Permission denied"})
    )
    yield Attempt("F12", "a device node in its root", (NO_DEVICES,), _device_in("/"), refused=_NOT_THERE)
    yield Attempt("F12", "a device node in /home", (NO_DEVICES_AT_HOME,), _device_in("/home"), refused=_NOT_THERE)
    for where in ("/var", "/home"):
        guards = (PRIVATE_STATE,) if where == "/home" else (PRIVATE_STATE, RIGHTS)
        yield Attempt("F18", f"a set-uid program in {where}, run by a user of the host", guards,
                      _set_uid_for_the_host(where), inside=True)  # fmt: skip
    yield Attempt(
        "F19", "files of the host's root on disk", (RIGHTS,), _owner_on_disk, refused=frozenset({"its own ids"})
    )
    yield Attempt("K16", "a set-uid program of its own", (NO_NEW_PRIVS, NO_SETUID), _set_uid_inside,
                  refused=frozenset({"runs as 1000"}))  # fmt: skip
    yield Attempt("F21", "two starts on one upper", (LOCK,), _two_at_once, refused=frozenset({"runs already"}))
    for title, script in (("creating", "touch new"), ("removing", "rm file"), ("opening", "chmod 777 file"),
                          ("renaming", "mv file other"), ("writing to", "echo x >> file")):  # fmt: skip
        yield Attempt("F25", f"{title} a file of the IPC directory", (READ_ONLY_IPC,), _ipc(script), refused=SAID)
    yield Attempt("F25", "writing to a FIFO of the IPC directory", (READ_ONLY_IPC,), _ipc_fifo, inside=True)
