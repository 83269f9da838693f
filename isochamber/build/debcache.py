"""Downloaded .debs, kept for the next build: only those that the archive's own signature vouches for.

apt takes a .deb that lies in /var/cache/apt/archives for good when its *size* is
right; it does not hash it again (pkgAcqArchive; tried with a changed byte). So one
install script could give the next tenant any program it likes, and a build never
writes to what another reads:

- a build sees the cache as a read-only lower (hard links below the overlay, see
  :func:`show`); what it downloads lands in its own upper and leaves with it;
- afterwards, every process dead, :func:`keep` takes a .deb over when its SHA-256
  stands in a Packages file, whose SHA-256 stands in an InRelease, which gpgv(1) says
  one of the *base's* archive keys signed. It is filed under the name that the signed
  index gives it, not under the one the script gave it, and hashed as it is copied.

A script that removes its package lists or its .debs leaves nothing to be verified,
and nothing is kept. The cache may be deleted at any time.
"""

import base64
import contextlib
import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from isochamber import paths
from isochamber.build import durable
from isochamber.build.state import State
from isochamber.launch import syscalls

ARCHIVES = "var/cache/apt/archives"
LISTS = "var/lib/apt/lists"
_KEYS = ("etc/apt/trusted.gpg.d", "usr/share/keyrings/debian-archive-keyring.gpg")

_MAX_RELEASE = 8 << 20  # bytes; what is larger is not Debian's
_MAX_PACKAGES = 1 << 30
_MAX_DEB = 4 << 30

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.~%_-]*\.deb")
_SHA256 = re.compile(rb"^ ([0-9a-f]{64}) ", re.MULTILINE)
_STANZA = re.compile(rb"^(Package|Version|Architecture): (\S+)$", re.MULTILINE)

_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

# gpgv reads what a tenant may have written: as nobody, without a single capability.
_GPGV = (
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all",
    "--no-new-privs", "gpgv", "--status-fd=2", "--output=-",
)  # fmt: skip


def directory(state: State, mirror: str, architecture: str) -> Path:
    """Return where .debs of one mirror and architecture are kept: the names of two archives could collide."""
    return state.root / paths.CACHE / "debs" / f"{hashlib.sha256(mirror.encode()).hexdigest()[:12]}-{architecture}"


def show(cache: Path, rootfs: Path) -> None:
    """Put hard links to every cached .deb where apt of ``rootfs`` looks.

    ``rootfs`` is a new directory: a lower above the base, or the root that a bootstrap
    tool fills. Nobody may write to the links. Raises OSError.
    """
    names = sorted(entry.name for entry in os.scandir(cache) if _NAME.fullmatch(entry.name)) if cache.is_dir() else []
    path = rootfs
    for part in ("", *ARCHIVES.split("/")):
        path = path / part
        path.mkdir(exist_ok=True)
        path.chmod(0o755)  # it shows through the overlay, whatever the umask
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
            os.link(cache / name, path / name)


def keep(cache: Path, root: int, base: int) -> int:
    """Take the verified .debs below the open directory ``root`` into the cache; returns how many were new.

    ``root`` is a tenant's upper or a whole root, nothing may be writing there;
    ``base`` is the open root whose archive keys count. Raises OSError.
    """
    found = dict(_new_debs(cache, root))
    if not found:
        return 0
    trusted = _trusted_hashes(root, _keyring(base))
    vouched = _vouched(root, trusted, set(found)) if trusted else {}
    for digest, name in vouched.items():
        _file(cache, root, found[digest], name, digest)
    return len(vouched)


def _new_debs(cache: Path, root: int) -> Iterator[tuple[str, str]]:
    """Yield (digest, name) of the .debs that are no links to the cache's own."""
    known = {entry.inode() for entry in os.scandir(cache)} if cache.is_dir() else set()
    for name in _names(root, ARCHIVES):
        descriptor = _open_regular(root, f"{ARCHIVES}/{name}", _MAX_DEB) if _NAME.fullmatch(name) else None
        if descriptor is None:
            continue
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(file.fileno()).st_ino not in known:
                yield hashlib.file_digest(file, "sha256").hexdigest(), name


def _trusted_hashes(root: int, keyring: bytes) -> set[bytes]:
    """Return every SHA-256 that a signed InRelease in the lists names."""
    trusted: set[bytes] = set()
    for name in _names(root, LISTS):
        if name.endswith("InRelease"):
            content = _read(root, f"{LISTS}/{name}", _MAX_RELEASE)
            trusted.update(_SHA256.findall(_signed_text(content, keyring)))
    return trusted


