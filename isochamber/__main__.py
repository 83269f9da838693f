"""``python -m isochamber``: the same as the ``isochamber`` command."""

import sys

from isochamber.cli import main

if __name__ == "__main__":
    sys.exit(main())
