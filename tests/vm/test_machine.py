"""The harness itself: what a power cut keeps, and what a failure shows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import image
from tests.vm.kernel import early_modules
from tests.vm.machine import Machine, MachineError, Parts


@pytest.fixture(scope="module")
def small(parts: Parts, scratch: Path) -> Iterator[Machine]:
    """A machine with an empty data disk."""
    with Machine(parts, scratch / "small", image.make_data(scratch / "small.img", None, "64M"), memory="512M") as made:
        yield made


@pytest.mark.vm
def test_a_command_gives_its_status_and_both_of_its_outputs(small: Machine) -> None:
    done = small.run("sh", "-c", "echo one; echo two >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "one\n", "two\n")
    assert small.run("/nowhere").returncode == 127


@pytest.mark.vm
def test_a_power_cut_keeps_what_was_synced_and_loses_what_was_not(small: Machine) -> None:
    small.check("sh", "-c", "echo kept > /srv/kept && sync && echo lost > /srv/lost")
    small.kill()
    small.boot()
    assert small.check("ls", "/srv").split() == ["kept", "lost+found"]
    assert small.check("cat", "/srv/kept") == "kept\n"


@pytest.mark.vm
def test_a_reboot_in_order_loses_nothing(small: Machine) -> None:
    small.check("sh", "-c", "echo kept > /srv/unsynced")
    small.reboot()
    assert small.check("cat", "/srv/unsynced") == "kept\n"


@pytest.mark.vm
def test_a_machine_that_stops_itself_is_noticed_and_its_console_is_shown(small: Machine) -> None:
    with pytest.raises(MachineError, match="is gone") as caught:
        small.run("sh", "-c", "echo before; echo c > /proc/sysrq-trigger; sleep 60")
    assert "before" in str(caught.value)
    assert "sysrq triggered crash" in str(caught.value)
    small.kill()
    small.boot()


def test_modules_are_loaded_after_what_they_need() -> None:
    text = (
        "kernel/virtio_pci.ko: kernel/legacy.ko kernel/ring.ko kernel/virtio.ko\n"
        "kernel/virtio_blk.ko: kernel/ring.ko kernel/virtio.ko\nkernel/virtio_console.ko: kernel/virtio.ko\n"
    )
    order = [Path(path).stem for path in early_modules(text)]
    assert order == ["virtio", "ring", "legacy", "virtio_pci", "virtio_blk", "virtio_console"]
