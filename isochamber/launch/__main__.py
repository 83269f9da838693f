"""``python -m isochamber.launch``, and by path as command.py does; see main.py.

No more than this: a script that is run by path is compiled anew at every start.
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    # Run by path with -I -S: the project is found from here.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from isochamber.launch.main import main

__all__ = ["main"]

if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)  # nothing is left to be torn down: the interpreter's own end takes milliseconds