def _vouched(root: int, trusted: set[bytes], wanted: set[str]) -> dict[str, str]:
    """Return digest -> proper file name for those of ``wanted`` that a trusted Packages file lists."""
    found: dict[str, str] = {}
    line = re.compile(rb"^SHA256: (" + b"|".join(digest.encode() for digest in sorted(wanted)) + rb")$", re.MULTILINE)
    for name in _names(root, LISTS):
        if not name.endswith("_Packages"):
            continue
        content = _read(root, f"{LISTS}/{name}", _MAX_PACKAGES)
        if hashlib.sha256(content).hexdigest().encode() not in trusted:
            continue
        for match in line.finditer(content):
            begin, end = content.rfind(b"\n\n", 0, match.start()) + 1, content.find(b"\n\n", match.end())
            fields = dict(_STANZA.findall(content, begin, end if end >= 0 else len(content)))
            proper = _file_name(fields)
            if _NAME.fullmatch(proper):
                found[match[1].decode()] = proper
    return found


def _file_name(fields: Mapping[bytes, bytes]) -> str:
    """Return the name that apt looks for: ``<package>_<version>_<architecture>.deb``, a colon as %3a."""
    words = (fields.get(key, b"") for key in (b"Package", b"Version", b"Architecture"))
    return "_".join(word.decode("ascii", "replace").replace(":", "%3a") for word in words) + ".deb"


def _file(cache: Path, root: int, source: str, name: str, digest: str) -> None:
    """Copy one .deb into the cache, hashed on the way: what is filed is what was vouched for."""
    descriptor = _open_regular(root, f"{ARCHIVES}/{source}", _MAX_DEB)
    if descriptor is None:
        return
    durable.make_directories(cache)
    with os.fdopen(descriptor, "rb") as reading, durable.staging_directory(cache, "deb") as stage:
        copy, copied = stage / name, hashlib.sha256()
        with copy.open("xb") as writing:
            while chunk := reading.read(1 << 20):
                copied.update(chunk)
                writing.write(chunk)
            writing.flush()
            os.fchmod(writing.fileno(), 0o644)
            os.fsync(writing.fileno())
        if copied.hexdigest() == digest:
            copy.rename(cache / name)


# Signatures.


def _signed_text(content: bytes, keyring: bytes) -> bytes:
    """Return the text of a clear-signed message that one of ``keyring``'s keys signed, else nothing.

    As apt does, one good signature of several is enough (a release is signed by the
    keys of two Debian versions), and a bad one spoils it.
    """
    if not content or not keyring:
        return b""
    keys, message = _in_memory(keyring), _in_memory(content)
    try:
        argv = [*_GPGV, f"--keyring=/proc/self/fd/{keys}", f"/proc/self/fd/{message}"]
        done = subprocess.run(
            argv, capture_output=True, check=False, pass_fds=(keys, message), cwd="/", timeout=60,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"},
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return b""  # no gpgv here: nothing is kept
    finally:
        os.close(keys)
        os.close(message)
    said = [line.split()[1:2] for line in done.stderr.splitlines() if line.startswith(b"[GNUPG:] ")]
    return done.stdout if [b"VALIDSIG"] in said and [b"BADSIG"] not in said else b""


def _in_memory(content: bytes) -> int:
    """Return a descriptor of an anonymous file with this content, which nobody's own open may read too."""
    descriptor = os.memfd_create("isochamber", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.fchmod(descriptor, 0o444)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _keyring(base: int) -> bytes:
    """Return the base's archive keys as gpgv reads them; b"" when it has none."""
    names = [f"{_KEYS[0]}/{name}" for name in _names(base, _KEYS[0]) if name.endswith((".asc", ".gpg"))]
    keys = []
    for path in (*names, _KEYS[1]):
        content = _read(base, path, _MAX_RELEASE, resolve=_IN_ROOT)
        keys.append(_without_armour(content) if content.startswith(b"-----BEGIN") else content)
    return b"".join(keys)


def _without_armour(text: bytes) -> bytes:
    """Return the bytes of an ASCII-armoured key (RFC 9580, 6.2); b"" when it is damaged."""
    body = text.split(b"\n\n", 1)[-1].split(b"-----END", 1)[0]
    try:
        return base64.b64decode(b"".join(line for line in body.splitlines() if not line.startswith(b"=")))
    except ValueError:
        return b""


# Reading below an open directory that a tenant may have filled.


def _names(root: int, path: str) -> list[str]:
    try:
        descriptor = syscalls.openat2(root, path, os.O_RDONLY | os.O_DIRECTORY, resolve=_BENEATH)
    except OSError:
        return []  # none, or a symlink: then apt of this root had no such directory either
    try:
        return sorted(os.listdir(descriptor))
    finally:
        os.close(descriptor)


def _open_regular(root: int, path: str, largest: int, *, resolve: int = _BENEATH) -> int | None:
    try:
        descriptor = syscalls.openat2(root, path, _READ, resolve=resolve)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= largest:
        return descriptor
    os.close(descriptor)
    return None


def _read(root: int, path: str, largest: int, *, resolve: int = _BENEATH) -> bytes:
    descriptor = _open_regular(root, path, largest, resolve=resolve)
    if descriptor is None:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
