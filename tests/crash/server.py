"""Does steps in children forked from a process that has imported everything, traced by strace when asked.

A request is a line of JSON: ``step``, ``directory``, and perhaps ``strace`` (its
options), and ``stopped``: a command to be run when strace has stopped the step by a
signal, before it goes on. The answer is one too: ``status`` (negative: killed by that signal) and
``stderr``. Python's start and imports would cost more than all of the steps.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do one request."""
    from tests.crash import world

    world.operate(request["step"], world.World(Path(request["directory"])))  # no fault is for the operator
    with tempfile.TemporaryFile() as errors:
        go_read, go_write = os.pipe()
        child = os.fork()
        if child == 0:
            _child(request, errors.fileno(), go_read, go_write)
        os.close(go_read)
        tracer = _attach(child, request["strace"]) if request.get("strace") else None
        os.close(go_write)
        _, status = os.waitpid(child, os.WUNTRACED if "stopped" in request else 0)
        if os.WIFSTOPPED(status):
            subprocess.run(request["stopped"], check=True)
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        if tracer is not None:
            tracer.communicate()
        errors.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "stderr": errors.read().decode(errors="replace")}


def _child(request: dict[str, Any], errors: int, go_read: int, go_write: int) -> None:
    code = 99
    try:
        os.close(go_write)
        os.dup2(errors, 2)
        os.read(go_read, 1)  # EOF: the tracer is there
        os.close(go_read)
        from tests.crash import variants, world

        variants.apply(request.get("variant"))
        code = world.run_step(request["step"], request["directory"], request.get("case", ""))
    except BaseException:  # shown, and judged by the test
        import traceback

        traceback.print_exc(file=os.fdopen(os.dup(2), "w"))
    finally:
        os._exit(code)


def _attach(child: int, options: list[str]) -> "subprocess.Popen[bytes]":
    """Start strace on ``child`` and return when it is attached."""
    tracer = subprocess.Popen(["strace", *options, "-p", str(child)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    assert select.select([tracer.stderr], [], [], 60)[0]
    said = tracer.stderr.readline()
    if b"attached" not in said:
        raise RuntimeError(f"strace: {said!r}")
    return tracer


def main() -> None:
    """Answer until there is nothing more to read."""
    from tests.crash import world  # noqa: F401 - imported once, for every child

    os.environ["ISOCHAMBER_RUN"] = sys.argv[1]
    os.environ["ISOCHAMBER_CGROUP"] = Path(sys.argv[1]).name
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
