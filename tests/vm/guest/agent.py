"""Inside the guest: runs the commands that come over the virtio port, and sends back what they write.

One JSON object a line. Here: ``{"argv": [...], "env": {...}, "cwd": "/", "direct": false}``. Back:
``{"ready": 1}`` once, then for each command any number of ``{"out": "..."}`` and
``{"err": "..."}`` (bytes as Latin-1) and one ``{"status": n}``. A direct command writes such messages itself.
"""

import glob
import json
import os
import select
import subprocess
import sys
from typing import Any, BinaryIO

NAME = "isochamber.agent"


def port() -> str:
    """Return the device of our port."""
    for path in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(path) as file:
            if file.read().strip() == NAME:
                return "/dev/" + path.split("/")[-2]
    sys.exit("no virtio port has our name")


def send(host: BinaryIO, **message: Any) -> None:
    """Write one message."""
    host.write(json.dumps(message).encode() + b"\n")
    host.flush()


def run(host: BinaryIO, job: dict[str, Any]) -> None:
    """Run one command to its end, its output passed on as it comes."""
    direct = bool(job.get("direct"))
    environment = {**os.environ, **job.get("env", {})}
    try:
        process = subprocess.Popen(
            job["argv"], env=environment, cwd=job.get("cwd", "/"), stdin=subprocess.DEVNULL,
            stdout=host if direct else subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        send(host, err=f"{error}\n", status=127)
        return
    pipes = {"out": process.stdout, "err": process.stderr}
    kinds = {pipe.fileno(): kind for kind, pipe in pipes.items() if pipe is not None}
    poller = select.poll()
    for descriptor in kinds:
        poller.register(descriptor, select.POLLIN)
    while kinds:
        for descriptor, _ in poller.poll():
            data = os.read(descriptor, 65536)
            if data:
                send(host, **{kinds[descriptor]: data.decode("latin-1")})
            else:
                poller.unregister(descriptor)
                del kinds[descriptor]
    send(host, status=process.wait())
    for pipe in pipes.values():
        if pipe is not None:
            pipe.close()


def main() -> None:
    """Serve until the host closes the port."""
    descriptor = os.open(port(), os.O_RDWR)
    with open(descriptor, "rb", closefd=False) as commands, open(descriptor, "wb") as host:
        send(host, ready=1)
        for line in commands:
            run(host, json.loads(line))


if __name__ == "__main__":
    main()
