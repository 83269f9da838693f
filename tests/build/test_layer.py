"""Layers: one sandboxed run of an install script, sealed; what it is made of, and what is kept of it."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isochamber.build import base, contents, layer, manifest, tree
from isochamber.build.state import State
from isochamber.errors import IsochamberError
from tests.build.products import Bench, capability, eventually, owners, processes_of


@pytest.fixture
def bench(debian_state: State, tmp_path: Path) -> Bench:
    return Bench(debian_state, tmp_path / "package")


# What a layer is.


def test_a_package_without_an_install_script_has_no_layer(bench: Bench) -> None:
    bench.config = {"dependencies": ""}
    bench.put("main", "#!/bin/sh\n")
    tenant = bench.tenant()
    assert layer.recipe(tenant, bench.base, contents.digests(bench.state, tenant.package)) is None


def test_an_install_script_with_nothing_to_install_succeeds(bench: Bench) -> None:
    bench.script("apt-get update\napt-get install -y")
    product = bench.build()
    assert bench.layers() == [product]
    assert bench.staging() == []
    rest = {str(path.relative_to(bench.rootfs(product))) for path in bench.rootfs(product).rglob("*")}
    assert not [path for path in rest if path.startswith(("var/lib/apt/lists/", "var/cache/apt/"))]


def test_packages_are_installed_without_litter_and_the_next_build_takes_them_from_the_cache(bench: Bench) -> None:
    before = manifest.describe_tree(bench.state.base(bench.base) / "rootfs")
    bench.script("apt-get update\napt-get install -y hello\nhello")
    product = bench.build()
    rootfs = bench.rootfs(product)
    assert owners(rootfs / "usr/bin/hello") == (0, 0)
    for litter in ("var/log/dpkg.log", "var/log/apt/history.log", "var/lib/apt/lists/lock", "etc/resolv.conf"):
        assert not (rootfs / litter).exists(), litter
    assert "Package: hello" in (rootfs / "var/lib/dpkg/status").read_text()
    assert "Hello, world!" in bench.log()
    described = manifest.read(bench.state.layer(product))
    assert (described.tree, described.size) == manifest.describe_tree(rootfs)

    bench.script("apt-get update\napt-get install -y hello\nhello --greeting=again")
    assert bench.build() != product
    assert "Need to get 0 B" in bench.log()
    assert manifest.describe_tree(bench.state.base(bench.base) / "rootfs") == before, "the base was written to"


def test_what_the_script_leaves_in_home_is_part_of_the_layer(bench: Bench) -> None:
    for name in ("kept", "changed", "removed", "touched"):
        bench.put(name, name)
    bench.put("tool", "#!/bin/sh\n")
    bench.script(
        "cd /home; echo more >> changed; rm removed; touch touched; mkdir -p venv/bin; cp tool venv/bin/tool\n"
        "ln -s bin/tool venv/link; mkfifo fifo; chmod 4755 tool"
    )
    product = bench.build()
    extra = manifest.read(bench.state.layer(product)).extra
    assert set(extra["home"]) == {"changed", "venv", "venv/bin", "venv/bin/tool", "venv/link"}
    assert extra["home_removed"] == ["removed"]
    left = bench.home(product)
    assert (left / "changed").read_text() == "changedmore\n"
    assert os.readlink(left / "venv/link") == "bin/tool"
    assert {path.name for path in left.iterdir()} == {"changed", "venv"}
    assert owners(left / "changed") == (0, 0)


def test_a_script_without_a_first_line_runs_in_a_shell(bench: Bench) -> None:
    bench.put("install_deps.sh", "echo plain > /etc/made\n")
    assert (bench.rootfs(bench.build()) / "etc/made").read_text() == "plain\n"


def test_the_script_sees_nothing_of_the_hosts_environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the host")
    bench.install_env = {"GRANTED": "by the operator"}
    bench.script("env > /etc/seen; cat /proc/1/environ | tr '\\0' '\\n' > /etc/seen1; hostname > /etc/host; id -u")
    rootfs = bench.rootfs(bench.build())
    for name in ("seen", "seen1"):
        seen = (rootfs / "etc" / name).read_text()
        assert "GRANTED=by the operator" in seen
        assert "SECRET" not in seen
    assert (rootfs / "etc/host").read_text().strip() != os.uname().nodename


# When it is built again.


SCRIPT = "cat /home/read; ls /home/conf.d; /home/tool; mv /home/renamed /home/elsewhere; ln /home/linked /opt/x || true"


@pytest.fixture
def observed(bench: Bench) -> Bench:
    for path in ("read", "unread", "renamed", "conf.d/a", "linked"):
        bench.put(path, f"{path}\n")
    bench.put("tool", "#!/bin/sh\n: a tool\n")
    bench.script(SCRIPT)
    bench.build()
    return bench


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda bench: bench.put("unread", "other\n"), False),
        (lambda bench: bench.put("conf.d/a", "other content, same names\n"), False),
        (lambda bench: os.utime(bench.progs / "read"), False),
        (lambda bench: bench.put("another", "one\n"), False),
        (lambda bench: bench.config.update(env={"FOR": "the program"}), False),
        (lambda bench: bench.put("read", "other\n"), True),
        (lambda bench: bench.put("conf.d/b", "another name\n"), True),
        (lambda bench: bench.put("tool", "#!/bin/sh\n: another tool\n"), True),
        (lambda bench: (bench.progs / "tool").chmod(0o644), True),
        (lambda bench: bench.put("renamed", "never opened, but its content has another name now\n"), True),
        (lambda bench: bench.script(SCRIPT + "\n"), True),
        (lambda bench: setattr(bench, "install_env", {"NEW": "1"}), True),
        (lambda bench: bench.config.update(inputs=["read", "conf.d", "tool", "renamed", "linked"]), True),
    ],
)
def test_only_what_the_script_looked_at_makes_another_layer(observed: Bench, change: object, again: bool) -> None:
    assert observed.find() is not None
    change(observed)  # type: ignore[operator]
    assert (observed.find() is None) is again


def test_a_layer_of_former_inputs_is_found_again(observed: Bench) -> None:
    (first,) = observed.layers()
    observed.put("read", "other\n")
    second = observed.build()
    assert len(observed.layers()) == 2
    observed.put("read", "read\n")
    assert observed.build() == first != second


def test_the_reason_for_another_layer_is_said(observed: Bench) -> None:
    (former,) = observed.layers()
    observed.script(SCRIPT + "\necho more")
    observed.put("read", "other\n")
    observed.put("unread", "other\n")
    observed.build(former)
    said = [line for line in observed.reporter.said if line.endswith(("changed", "is new", "is gone"))]
    assert said == ["layer of sensor: install_deps.sh changed", "layer of sensor: read changed"]


def test_a_file_of_the_package_can_not_pass_for_another_input(bench: Bench) -> None:
    bench.config = {"dependencies": "/home/base"}
    bench.put("base", "#!/bin/sh\ncat /home/inputs\n")
    bench.put("inputs", "one")
    first = bench.build()
    bench.put("base", "#!/bin/sh\ncat /home/inputs\n:\n")
    assert bench.find() is None
    inputs = dict(manifest.read(bench.state.layer(first)).inputs.items)
    assert inputs["base"] == bench.base
    assert {"/home/base", "/home/inputs", "inputs"} <= set(inputs)


def test_inputs_narrow_what_the_script_sees(bench: Bench) -> None:
    bench.config = {"inputs": ["conf.d"]}
    bench.put("conf.d/a", "a")
    bench.put("secret", "s")
    bench.script("cd /home; find . | sort > /etc/seen")
    seen = (bench.rootfs(bench.build()) / "etc/seen").read_text().split()
    assert seen == [".", "./conf.d", "./conf.d/a", "./install_deps.sh"]
    bench.put("another", "file that the listing does not show")
    assert bench.find() is not None


def test_of_two_that_build_one_recipe_the_second_waits_and_finds(bench: Bench) -> None:
    bench.script("touch /home/begun; while [ ! -e /home/go ]; do sleep 0.05; done; rm /home/begun /home/go")
    second = Bench(bench.state, bench.directory)
    products: list[str] = []
    threads = [threading.Thread(target=lambda one=one: products.append(one.build())) for one in (bench, second)]
    threads[0].start()
    homes = list[Path]()

    def begun() -> bool:
        homes[:] = [path.parent for path in bench.state.staging.glob("*/home/begun")]
        return bool(homes)

    assert eventually(begun), bench.reporter.said
    threads[1].start()
    assert eventually(lambda: any("waiting for layer-" in line for line in second.reporter.said))
    (homes[0] / "go").touch()
    for thread in threads:
        thread.join(60)
    assert products == [products[0]] * 2
    assert bench.layers() == [products[0]]
    assert not [line for line in second.reporter.said if line.endswith(": building")], "it ran the script again"


# When it fails.


def test_a_failing_script_gives_its_status_its_last_lines_and_its_log_and_leaves_nothing(bench: Bench) -> None:
    bench.script("echo first; echo 'E: \033[31mlast words'; exit 42")
    with pytest.raises(IsochamberError) as failed:
        bench.build()
    line, *notes = failed.value.lines()
    assert "sensor: layer: " in line
    assert "exited with 42" in line
    assert str(bench.state.log("layer-sensor")) in line
    assert [note.strip() for note in notes] == ["first", "E: \\x1b[31mlast words"]
    assert bench.layers() == bench.staging() == []


@pytest.mark.parametrize(
    "script",
    [
        "sleep 1000",
        "trap '' TERM INT HUP; setsid -f sh -c 'trap \"\" TERM; sleep 1000'; while :; do sleep 1000 || true; done",
    ],
)
def test_a_script_that_takes_too_long_is_killed_with_all_it_started(bench: Bench, script: str) -> None:
    bench.install_seconds = 1
    bench.script(script)
    with pytest.raises(IsochamberError, match=r"killed after 1 s \(limits: install_seconds\)"):
        bench.build()
    uid_base = next((bench.state.root / "tenants_fs").iterdir()).joinpath("upper").stat().st_uid
    assert processes_of(uid_base) == []
    assert bench.layers() == bench.staging() == []


def test_a_flood_of_output_ends_in_a_bounded_log(bench: Bench) -> None:
    bench.script("head -c 40000000 /dev/zero | tr '\\0' x; echo; seq 1 300000; echo the end; exit 1")
    with pytest.raises(IsochamberError) as failed:
        bench.build()
    assert failed.value.notes[-1] == "the end"
    assert all(len(note) <= 5000 for note in failed.value.notes)
    log = bench.state.log("layer-sensor")
    assert log.stat().st_size < 17 << 20
    assert log.read_text().endswith("the end\n")
    assert "bytes more; the last lines:" in bench.log()


def test_a_daemon_that_the_script_leaves_is_dead_before_the_layer_is_sealed(bench: Bench) -> None:
    bench.script("setsid -f sh -c 'while :; do date >> /opt/growing; done' > /dev/null 2>&1 < /dev/null")
    product = bench.build()
    uid_base = next((bench.state.root / "tenants_fs").iterdir()).joinpath("upper").stat().st_uid
    assert processes_of(uid_base) == []
    described = manifest.read(bench.state.layer(product))
    assert manifest.describe_tree(bench.rootfs(product)) == (described.tree, described.size)


BUILDER = """
import sys
from pathlib import Path
from isochamber.build.state import State
from tests.build.products import Bench
Bench(State(Path(sys.argv[1])), Path(sys.argv[2])).build()
"""


def test_when_the_builder_is_killed_nothing_runs_on_and_the_next_build_succeeds(bench: Bench) -> None:
    bench.script("trap '' TERM; if [ ! -e /home/patient ]; then touch /home/begun; sleep 1000; fi")
    argv = [sys.executable, "-c", BUILDER, str(bench.state.root), str(bench.directory)]
    builder = subprocess.Popen(argv, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    assert eventually(lambda: bool(list(bench.state.staging.glob("*/home/begun"))))
    uid_base = next((bench.state.root / "tenants_fs").iterdir()).joinpath("upper").stat().st_uid
    assert processes_of(uid_base)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert eventually(lambda: not processes_of(uid_base))
    assert bench.layers() == []
    bench.put("patient", "")
    assert bench.build() in bench.layers()


# What a hostile script tries.

# setxattr(2) by perl: a minimal Debian has no program for it.
NUMBER = {"x86_64": 188, "aarch64": 5}.get(os.uname().machine, 0)
SETXATTR = f"""\
my ($file, $name, $value) = ($ARGV[0], $ARGV[1], pack("H*", $ARGV[2]));
exit(syscall({NUMBER}, $file, $name, $value, length $value, 0) != 0);
"""


def test_what_a_hostile_script_forges_is_not_in_the_layer(bench: Bench) -> None:
    bench.put("setxattr.pl", SETXATTR)
    bench.script(
        f"""
        cd /opt
        cp /bin/true setuid; chown 33:33 setuid; chmod 6755 setuid
        cp /bin/true capable; perl /home/setxattr.pl capable security.capability {capability().hex()}
        mkfifo fifo
        perl -e 'use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un("socket")) or die $!'
        touch forged; perl /home/setxattr.pl forged user.overlay.redirect 2f657463
        perl /home/setxattr.pl forged trusted.overlay.redirect 2f657463 && exit 9
        mknod mem c 1 1 2>/dev/null && exit 10
        mknod whiteout c 0 0 2>/dev/null && exit 11
        rm /etc/issue
        rm -r /usr/share/keyrings; mkdir /usr/share/keyrings; touch /usr/share/keyrings/own
        """
    )
    product = bench.build()
    opt = bench.rootfs(product) / "opt"
    assert {path.name for path in opt.iterdir()} == {"setuid", "capable", "forged"}
    assert (owners(opt / "setuid"), stat.S_IMODE((opt / "setuid").stat().st_mode)) == ((33, 33), 0o6755)
    assert os.getxattr(opt / "capable", "security.capability") == capability()
    assert os.listxattr(opt / "forged") == []
    issue = os.lstat(bench.rootfs(product) / "etc/issue")
    assert stat.S_ISCHR(issue.st_mode), "a removal is a whiteout, and stays"
    assert issue.st_rdev == 0
    assert os.getxattr(bench.rootfs(product) / "usr/share/keyrings", "trusted.overlay.opaque") == b"y"
    said = "\n".join(bench.reporter.said)
    for phrase in ("opt/fifo: a FIFO", "opt/socket: a socket", "opt/forged: the attribute user.overlay.redirect"):
        assert phrase in said
    descriptor = os.open(bench.state.layer(product), tree.DIRECTORY)
    try:
        kinds = {item.kind for item in tree.walk(descriptor, stage="test")}
        ids = {
            number
            for item in tree.walk(descriptor, stage="test")
            for number in (item.status.st_uid, item.status.st_gid)
        }
    finally:
        os.close(descriptor)
    assert kinds <= {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR}
    assert max(ids) < 65536


def test_a_script_that_makes_a_tree_to_exhaust_us_fails_alone_and_is_cleaned_up(bench: Bench) -> None:
    bench.script("cd /opt; i=0; while [ $i -lt 400 ]; do mkdir dddddddddd; cd -P dddddddddd; i=$((i+1)); done")
    with pytest.raises(IsochamberError, match="deeper than") as failed:
        bench.build()
    assert failed.value.tenant == "sensor"
    assert bench.layers() == bench.staging() == []


def test_a_script_can_not_put_a_package_of_its_own_into_the_cache(bench: Bench) -> None:
    bench.script(
        """
        apt-get update
        cd /var/cache/apt/archives
        apt-get download hello tree
        printf X | dd of=$(echo hello_*.deb) bs=1 seek=30000 conv=notrunc   # the size stays: apt would take it
        mv tree_*.deb coreutils_99_all.deb                                   # genuine, under a name that is not its own
        cp coreutils_99_all.deb evil_1_all.deb; echo x >> evil_1_all.deb
        ln -s /etc/shadow link_1_all.deb; mkfifo fifo_1_all.deb; mkdir dir_1_all.deb
        """
    )
    bench.build()
    cache = base.deb_cache(bench.state, bench.base)
    names = {path.name.split("_")[0] for path in cache.iterdir()}
    assert "tree" in names, "what is genuine is kept, under its own name"
    assert not names & {"hello", "evil", "link", "fifo", "dir"}
    assert not [path for path in cache.iterdir() if path.name.startswith("coreutils_99")]


def test_lists_that_nobody_signed_vouch_for_nothing(bench: Bench) -> None:
    bench.script(
        """
        apt-get update
        cd /var/cache/apt/archives
        echo evil > evil_1_all.deb
        cd /var/lib/apt/lists
        printf 'Package: evil\\nVersion: 1\\nArchitecture: all\\nSHA256: %s\\n\\n' \
            $(sha256sum /var/cache/apt/archives/evil_1_all.deb | cut -d' ' -f1) > forged_Packages
        sum=$(sha256sum forged_Packages | cut -d' ' -f1)
        printf 'SHA256:\\n %s 1 main/binary-amd64/Packages\\n' $sum > forged_InRelease
        real=$(ls *_InRelease | grep -v forged)
        cp $real after_InRelease; cat forged_InRelease >> after_InRelease    # outside of what was signed
        (cat forged_InRelease; cat $real) > before_InRelease
        sed "s/^SHA256:/&\\n $sum 1 x/" $real > within_InRelease
        """
    )
    bench.build()
    assert not list(base.deb_cache(bench.state, bench.base).glob("evil*"))


def test_a_run_can_not_write_to_the_cached_packages_it_sees(bench: Bench) -> None:
    cache = base.deb_cache(bench.state, bench.base)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.iterdir()}
    assert before, "the base's packages are cached"
    bench.script("cd /var/cache/apt/archives; ls *.deb | wc -l; for f in *.deb; do echo x > $f; done; rm -f *.deb")
    bench.build()
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in cache.iterdir()} == before
    assert int(bench.log().split()[0]) == len(before)


def test_the_cache_may_be_deleted_at_any_time(bench: Bench) -> None:
    shutil.rmtree(bench.state.root / "cache")
    bench.script("touch /opt/x")
    assert (bench.rootfs(bench.build()) / "opt/x").exists()
