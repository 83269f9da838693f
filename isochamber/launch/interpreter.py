"""Our own interpreter in the tenant's root: it takes nothing from there, neither modules nor the text of its source.

The paths that Python imports from name files of the tenant's once its root is ours, and until the tenant's
ids are taken a module of its would run as the host's root.
"""

from __future__ import annotations

import os
import sys

from isochamber.errors import IsochamberError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


def close_importers() -> None:
    """Let nothing be imported any more: call it while the root is still the host's."""
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path.clear()


def bug(error: BaseException) -> IsochamberError:
    """Return an error of ours as a line: a traceback would print source lines, which it reads from the paths' files."""
    places, frame = [], error.__traceback__
    while frame is not None:
        places.append(_place(frame))
        frame = frame.tb_next
    return IsochamberError(
        f"{type(error).__name__}: {error}",
        stage="launch",
        hint=f"this is a bug of isochamber, at {', '.join(places)}: nothing was started",
    )


def _place(frame: TracebackType) -> str:
    return f"{os.path.basename(frame.tb_frame.f_code.co_filename)}:{frame.tb_lineno}"
