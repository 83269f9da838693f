"""The start of one tenant, in order: the launcher's side up to the clone, the tenant's side up to the exec.

docs/explanation/architecture.md lists the same steps, and a test compares the two.
Each step is one line; what it does is in the module that its name begins with.
"""

from __future__ import annotations

import _socket
import os

from isochamber import paths
from isochamber.errors import EXIT_OURS, IsochamberError
from isochamber.launch import (
    capabilities,
    cgroup,
    channel,
    devicegroup,
    devices,
    disk,
    execute,
    handover,
    interpreter,
    ipc,
    join,
    landlock,
    limits,
    masking,
    mounts,
    pins,
    records,
    rlimits,
    seccomp,
    syscalls,
    terminal,
    verify,
)
from isochamber.launch.entry import Entry
from isochamber.launch.lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TENANT_NAMESPACES = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS

# What exec joins at once; the PID namespace is joined by who clones it, the user namespace last.
JOINED_NAMESPACES = (
    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)  # fmt: skip


class Prepared:
    """What the host side made before the clone: descriptors, all close-on-exec."""

    __slots__ = (
        "allowed", "entry", "filters", "groups", "highest_capability", "host_namespaces", "listens", "lock", "net",
        "notify", "root", "spare", "terminal", "trees", "user", "waits",
    )  # fmt: skip

    def __init__(
        self, root: str, entry: Entry, *, own_terminal: bool, waits: bool = False, listens: bool = False,
        spare: Callable[[str | None], None] | None = None, trees: Callable[[], cgroup.Trees] = cgroup.trees,
        namespaces: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """Do the host side's steps; raises IsochamberError, and leaves at most the pins.

        Who ``listens`` takes what the learned filter hands over: see seccomp.Filters.
        A tenant that ``waits`` is set up until the exec, and goes on when it is handed over.
        A ``spare`` is told the v2 group, if there is one, as soon as that can be: the first process is cloned into
        it, and makes its mounts while :meth:`make_rest` is called.
        Who starts many knows its own ``namespaces``, and where the cgroup ``trees`` are.
        """
        self.root = root
        self.entry = entry
        self.terminal = own_terminal
        self.waits = waits
        self.spare = spare is not None
        self.listens = listens
        self.groups = cgroup.Groups({}, None)
        self.notify: str | None = None  # the host's socket that the tenant tells its readiness
        # Only one start at a time may see the upper.
        self.lock = records.lock(entry.tid, entry.name)
        self.user = self.net = -1
        try:
            if entry.ipc is not None:
                ipc.check(entry.ipc)
            if entry.disk is not None:
                disk.attach(root, entry.tid)
            else:
                disk.check_unused(root, entry.tid)
            _check_there(root, entry)
            self.trees = trees()
            controllers = [*limits.controllers(entry.limits), devicegroup.CONTROLLER]
            self.groups = cgroup.groups_of(entry.tid, controllers, self.trees)
            cgroup.make_v2(self.groups, controllers, self.trees)
            if spare is not None:
                spare(self.groups.v2)
            self.user, self.net = pins.ensure(entry.tid, entry.uid_base, entry.uid_count)
            join.ensure(root, entry, self.net)
            self.allowed = devicegroup.rules(entry.devices)
            if spare is None:
                self.make_rest()
            self.highest_capability = capabilities.last()
            self.host_namespaces = namespaces or verify.namespaces()
        except BaseException:
            self.close()  # who holds many tenants can't afford a descriptor a failure
            try:
                cgroup.remove_all(self.groups)
            except OSError:
                pass  # the next start of the tenant makes them anew
            records.unlock(self.lock)
            raise

    def make_rest(self) -> None:
        """Make the other control groups, with every limit and the fence of the devices, and read the filters.

        Raises IsochamberError, OSError.
        """
        entry = self.entry
        cgroup.make_v1(self.groups, entry.tid, self.trees)
        limits.apply(entry.limits, entry.limits_required, self.groups, limits.disk_for(entry.limits, self.root))
        devicegroup.apply(self.groups, self.allowed)
        self.filters = seccomp.Filters(self.root, entry.seccomp, listens=self.listens)

    def close(self) -> None:
        """Close what only the clone needs; the lock stays with who keeps the tenant."""
        for descriptor in (self.user, self.net):
            if descriptor >= 0:
                os.close(descriptor)
        self.user = self.net = -1


def _check_there(root: str, entry: Entry) -> None:
    """Raise IsochamberError unless the tenant has its directories still: a deletion may have had the lock before us.

    What is pinned, mounted or made for one that is gone would stay for ever.
    """
    if not os.path.isdir(f"{root}/{entry.upper}"):
        raise IsochamberError(
            "was removed meanwhile", stage="launch", path=f"{root}/{entry.upper}", hint="run ./doit to make it anew"
        )


def joining_side(prepared: Prepared, tenant: int, messages: _socket.socket) -> None:
    """Become a command beside the running ``tenant`` (its pidfd), already in its PID namespace and group: as there.

    Never returns: a failure is sent, then it exits.
    """
    _exit_with_what_it_says(lambda step: _join(prepared, tenant, messages, step), messages, "join the running tenant")


def _join(prepared: Prepared, tenant: int, messages: _socket.socket, step: Callable[[str], None]) -> None:
    close_to_others()
    cgroup.enter(prepared.groups)
    syscalls.setns(tenant, JOINED_NAMESPACES)  # a pidfd stands for all of them (setns(2), Linux 5.8)
    os.chdir("/")
    slave = None
    if prepared.terminal:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        master, slave = terminal.open_pair(root, prepared.entry.uid_base)
        channel.send_terminal(messages, master)
        os.close(master)
    rlimits.apply(prepared.entry.rlimits)
    _become_tenant(prepared, messages, step, slave, joins=True)


def tenant_side(prepared: Prepared, messages: _socket.socket) -> None:
    """Become the tenant: every step in order, then execve(2). Never returns: a failure is sent, then it exits."""
    _exit_with_what_it_says(lambda step: _become(prepared, messages, step), messages)


def _exit_with_what_it_says(become: Callable[[Steps], None], messages: _socket.socket, first: str = "") -> None:
    step = Steps()
    step.name = first
    interpreter.close_importers()
    try:
        become(step)
    except IsochamberError as error:
        channel.send_failure(messages, step.name, error)
        os._exit(error.exit_code)
    except OSError as error:
        wrapped = IsochamberError.from_os(error, stage="launch")
        channel.send_failure(messages, step.name, wrapped)
        os._exit(EXIT_OURS)
    except BaseException as error:  # a bug of ours: said, and the tenant never runs
        channel.send_failure(messages, step.name, interpreter.bug(error))
    finally:
        os._exit(EXIT_OURS)


class Steps:
    """Remembers the name of the step that is being done, for the one line that a failure becomes."""

    __slots__ = ("done", "name")

    def __init__(self) -> None:
        self.name = ""
        self.done: list[str] = []

    def __call__(self, name: str) -> None:
        """Begin the step ``name``."""
        self.name = name
        self.done.append(name)


def close_to_others() -> None:
    """Let nobody look into this process while it is the host's root, and give it a session of its own."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    os.setsid()  # the operator's terminal is not ours to control
    os.umask(0o022)


def _become(prepared: Prepared, messages: _socket.socket, step: Callable[[str], None]) -> None:
    entry, owner = prepared.entry, prepared.entry.uid_base
    step("close this process to others")
    close_to_others()
    os.chdir(prepared.root)  # lowerdir= takes relative paths, which no ":" of the operator's can break
    step("join the network namespace")
    if entry.network != "host":
        syscalls.setns(prepared.net, syscalls.CLONE_NEWNET)
    step("clone the IPC directory")
    ipc_mount = None if entry.ipc is None else ipc.clone(entry.ipc, prepared.user)  # while still the host's peer
    step("make the mounts private")
    mounts.make_private()
    step("map the lowers")
    mounts.map_lowers(entry.lowers, prepared.user)
    step("mount the overlay")
    root = mounts.mount_overlay(entry.lowers, entry.upper, entry.workdir, entry.overlay, volatile=entry.volatile)
    step("mount /proc and /sys")
    mounts.mount_kernel_views(root, owner)
    step("make /dev")
    devices.make(root, owner, entry.tmpfs.get("shm", 1 << 26), entry.tmpfs.get("shm_inodes"), entry.devices)
    step("mount /tmp")
    mounts.mount_tmpfs(root, "tmp", owner, "1777", entry.tmpfs.get("tmp", 1 << 26), entry.tmpfs.get("tmp_inodes"))
    step("mask /proc and /sys")
    masking.apply(root)
    step("bind /home")
    _bind_home(root, entry, prepared.user)
    step("bind the IPC directory")
    if ipc_mount is not None:
        mounts.attach(root, ipc.TARGET, ipc_mount, owner)
    step("bind the extra directories")
    _bind_extras(root, entry, prepared.user, prepared.notify)
    step("make the terminal")
    slave = _make_terminal(root, entry, messages) if prepared.terminal else None
    step("enter the control groups")
    if prepared.spare:
        channel.await_groups(messages)
    cgroup.enter(prepared.groups)  # before anything of the tenant's is run
    step("make the cgroup namespace")
    syscalls.unshare(syscalls.CLONE_NEWCGROUP)  # only now: its roots are the groups that we are in
    step("enter the root")
    mounts.enter(root)  # pivot_root, and the old root detached
    step("write-protect the root")
    if entry.read_only:
        mounts.write_protect("/")  # /home, /tmp and /dev are mounts of their own
    step("set the hostname")
    syscalls.sethostname(entry.hostname)
    step("set the resource limits")
    rlimits.apply(entry.rlimits)  # before the host's root is given up: a tenant can't raise what it is given

    _become_tenant(prepared, messages, step, slave, joins=False)


def _become_tenant(
    prepared: Prepared, messages: _socket.socket, step: Callable[[str], None], slave: int | None, *, joins: bool
) -> None:
    """The second half, from the host's root to the tenant: a command that joins a running tenant does it alike."""
    entry = prepared.entry
    step("join the user namespace")
    syscalls.setns(prepared.user, syscalls.CLONE_NEWUSER)  # last of all namespaces: its capabilities count for no mount
    step("take the tenant's ids")
    _take_ids(entry)
    step("drop the capabilities")
    kept = capabilities.mask(entry.capabilities)
    capabilities.keep_only(kept, prepared.highest_capability)
    step("set no_new_privs")
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    step("confine by Landlock")
    landlock.apply(joins=joins)
    step("verify")
    verify.inside(entry, prepared.host_namespaces, kept)
    step("reset the signals")
    _reset_signals()
    step("load the common system call filters")
    seccomp.load(prepared.filters, messages, learned=False)  # what is left to do is what every tenant may do
    step("wait to be handed over")
    if prepared.waits:
        handover.wait(entry, messages)
    step("close the inherited descriptors")
    if slave is not None:
        terminal.become_controlling(slave)
    syscalls.close_range_on_exec(3)
    step("set the working directory")
    os.chdir(entry.cwd)
    step("load the learned system call filter")
    seccomp.load(prepared.filters, messages, learned=True)  # last: only execve is left to do, and to be allowed
    step("execute")
    execute.program(entry)


def _bind_home(root: int, entry: Entry, user: int) -> None:
    clone = entry.home_fd
    if clone is None:
        _give_home(entry)
        clone = mounts.clone_idmapped(entry.home, user, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)
    mounts.attach(root, "home", clone, entry.uid_base)


def _give_home(entry: Entry) -> None:
    """Let a program that is not root write to its /home: the directory itself is its own, in small ids on disk."""
    status = os.stat(entry.home, follow_symlinks=False)
    if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
        os.chown(entry.home, entry.uid, entry.gid, follow_symlinks=False)


def _bind_extras(root: int, entry: Entry, user: int, notify: str | None) -> None:
    if notify is not None:
        mounts.bind_socket(root, paths.NOTIFY_INSIDE.removeprefix("/"), notify)
    if entry.network == "host":
        mounts.bind_file(root, "etc/resolv.conf", "/etc/resolv.conf")
    if entry.network == "bridge":
        for name in ("resolv.conf", "hosts"):
            source = paths.network_file(entry.tid, name)
            mounts.bind_file(root, f"etc/{name}", source, owner=entry.uid_base)
    for bind in entry.binds:
        attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        if bind.read_only:
            attributes |= syscalls.MOUNT_ATTR_RDONLY
        if bind.idmap:
            clone = mounts.clone_idmapped(bind.source, user, attributes)
        else:
            clone = mounts.clone_plain(bind.source, attributes)
        mounts.attach(root, bind.target.removeprefix("/"), clone, entry.uid_base)


def _make_terminal(root: int, entry: Entry, messages: _socket.socket) -> int:
    master, slave = terminal.make(root, entry.uid_base)
    channel.send_terminal(messages, master)
    os.close(master)
    return slave


def _take_ids(entry: Entry) -> None:
    os.setgroups([])
    if entry.uid:
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)  # the next step needs capabilities
    os.setresgid(entry.gid, entry.gid, entry.gid)
    os.setresuid(entry.uid, entry.uid, entry.uid)
    # Again: it is as fs.suid_dumpable says now, and who runs beside us has the same ids.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def _reset_signals() -> None:
    """Every signal at its default, none blocked."""
    for number in range(1, signal.NSIG):
        # Python ignores SIGPIPE and SIGXFSZ; an ignored signal would survive the exec.
        if number not in (signal.SIGKILL, signal.SIGSTOP) and not 32 <= number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
