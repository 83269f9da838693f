"""How parts of the supervisor are started by path, isolated and lean as launch/__main__.py is.

nursery                          the supervisor's nursery; see nursery.py
run --root ROOT ... TENANT ...   the launcher's words: through the supervisor if one runs, else as the launcher does
take-over CHANNEL CONTROL PIDFD run ...   run.pl's own: goes on with what that began, descriptors or -1
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

if __name__ == "__main__":
    if sys.argv[1:] == ["nursery"]:
        from isochamber.serve import nursery

        os._exit(nursery.main())
    from isochamber.serve import run

    if sys.argv[1:2] == ["take-over"]:
        os._exit(run.take_over(sys.argv[2:]))
    os._exit(run.main(sys.argv[1:]))
