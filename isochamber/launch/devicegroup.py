"""Which devices a tenant may open, whatever node it gets hold of: cgroup v1's devices, or a BPF program on v2.

It has no way to a node of its own anyway: mknod(2) needs a capability over the
host, and only /dev is mounted with devices. This is the second fence behind that.
Sources: Documentation/admin-guide/cgroup-v1/devices.rst; cgroup-v2.rst, "Device
controller"; bpf(2), include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import os
import struct

from isochamber.errors import IsochamberError
from isochamber.launch import cgroup, devices, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isochamber.launch.cgroup import Groups
    from isochamber.launch.entry import Device

CONTROLLER = "devices"

# Kind, major, minor (None: any), access. Making a node is in it, because /dev is made from inside the group.
_TERMINALS = (("c", 5, 2, "rwm"), ("c", 136, None, "rwm"))
_KINDS = {"b": 1, "c": 2}  # BPF_DEVCG_DEV_*
_ACCESS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*

Rule = tuple[str, int, "int | None", str]


def rules(granted: list[Device]) -> list[Rule]:
    """Return what is allowed; raises IsochamberError for a grant that is no device of this host."""
    found: list[Rule] = [("c", major, minor, "rwm") for _, major, minor in devices.NODES]
    found += _TERMINALS
    for device in granted:
        kind, number = devices.look(device.path)
        found.append((kind, os.major(number), os.minor(number), "rm" if device.read_only else "rwm"))
    return found


def apply(groups: Groups, allowed: list[Rule]) -> None:
    """Deny everything but ``allowed`` to all that is in ``groups``. Raises IsochamberError.

    Where the machine has neither kind (no v1 controller, and no v2 tree or a kernel
    without CONFIG_CGROUP_BPF) nothing is fenced: :func:`in_force` says so.
    """
    group = groups.v1.get(CONTROLLER)
    try:
        if group is not None:
            cgroup.write(group, "devices.deny", "a")
            texts = (
                f"{device} {major}:{'*' if minor is None else minor} {access}"
                for device, major, minor, access in allowed
            )
            cgroup.write(group, "devices.allow", *texts)
        elif groups.v2 is not None:
            syscalls.attach_device_program(groups.v2, program(allowed))
    except OSError as error:
        raise IsochamberError.from_os(
            error, stage="launch", path=group or groups.v2, hint="the devices that it may open could not be set"
        ) from error


def expected(groups: Groups) -> str | None:
    """Return what :func:`apply` would use for a tenant that does not run, for people; None where there is nothing."""
    if groups.v1.get(CONTROLLER) is None and groups.v2 is not None:
        return f"a BPF program on {groups.v2}, where the kernel has such (CONFIG_CGROUP_BPF)"
    return in_force(groups)


def in_force(groups: Groups) -> str | None:
    """Return what fences the devices of a tenant that runs in ``groups``, for people; None where nothing does."""
    if CONTROLLER in groups.v1:
        return f"{groups.v1[CONTROLLER]}/devices.list"
    if groups.v2 is not None and syscalls.has_device_program(groups.v2):
        return f"a BPF program on {groups.v2}"
    return None


def program(allowed: list[Rule]) -> bytes:
    """Return the eBPF program that answers 1 for what a rule allows, else 0.

    Its context is three words: (access << 16 | kind), major, minor.
    """
    code = [
        _insn(0x61, 2, 1, 0), _insn(0xBC, 3, 2), _insn(0x54, 3, 0, 0, 0xFFFF),  # w3 = kind
        _insn(0x74, 2, 0, 0, 16),  # w2 = access
        _insn(0x61, 4, 1, 4), _insn(0x61, 5, 1, 8),  # w4 = major, w5 = minor
    ]  # fmt: skip
    for device, major, minor, access in allowed:
        denied = 7 & ~sum(_ACCESS[letter] for letter in access)
        tests = [(3, _KINDS[device]), (4, major)] + ([] if minor is None else [(5, minor)])
        body = [_insn(0xBC, 0, 2), _insn(0x54, 0, 0, 0, denied)]  # w0 = access that the rule does not give
        left = len(tests) + 3  # instructions from the first test to the end of the rule, but itself
        checks = [_insn(0x55, 0, 0, left - 1, 0)]
        for index, (register, wanted) in enumerate(tests):
            checks.append(_insn(0x55, register, 0, left - 2 - index, wanted))
        code += [*body, *checks, _insn(0xB7, 0, 0, 0, 1), _insn(0x95)]
    return b"".join([*code, _insn(0xB7, 0, 0, 0, 0), _insn(0x95)])


def _insn(opcode: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """Return one instruction (struct bpf_insn)."""
    return struct.pack("=BBhi", opcode, source << 4 | target, offset, value)
