"""What the launcher needs of signal and json, without what importing those two costs.

``import signal, json`` also imports enum, re, functools and collections: 8 ms of a
cold start, as much as the bare interpreter takes. Both are thin covers of modules
written in C, which are taken here directly; a test holds the two parsers together.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

try:
    from _json import encode_basestring_ascii as quote
    from _json import make_scanner as _make_scanner
except ImportError:  # a Python without the C parser
    from json.encoder import py_encode_basestring_ascii as quote
    from json.scanner import py_make_scanner as _make_scanner  # type: ignore[attr-defined,no-redef] # not in its stub

__all__ = ["parse", "quote", "signal"]

_BLANK = " \t\n\r"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Grammar:
    """The settings that the scanner looks for: plain JSON, as json.JSONDecoder's defaults but for NaN and Infinity."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner written in Python asks for one


_scan = _make_scanner(_Grammar())  # type: ignore[arg-type] # not a JSONDecoder, which would import what we avoid


def parse(content: bytes) -> object:
    """Return the one JSON value in ``content``; raises ValueError (also for RecursionError's reason)."""
    text = content.decode().strip(_BLANK)
    try:
        value, end = _scan(text, 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (StopIteration, SystemError):
        # Where json is not imported the scanner has no JSONDecodeError to raise, and up to 3.12 raises SystemError.
        return _explain(text)
    if end != len(text):
        raise ValueError(f"there is more after character {end}")
    return value


def _explain(text: str) -> object:
    """Let json itself say what is wrong with ``text``: whoever made a mistake has 8 ms."""
    import json  # noqa: PLC0415 - the point of this module

    return json.loads(text, parse_constant=_refuse_constant)
