"""A network is made as planned, twice is once, and all of it goes with its tenant."""

from tests.net import world as w
from tests.net.world import World


def test_a_tenant_reaches_the_internet_it_was_granted_and_its_address_is_the_hosts_there(world: World) -> None:
    world.tenant("a", egress="all")
    world.apply()
    assert world.differences() == {}
    assert world.inside("a", lambda: w.tcp(w.OUTSIDE4)) == f"outside {w.HOST4}"
    assert world.inside("a", lambda: w.tcp(w.OUTSIDE6)) == f"outside {w.HOST6}"
    assert world.inside("a", lambda: w.udp(w.OUTSIDE4)) == f"outside {w.HOST4}"
    assert world.inside("a", lambda: w.udp(w.OUTSIDE6)) == f"outside {w.HOST6}"
    assert world.inside("a", lambda: w.ping(w.OUTSIDE4)) == "pong"
    assert world.inside("a", lambda: w.ping(w.OUTSIDE6)) == "pong"
