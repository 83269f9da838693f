"""How the compile-time half starts the launcher: as a process of its own, isolated and single-threaded."""

from __future__ import annotations

import os
import sys


def argv(*words: str) -> list[str]:
    """Return the command that runs the launcher with ``words``.

    ``-I`` keeps the caller's PYTHON* variables and working directory out, ``-S``
    keeps site-packages out: the run-time half is the standard library only.
    """
    return [sys.executable, "-I", "-S", os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py"), *words]
