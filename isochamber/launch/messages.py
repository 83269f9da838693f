"""What the processes of one start say to each other: a closed list.

They talk over one SOCK_SEQPACKET pair, a message a packet. The tenant's copy is
close-on-exec, so nothing of it reaches the tenant.

    tenant side -> launcher   TERMINAL (with the pty's master), LISTENER, FAILED
    keeper      -> launcher   STARTED (with the tenant's pidfd), FAILED, LEFT, ENDED
    who cloned the tenant's first process for the nursery -> it   STARTED (with the pidfd)
    keeper      -> tenant side that waits   GO
    launcher    -> tenant side, after LISTENER   GO
    launcher through the supervisor -> keeper   SIGNAL, FREEZE
    keeper      -> launcher through the supervisor   SAID
"""

MAXIMUM = 16384  # bytes a packet
_LONGEST = 2000  # characters a field


class Word:
    """The first byte of a packet. No Enum: importing that costs the start more than its mounts do."""

    STARTED = b"S"  # the tenant's first process exists; its number or nothing; one descriptor: its pidfd
    TERMINAL = b"T"  # its terminal exists; one descriptor: the master
    FAILED = b"F"  # a step failed: see encode_failure
    LEFT = b"L"  # something could not be cleaned up after it: see encode_failure
    ENDED = b"E"  # it ended; decimal: its wait status (wait(2))
    LISTENER = b"N"  # its learned filter hands calls to us; decimal: the listener's descriptor, in the tenant's process
    GO = b"G"  # to one that waits: NUL between the words to run, none for its own; its descriptors 0, 1 and 2 or none
    SIGNAL = b"K"  # from a launcher that may not signal itself; decimal: the signal
    SAID = b"I"  # to such a launcher: a line for its operator, UTF-8
    FREEZE = b"Z"  # from such a launcher: 1 stops the tenant, 0 continues it


_OF_A_START = (Word.STARTED, Word.TERMINAL, Word.FAILED, Word.LEFT, Word.ENDED, Word.LISTENER, Word.GO)
WORDS = frozenset((*_OF_A_START, Word.SIGNAL, Word.FREEZE, Word.SAID))


class Failure:
    """A step that failed, as it travels."""

    __slots__ = ("code", "errno", "hint", "path", "step", "what")

    def __init__(self, step: str, path: str | None, errno: int | None, what: str, hint: str | None, code: int) -> None:
        self.step = step
        self.path = path
        self.errno = errno  # None: not the kernel's
        self.what = what
        self.hint = hint
        self.code = code  # what the launcher exits with


def encode_failure(word: bytes, failure: Failure) -> bytes:
    """Return a packet: ``word``, then the fields, NUL between them (no path and no text of ours holds one)."""
    fields = (failure.step, failure.path, failure.errno, failure.what, failure.hint, failure.code)
    texts = ("" if field is None else str(field).replace("\0", "")[:_LONGEST] for field in fields)
    return word + "\0".join(texts).encode("utf-8", "surrogateescape")


def decode_failure(packet: bytes) -> Failure:
    """Return what :func:`encode_failure` was given."""
    step, path, errno, what, hint, code = packet[1:].decode("utf-8", "surrogateescape").split("\0")
    return Failure(step, path or None, int(errno) if errno else None, what, hint or None, int(code))
