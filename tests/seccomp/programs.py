"""Five real programs of Debian, each with work that it does in a tenant and says "done" after."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.tasks.world import World

INSTALL = """\
#!/bin/sh
set -e
apt-get update
apt-get install -y --no-install-recommends python3 lighttpd redis-server curl busybox-static
"""

THREADS = """\
import hashlib, os, queue, subprocess, tempfile, threading
done, work = [], queue.Queue()
def worker():
    while (item := work.get()) is not None:
        done.append(hashlib.sha256(b"x" * item).hexdigest())
threads = [threading.Thread(target=worker) for _ in range(8)]
for thread in threads: thread.start()
for item in range(200): work.put(item)
for thread in threads: work.put(None)
for thread in threads: thread.join()
assert len(set(done)) == 200
with tempfile.TemporaryDirectory() as directory:
    os.symlink("a", directory + "/b")
    assert os.listdir(directory) == ["b"]
assert subprocess.run(["/bin/echo", "child"], capture_output=True).stdout == b"child\\n"
print("done")
"""

LIGHTTPD = """\
server.document-root = "/home"
server.port = 8080
server.bind = "127.0.0.1"
server.errorlog = "/tmp/errors"
"""

# Each server has bound its socket, or written its pid, before it leaves the foreground: nothing is tried twice.
WEB = """\
lighttpd -f /home/lighttpd.conf
exec curl -s http://127.0.0.1:8080/hello.txt
"""

REDIS = """\
redis-server --bind 127.0.0.1 --dir /tmp --pidfile /tmp/pid --save '' --io-threads 2 --daemonize yes > /tmp/log
until [ -s /tmp/pid ]; do :; done
redis-cli -h 127.0.0.1 set key done > /dev/null
redis-cli -h 127.0.0.1 save > /dev/null
redis-cli -h 127.0.0.1 get key
"""

CURL = """\
busybox httpd -p 127.0.0.1:8081 -h /home
exec curl -s http://127.0.0.1:8081/hello.txt
"""

BUSYBOX = """\
#!/bin/busybox sh
cd /tmp
busybox seq 1000 > numbers
busybox gzip numbers && busybox gunzip numbers.gz
test "$(busybox awk '{s += $1} END {print s}' numbers)" = 500500
busybox mkdir -p a/b && busybox mv numbers a/b && busybox tar cf t.tar a && busybox rm -r a && busybox tar xf t.tar
test "$(busybox sort -n a/b/numbers | busybox tail -1)" = 1000
busybox ln -s a/b l && busybox find . -name numbers | busybox xargs busybox cat > /dev/null
echo done
"""

COMMANDS = {
    "python": ["/usr/bin/python3", "/home/threads.py"],
    "lighttpd": ["/bin/sh", "/home/web"],
    "redis": ["/bin/sh", "/home/redis"],
    "curl": ["/bin/sh", "/home/curl"],
    "busybox": ["/bin/busybox", "sh", "/home/busybox"],
}


@dataclass(frozen=True)
class Programs:
    """A world whose tenants share one layer that holds all five."""

    world: World

    def settings(self, name: str, text: str = "{}") -> None:
        """Write tenants.yaml with ``seccomp:`` of one tenant, and configure it."""
        lines = ["defaults: {ipc: none, install_network: host}", "bases: {default: {packages: []}}", "tenants:"]
        for tenant in COMMANDS:
            own = f", seccomp: {text}" if tenant == name else ""
            lines.append(f"  {tenant}: {{package: packages/{tenant}{own}}}")
        self.world.tenants.write_text("\n".join(lines) + "\n")
        done = self.world.doit(f"configure:{name}")
        assert done.returncode == 0, done.stdout + done.stderr

    def persist(self, name: str) -> Path:
        return self.world.root / "tenants_persist" / str(self.world.entry(name)["tid"])


def make(directory: Path, root: Path, lent: Path | None = None) -> Programs:
    """Build the layer, once, and configure the five; ``lent`` is a state directory that may hold the layer already."""
    if lent is not None and (lent / "layers").is_dir():
        subprocess.run(["cp", "-al", lent / "layers", root], check=True)
    for name, command in COMMANDS.items():
        package = directory / "packages" / name
        (package / "progs").mkdir(parents=True)
        config = {"tid": "", "cname": name, "dependencies": "/home/install_deps.sh", "init": command, "inputs": []}
        (package / "config.json").write_text(json.dumps(config))
        for path, text in {
            "install_deps.sh": INSTALL, "threads.py": THREADS, "lighttpd.conf": LIGHTTPD, "web": WEB, "redis": REDIS,
            "curl": CURL, "busybox": BUSYBOX, "hello.txt": "done\n",
        }.items():  # fmt: skip
            (package / "progs" / path).write_text(text)
            (package / "progs" / path).chmod(0o755)
    made = Programs(World(directory, root))
    made.settings("python")
    done = made.world.doit("configure")
    assert done.returncode == 0, done.stdout + done.stderr
    return made
