"""A tenant's limits as the launcher takes them: sizes of tmpfs, setrlimit(2), control groups. Pure."""

from isochamber.spec.model import Limits

_PERIOD = 100_000  # microseconds that containers.json counts processor time in

# For every tenant. One byte of core and not none: that is less than any core, and stops a handler too, which
# kernel.core_pattern would have the host's root run (core(5), "Piping core dumps"; fs/coredump.c).
_ALWAYS = {"CORE": 1, "RTPRIO": 0, "NICE": 0, "MSGQUEUE": 819_200, "SIGPENDING": 4096}

# tenants.yaml -> containers.json, for what is a file of a control group.
_GROUPS = {
    "memory": "memory", "swap": "swap", "processes": "processes", "cpu_weight": "cpu_weight", "cpus": "cpu_quota",
    "io_weight": "io_weight", "io_read": "io_read", "io_write": "io_write",
}  # fmt: skip

_LARGEST_INSTALLED_FILE = 16 << 30  # bytes, holes counted


def tmpfs(limits: Limits) -> dict[str, int]:
    """Return sizes in bytes and, where they were named, numbers of inodes."""
    found = {"tmp": limits.tmp, "shm": limits.shm, "tmp_inodes": limits.tmp_inodes, "shm_inodes": limits.shm_inodes}
    return {name: value for name, value in found.items() if value is not None}


def rlimits(limits: Limits) -> dict[str, int]:
    """Return RLIMIT_* of the tenant's processes. NPROC counts where no pids controller does."""
    return {
        "NOFILE": limits.open_files, **_ALWAYS, "FSIZE": limits.file_size, "MEMLOCK": limits.locked_memory,
        "NPROC": limits.processes,
    }  # fmt: skip


def groups(limits: Limits) -> dict[str, int]:
    """Return what goes into control groups: bytes, counts, weights, microseconds in 100 ms."""
    found = {ours: getattr(limits, theirs) for theirs, ours in _GROUPS.items() if getattr(limits, theirs) is not None}
    if limits.cpus is not None:
        found["cpu_quota"] = max(1000, round(limits.cpus * _PERIOD))
    return found


def required(limits: Limits) -> list[str]:
    """Return which of :func:`groups` must be in force, or the tenant does not start."""
    return sorted(_GROUPS[name] for name in limits.required if name in _GROUPS)


def install_rlimits(limits: Limits) -> dict[str, int]:
    """Return RLIMIT_* of an install script: those of its tenant bind the tenant and not what it installs."""
    return {**_ALWAYS, "FSIZE": _LARGEST_INSTALLED_FILE, "NPROC": limits.install_processes}


def install_groups(limits: Limits) -> dict[str, int]:
    """Return what goes into the control groups of an install script."""
    return {"memory": limits.install_memory, "processes": limits.install_processes}


def install_required(limits: Limits) -> list[str]:
    """Return which of :func:`install_groups` were named."""
    return [name for name in ("memory", "processes") if f"install_{name}" in limits.required]
