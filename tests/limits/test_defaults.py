"""Who names no limit has some all the same, and an install script has its own."""

from isochamber.build import limits
from isochamber.spec.load import _limits, half_of_memory
from tests.launch.tenants import Tenant
from tests.launch.test_plan import _run
from tests.limits import groups


def test_a_tenant_that_names_none_is_limited_and_starts_whatever_the_machine_has() -> None:
    found = _limits({})
    assert limits.groups(found) == {"memory": half_of_memory(), "swap": 0, "processes": 512, "cpu_weight": 100}
    assert limits.required(found) == []
    assert limits.install_required(found) == []
    assert limits.rlimits(found)["CORE"] == 1


def test_what_was_named_must_be_in_force_unless_it_is_best_effort() -> None:
    named = {"memory": "64M", "cpus": 0.5, "install_memory": "1G", "tmp": "1M"}
    assert limits.required(_limits(named)) == ["cpu_quota", "memory"]
    assert limits.groups(_limits(named))["cpu_quota"] == 50_000
    assert limits.install_required(_limits(named)) == ["memory"]
    assert limits.required(_limits({**named, "best_effort": True})) == []


def test_an_install_script_can_not_fork_without_end(tenant: Tenant) -> None:
    groups.require("pids")
    fork = "my $p = fork; last if !defined $p; if (!$p) { sleep 1000 } $n++"
    count = f"exec perl -e 'my $n = 0; while ($n < 60) {{ {fork} }} print $n'"
    assert _run(tenant, count).stdout == "60", "the control: without the limit"
    assert int(_run(tenant, count, limits={"processes": 20}).stdout) < 20
