"""Sealing an upper: what a tenant's root made becomes a layer that any tenant may stand on.

Owners are unshifted to 0-based ids, as in a base, and so are the ids in file
capabilities and access lists. What a layer may not carry is dropped: device nodes,
FIFOs, sockets, overlay attributes that the script forged, every other attribute that
means something to the host, and what is only litter of the installation. Whiteouts
(character device 0:0) and opaque directories are the overlay's own and stay
(overlayfs.rst, "whiteouts and opaque directories").

No process may be left that could write below the upper, and it must not be mounted.
"""

import contextlib
import os
import stat
import struct

from isochamber.build import staged, tree
from isochamber.build.ranges import UID_COUNT
from isochamber.launch import syscalls

_CAPABILITY = "security.capability"
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
_OPAQUE = "trusted.overlay.opaque"

# struct vfs_ns_cap_data (linux/capability.h): revision 3 ends with the uid of the namespace's root.
_REVISION_MASK, _REVISION_2, _REVISION_3 = 0xFF000000, 0x02000000, 0x03000000
_CAP_V3 = struct.Struct("<6I")
_CAP_V2 = struct.Struct("<5I")

# struct posix_acl_xattr_header and _entry (linux/posix_acl_xattr.h)
_ACL_VERSION = struct.pack("<I", 2)
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_NAMED = (0x02, 0x08)  # ACL_USER and ACL_GROUP: the only entries whose id counts

# Emptied: what a package manager leaves behind, and what only lives while something runs.
_LITTER_DIRECTORIES = ("var/lib/apt/lists", "var/cache/apt", "var/log/apt", "run", "tmp")
_LITTER_FILES = (
    "var/log/dpkg.log", "var/log/alternatives.log", "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old", "var/lib/dpkg/status-old", "var/cache/ldconfig/aux-cache",
    "etc/resolv.conf",
)  # fmt: skip


def seal(upper: int, uid_base: int) -> tuple[str, ...]:
    """Seal the open directory ``upper``; returns a phrase for each thing that was dropped. Raises OSError.

    IsochamberError for a tree that is too deep or too large to be walked and hashed.
    """
    _remove_litter(upper)
    dropped, total = [], 0
    for item in tree.walk(upper, stage="layer"):
        total += staged.check_size(item, total)
        if _is_forbidden(item):
            os.unlink(item.name, dir_fd=item.parent)
            dropped.append(f"{item.path}: {_NAMES.get(item.kind, 'a special file')} can't be part of a layer")
            continue
        dropped += [f"{item.path}: the attribute {name} was dropped" for name in _clean_attributes(item)]
        _unshift(item, uid_base)
    os.fchown(upper, 0, 0)
    os.fchmod(upper, 0o755)
    for name in os.listxattr(upper):
        os.removexattr(upper, name)
    return tuple(dropped)


_NAMES = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def _is_forbidden(item: tree.Item) -> bool:
    whiteout = item.kind == stat.S_IFCHR and item.status.st_rdev == 0
    return item.kind in _NAMES and not whiteout


def _path(item: tree.Item) -> str:
    """Name the entry itself by its open parent, for calls that take no dir_fd."""
    return f"/proc/self/fd/{item.parent}/{item.name}"


def _clean_attributes(item: tree.Item) -> list[str]:
    """Remove every extended attribute that a layer may not carry; returns their names."""
    path, removed = _path(item), []
    for name in os.listxattr(path, follow_symlinks=False):
        if name in (_CAPABILITY, *_ACLS) or (name.startswith("user.") and not name.startswith("user.overlay.")):
            continue
        if name == _OPAQUE and item.kind == stat.S_IFDIR and os.getxattr(path, name, follow_symlinks=False) == b"y":
            continue
        os.removexattr(path, name, follow_symlinks=False)
        # The overlay's own notes of where a copy came from are no news.
        if not name.startswith("trusted.overlay."):
            removed.append(name)
    return removed


def unshifted(number: int, uid_base: int) -> int:
    """Return the 0-based id of ``number`` when it lies in the tenant's range; any other is left as it is."""
    return number - uid_base if uid_base <= number < uid_base + UID_COUNT else number


def unshifted_capability(raw: bytes, uid_base: int) -> bytes | None:
    """Return the file capability without its namespace root, as a file of the host's root would carry it.

    None for one of another user namespace (the script may have made its own): it means nothing in a layer.
    """
    if len(raw) != _CAP_V3.size:
        return raw if len(raw) == _CAP_V2.size else None
    magic, *sets, root = _CAP_V3.unpack(raw)
    if magic & _REVISION_MASK != _REVISION_3 or root != uid_base:
        return None
    return _CAP_V2.pack(magic & ~_REVISION_MASK | _REVISION_2, *sets)


def unshifted_acl(raw: bytes, uid_base: int) -> bytes | None:
    """Return the access list (acl(5)) with 0-based ids; None when it names an id outside the tenant's range."""
    if raw[: len(_ACL_VERSION)] != _ACL_VERSION or (len(raw) - len(_ACL_VERSION)) % _ACL_ENTRY.size:
        return None
    entries = [raw[: len(_ACL_VERSION)]]
    for tag, permissions, number in _ACL_ENTRY.iter_unpack(raw[len(_ACL_VERSION) :]):
        if tag in _ACL_NAMED and not uid_base <= number < uid_base + UID_COUNT:
            return None
        entries.append(_ACL_ENTRY.pack(tag, permissions, unshifted(number, uid_base) if tag in _ACL_NAMED else number))
    return b"".join(entries)


_UNSHIFTED = {_CAPABILITY: unshifted_capability, **dict.fromkeys(_ACLS, unshifted_acl)}


def _unshift(item: tree.Item, uid_base: int) -> None:
    status, path = item.status, _path(item)
    uid, gid = unshifted(status.st_uid, uid_base), unshifted(status.st_gid, uid_base)
    if (uid, gid) == (status.st_uid, status.st_gid):
        return
    attributes = {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
        if name in _UNSHIFTED
    }
    os.chown(item.name, uid, gid, dir_fd=item.parent, follow_symlinks=False)
    if item.kind == stat.S_IFREG and status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        _restore_mode(item)  # chown(2) took the bits
    for name, raw in attributes.items():
        value = _UNSHIFTED[name](raw, uid_base)
        if value is not None:
            os.setxattr(path, name, value, follow_symlinks=False)
        else:
            with contextlib.suppress(OSError):  # ENODATA: chown(2) took it
                os.removexattr(path, name, follow_symlinks=False)


def _restore_mode(item: tree.Item) -> None:
    descriptor = os.open(item.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=item.parent)
    try:
        os.fchmod(descriptor, stat.S_IMODE(item.status.st_mode))
    finally:
        os.close(descriptor)


def _remove_litter(upper: int) -> None:
    for path in _LITTER_DIRECTORIES:
        descriptor = _open_below(upper, path)
        if descriptor is not None:
            tree.remove_contents(descriptor)
            os.close(descriptor)
    for path in _LITTER_FILES:
        directory, _, name = path.rpartition("/")
        descriptor = _open_below(upper, directory)
        if descriptor is not None:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(name, dir_fd=descriptor)
            os.close(descriptor)


def _open_below(upper: int, path: str) -> int | None:
    """Open a directory below the upper without following any link; None when it is not one."""
    beneath = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    try:
        return syscalls.openat2(upper, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=beneath)
    except OSError:
        return None
