"""What a tenant is called and writes, looked at through the supervisor: byte by byte as a terminal gets it."""

from collections.abc import Callable

from tests.cli.test_escaped import NASTY, STEERS
from tests.launch.tenants import Tenant
from tests.serve.world import Terminal, World, eventually


def test_no_verb_of_the_supervisor_steers_the_terminal(world: World, add: Callable[..., Tenant]) -> None:
    words = ["/bin/sh", "-c", "printf '%s\\n' \"$0\"; printf '%s\\n' \"$0\" >&2; sleep 1000", NASTY]
    tenant = add(name=f"t{NASTY}", argv=words)
    world.begin()
    world.ask("start", tenant.tid)
    eventually(lambda: world.cli("logs", tenant.tid).stdout != "", "it has written")
    for verb in (
        ["ps"], ["ps", "--format", "{name} {command}"], ["ps", "--json"], ["stats", "--no-stream"],
        ["logs", tenant.tid], ["logs", "-t", tenant.tid], ["logs", "--json", tenant.tid], ["events", "--no-stream"],
        ["metrics"], ["ls"], ["stop", "-t", "0", tenant.tid], ["ps", "-a"],
    ):  # fmt: skip
        screen = Terminal(world.command(*verb))
        assert screen.end() == 0, screen.seen
        said = screen.seen.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
        assert STEERS.search(said) is None, (verb, said)
        assert "1b" in said or verb[0] == "stop", (verb, said)  # stop says what it was asked for: the tid
