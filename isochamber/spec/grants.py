"""What an operator may grant besides limits: capabilities that can count, and devices of the host."""

from collections.abc import Mapping
from typing import Any

from isochamber.spec.model import Device

# capabilities(7) that the kernel asks of the user namespace that owns the object (ns_capable): over files of the
# tenant's ids and over its own processes they do what their page says.
CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETFCAP", "SETGID", "SETPCAP", "SETUID",
    "SYS_CHROOT", "SYS_PTRACE",
)  # fmt: skip

# The others count over what the host's user namespace owns. What is there for who wants them:
_INSTEAD = {
    "NET_BIND_SERVICE": "in a network of its own a tenant may use every port without it",
    "NET_RAW": "in a network of its own a tenant may ping without it",
    "NET_ADMIN": "network: makes what its network needs",
    "SYS_ADMIN": "mounts are made for it: devices:, filesystem:",
    "MKNOD": "devices: makes the nodes that it may have",
    "SYS_RAWIO": "devices: makes the nodes that it may have",
    "SYS_RESOURCE": "limits: says what it may use",
    "IPC_LOCK": "limits: locked_memory says how much it may lock",
    "SYS_NICE": "limits: cpu_weight gives it more of the processor",
    "SYS_BOOT": "a tenant ends when its first process ends",
    "SYS_TIME": "the clock is the machine's",
}
_ALWAYS = "it counts over what the host owns, and a tenant owns none of that"

# Names in /dev that every tenant has of its own, with all below them.
TAKEN = (
    "console", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
    "urandom", "zero",
)  # fmt: skip
DEVICE = (
    rf"/dev/(?!({'|'.join(TAKEN)})(/|$))(?!\.{{1,2}}(/|$))[^/\x00-\x1f\x7f]+(/(?!\.{{1,2}}(/|$))[^/\x00-\x1f\x7f]+)*"
)


def why_not(capability: str) -> str:
    """Return what to say of a capability that may not be granted."""
    name = capability.upper()
    if name.removeprefix("CAP_") in CAPABILITIES:
        return f"written {name.removeprefix('CAP_')}"
    reason = _INSTEAD.get(name.removeprefix("CAP_"), _ALWAYS)
    return f"one that counts inside ({', '.join(CAPABILITIES)}); this one can't: {reason}"


def devices(value: list[Any]) -> tuple[Device, ...]:
    """Return what ``devices:`` grants; the last mention of a path counts."""
    found: dict[str, Device] = {}
    for item in value:
        made: Mapping[str, Any] = {"path": item} if isinstance(item, str) else item
        found[made["path"]] = Device(made["path"], made.get("read_only", False))
    return tuple(found.values())
