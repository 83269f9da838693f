"""The guards by name, and how each is taken off: in the launcher's own process, or in the build half's."""

from __future__ import annotations

from tests.escape.attempts import Guard

_NO_SETNS = (
    "real_setns = syscalls.setns\n"
    "syscalls.setns = lambda fd, kind: None if kind == syscalls.CLONE_{kind} else real_setns(fd, kind)\n"
)

# The user namespace and the empty capability sets are one guard here: a process of the host's root without
# capabilities, and one with all of them in a user namespace of its own, are refused by the same checks.
RIGHTS = Guard(
    "no rights: ids and a user namespace of its own, no capability",
    _NO_SETNS.format(kind="NEWUSER")
    + "start._take_ids = lambda *rest: None\ncapabilities.keep_only = lambda *rest: None\n",
)
FILTER = Guard("the system call filter", "seccomp.load = lambda *rest, **more: None\n")
MASKS = Guard("masked and write-protected /proc and /sys", "masking.apply = lambda root: None\n")
READ_ONLY_SYS = Guard(
    "/sys is mounted read-only",
    "real_mount_on = mounts.mount_on\n"
    "def mount_on(target, source, fstype, flags, data=None):\n"
    "    real_mount_on(target, source, fstype, flags & ~syscalls.MS_RDONLY if fstype == 'sysfs' else flags, data)\n"
    "mounts.mount_on = mount_on\n",
)
NETWORK = Guard("a network namespace of its own", entry=(("network", "host"),))
PIDS = Guard("PID namespaces", "start.TENANT_NAMESPACES &= ~syscalls.CLONE_NEWPID\nsyscalls.CLONE_NEWPID = 0\n")
IPC = Guard("an IPC namespace of its own", "start.TENANT_NAMESPACES &= ~syscalls.CLONE_NEWIPC\n")
UTS = Guard("a UTS namespace of its own", "start.TENANT_NAMESPACES &= ~syscalls.CLONE_NEWUTS\n")
CGROUPS = Guard(
    "a cgroup namespace of its own",
    "real_unshare = syscalls.unshare\n"
    "syscalls.unshare = lambda flags: None if flags == syscalls.CLONE_NEWCGROUP else real_unshare(flags)\n",
)
ROOT = Guard("a root of its own: pivot_root", "mounts.enter = lambda root: None\n")
OLD_ROOT = Guard(
    "the old root is detached",
    "real_umount2 = syscalls.umount2\n"
    "syscalls.umount2 = lambda target, flags=0: None if target == '.' else real_umount2(target, flags)\n",
)
NO_NEW_PRIVS = Guard(
    "no_new_privs",
    "real_prctl = syscalls.prctl\n"
    "syscalls.prctl = lambda option, *rest: None if option == 38 else real_prctl(option, *rest)\n"
    "seccomp.load = lambda *rest, **more: None\n",  # the kernel takes none without
)
CLOSED = Guard("inherited descriptors are closed", "syscalls.close_range_on_exec = lambda first: None\n")
ENVIRONMENT = Guard(
    "an environment of its own",
    "real_execve = os.execve\nos.execve = lambda path, argv, env: real_execve(path, argv, {**os.environ, **env})\n",
)
RESOURCES = Guard("resource limits", "start.rlimits.apply = lambda limits: None\n")
SMALL_TMP = Guard("tmpfs of a granted size", entry=(("tmpfs", {"tmp": 1 << 30, "shm": 1 << 30}),))
DEATH = Guard("the cgroup and the keeper")

# What stands below every world with a guard off: the launcher looks before it lets go, and would refuse.
# Landlock lies below too: how much it stops differs from kernel to kernel, and tests/limits shows it.
LOOKING = (
    "verify.inside = lambda *rest: None\n"
    "from isochamber.launch import landlock\nlandlock.apply = lambda *rest, **more: None\n"
)

# The view.
FRESH_DEV = Guard("a /dev of its own", "devices.make = lambda *rest: None\nmasking.apply = lambda root: None\n")
DEVICES = Guard(
    "a device control group",
    "from isochamber.launch import devicegroup\ndevicegroup.apply = lambda groups, allowed: None\n",
)
NO_DEVICES = Guard(
    "no devices in its root (nodev)",
    "mounts._NO_PRIVILEGES &= ~syscalls.MS_NODEV\nmounts._DATA_ONLY &= ~syscalls.MS_NODEV\n",
)
NO_DEVICES_AT_HOME = Guard(
    "no devices in /home (nodev)",
    "real_clone = mounts.clone_idmapped\n"
    "mounts.clone_idmapped = lambda path, user, attributes=0: "
    "real_clone(path, user, attributes & ~syscalls.MOUNT_ATTR_NODEV)\n",
)
NO_SETUID = Guard("no set-uid programs in its root (nosuid)", "mounts._NO_PRIVILEGES &= ~syscalls.MS_NOSUID\n")
READ_ONLY_IPC = Guard(
    "the IPC directory is read-only",
    "ipc._INERT &= ~syscalls.MOUNT_ATTR_RDONLY\n",
)
PRIVATE = Guard("mounts are private", "mounts.make_private = lambda: None\n")
BELOW_ROOT = Guard(
    "mount targets are opened below the root, by descriptor, through no link",
    "def naive(root, path, *, owner=None):\n"
    "    found = os.open(f'/proc/self/fd/{root}/{path}', os.O_PATH | os.O_DIRECTORY)\n"
    "    where, inside = (os.readlink(f'/proc/self/fd/{fd}') for fd in (found, root))\n"
    "    if not f'{where}/'.startswith(f'{inside}/'):\n"
    "        os.write(1, f'a mount target is {where}\\nescaped\\n'.encode())\n"
    "        os._exit(0)\n"
    "    return found\n"
    "mounts.open_target = naive\n",
)
NO_CGROUP_TREE = Guard(
    "no cgroup file system is mounted",
    "from isochamber.launch import cgroup\n"
    "real_home = start._bind_home\n"
    "def with_tree(root, entry, user):\n"
    "    real_home(root, entry, user)\n"
    "    mounts.attach(root, 'mnt', mounts.clone_plain(cgroup.trees().v2, 0))\n"
    "start._bind_home = with_tree\n",
)
INTO_CGROUP = Guard(
    "it is cloned into its cgroup",
    "real_clone3 = syscalls.clone3\nsyscalls.clone3 = lambda flags, *, cgroup_fd=None: real_clone3(flags)\n",
)
CGROUP_KILL = Guard(
    "whoever is left in the cgroup is killed",
    "from isochamber.launch import cgroup\ncgroup.remove_all = lambda groups: None\n",
)
LOCK = Guard("a tenant's lock", "records.lock = lambda tid, name: os.open('/dev/null', os.O_RDWR)\n")
FEW_TERMINALS = Guard("a limit of terminals", "devices._MAX_TERMINALS = 4096\n")
PRIVATE_STATE = Guard("the state directory is root's alone (0700)")

# The build half.
