"""The harness itself: what a power cut keeps, and what a failure shows."""

from pathlib import Path

import pytest

from tests.vm.kernel import early_modules
from tests.vm.machine import Machine, MachineError


@pytest.mark.vm
def test_a_command_gives_its_status_and_both_of_its_outputs(machine: Machine) -> None:
    done = machine.run("sh", "-c", "echo one; echo two >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "one\n", "two\n")
    assert machine.run("/nowhere").returncode == 127


@pytest.mark.vm
def test_a_power_cut_keeps_what_was_synced_and_loses_what_was_not(machine: Machine) -> None:
    machine.check("sh", "-c", "mkdir /srv/cut && echo kept > /srv/cut/kept && sync && echo lost > /srv/cut/lost")
    machine.kill()
    machine.boot()
    assert machine.check("ls", "/srv/cut").split() == ["kept"]
    assert machine.check("cat", "/srv/cut/kept") == "kept\n"


@pytest.mark.vm
def test_a_machine_that_stops_itself_is_noticed_and_its_console_is_shown(machine: Machine) -> None:
    with pytest.raises(MachineError, match="is gone") as caught:
        machine.run("sh", "-c", "echo before; echo c > /proc/sysrq-trigger; sleep 60")
    assert "before" in str(caught.value)
    assert "sysrq triggered crash" in str(caught.value)
    machine.kill()
    machine.boot()


def test_modules_are_loaded_after_what_they_need() -> None:
    text = (
        "kernel/virtio_pci.ko: kernel/legacy.ko kernel/ring.ko kernel/virtio.ko\n"
        "kernel/virtio_blk.ko: kernel/ring.ko kernel/virtio.ko\nkernel/virtio_console.ko: kernel/virtio.ko\n"
    )
    order = [Path(path).stem for path in early_modules(text)]
    assert order == ["virtio", "ring", "legacy", "virtio_pci", "virtio_blk", "virtio_console"]
