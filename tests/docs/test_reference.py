"""The reference says what the code says: keys, codes, steps, imports, and the tests that security.md leans on."""

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from isochamber import errors, paths
from isochamber.build import entry
from isochamber.build.identity import Identity
from isochamber.build.state import State
from isochamber.launch import start
from isochamber.spec import load, package, validate
from tests.conftest import PROJECT
from tests.docs.pages import names_in_first_cells, page


def _keys_below(rules: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of mappings within mappings."""
    for rule in rules.values():
        yield from rule.get("schema", {}) if "dict" in rule["type"] else ()
        yield from _keys_below(rule["schema"]) if "dict" in rule["type"] and "schema" in rule else ()


def test_tenants_yaml_md_names_every_key_and_no_other() -> None:
    text = page("docs/reference/tenants.yaml.md")
    schema = validate.schema("tenants")
    tenant = schema["tenants"]["valuesrules"]["schema"]
    assert names_in_first_cells(text.section("Top level")) == set(schema)
    nested = set(_keys_below(tenant))
    assert names_in_first_cells(text.section("defaults, and each tenant")) == {*tenant, *nested}
    assert names_in_first_cells(text.section("bases")) == set(schema["bases"]["valuesrules"]["schema"])
    assert set(schema["defaults"]["schema"]) == set(tenant) - {"package"}


def test_tenants_yaml_md_gives_the_defaults_that_are_used(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: {some: {package: package}}\n")
    package.create(tmp_path / "package", "some")
    spec = load.load(file, root=tmp_path)
    tenant, base = spec.tenants["some"], spec.bases["default"]
    text = page("docs/reference/tenants.yaml.md").text
    for key, value in {
        "tmp": f"{tenant.limits.tmp >> 20}M",
        "shm": f"{tenant.limits.shm >> 20}M",
        "open_files": tenant.limits.open_files,
        "install_seconds": tenant.limits.install_seconds,
        "ipc": {paths.DEFAULT_IPC: "required"}.get(tenant.ipc or "", tenant.ipc),
        "network": tenant.network.mode,
        "base": tenant.base,
        "tool": base.tool,
        "suite": base.suite,
        "mirror": base.mirror,
        "variant": base.variant,
        "root": paths.DEFAULT_ROOT,
        "restart": tenant.service.restart,
        "ready": tenant.service.ready,
        "warm": tenant.service.warm,
        "signal": tenant.service.stop_signal,
        "grace": tenant.service.stop_grace,
        "count": tenant.service.log_count,
    }.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}` |"))
        assert row.split("|")[3].strip() == f"`{value}`", row


def test_config_json_md_names_every_key_and_no_other() -> None:
    text = page("docs/reference/config.json.md").text
    assert names_in_first_cells(text) == set(validate.schema("config"))


def test_config_json_md_and_the_guide_give_the_limits_that_are_enforced() -> None:
    for name in ("docs/reference/config.json.md", "docs/how-to/write-a-package.md"):
        text = page(name).text
        assert f"{package.MAX_ENTRIES:,} entries" in text
        assert f"{package.MAX_DEPTH} directories deep" in text
        assert f"{package.MAX_BYTES >> 30} GiB" in text
    assert f"at most {package.MAX_CONFIG_BYTES >> 10} KiB" in page("docs/reference/config.json.md").text


def test_containers_json_md_names_every_key_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: {some: {package: package}}\n")
    package.create(tmp_path / "package", "some")
    tenant = load.load(file, root=tmp_path).tenants["some"]
    made = entry.make(State(tmp_path), tenant, Identity("0" * 32, 524288), "default-0", None, {}, {})
    text = page("docs/reference/containers.json.md").text
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == list(made)


def test_exit_codes_md_has_every_code_of_ours() -> None:
    cells = [line.split("|")[1].strip() for line in page("docs/reference/exit-codes.md").text.splitlines()[1:]
             if line.startswith("| ")]  # fmt: skip
    codes = {
        errors.EXIT_OURS, errors.EXIT_NOT_EXECUTABLE, errors.EXIT_NOT_FOUND, errors.EXIT_BAD_INPUT,
    }  # fmt: skip
    assert {str(code) for code in codes} <= set(cells)
    assert f"{errors.EXIT_SIGNAL_BASE}+N" in cells


def _steps() -> list[str]:
    """Return the steps of the start, as its source names them, in order."""
    tree = ast.parse(Path(start.__file__).read_text())
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "step"
    ]  # fmt: skip
    return [
        str(call.args[0].value)
        for call in sorted(calls, key=lambda call: call.lineno)
        if isinstance(call.args[0], ast.Constant)
    ]


def test_architecture_md_lists_the_launchers_steps_in_order() -> None:
    section = page("docs/explanation/architecture.md").section("The launcher, in order")
    items = re.findall(r"^(\d+)\. \*\*([^*]+)\*\*:", section, re.MULTILINE)
    assert [name for _, name in items] == _steps()
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))


def test_architecture_md_numbers_the_steps_that_it_speaks_of() -> None:
    section = page("docs/explanation/architecture.md").section("The launcher, in order")
    steps = _steps()
    assert f"Until step {steps.index('join the user namespace') + 1} it is the host's root" in section
    assert f"the clone of step {steps.index('clone the IPC directory') + 1}" in section


def test_architecture_mds_table_has_every_package_in_the_order_that_import_linter_holds() -> None:
    contract = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [layer.removeprefix("isochamber.") for layer in contract["layers"] if not layer.endswith("__main__")]
    section = page("docs/explanation/architecture.md").section("The packages of the code")
    rows = re.findall(r"^\| (`isochamber/[^|]+) \|", section, re.MULTILINE)
    named = [name.removesuffix(".py") for row in rows for name in re.findall(r"`isochamber/([\w.]+)`", row)]
    assert set(named) == set(layers)
    assert [name for name in named if name not in ("errors", "paths")] == [
        layer for layer in reversed(layers) if layer not in ("errors", "paths")
    ]


def test_architecture_md_names_everything_that_lies_in_a_state_directory() -> None:
    section = page("docs/explanation/architecture.md").section("The state directory")
    for name in (
        paths.CONTAINERS, paths.NAMESPACE, paths.NEW_TENANTS, paths.BASES, paths.LAYERS, paths.TENANTS_FS,
        paths.TENANTS_PERSIST, paths.CACHE, paths.STAGING, paths.FILTERS, paths.LOGS,
    ):  # fmt: skip
        assert re.search(rf"^{re.escape(name)}\b", section, re.MULTILINE), name


def _promises() -> list[tuple[str, str]]:
    names = ("docs/explanation/security.md", "docs/explanation/durability.md")
    text = "".join(page(name).section("What is promised") for name in names)
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def test_security_md_names_tests() -> None:
    assert len(_promises()) >= 20


@pytest.mark.parametrize(("file", "test"), _promises())
def test_every_test_that_security_md_leans_on_exists(file: str, test: str) -> None:
    assert re.search(rf"^def {test}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_every_promise_has_a_test() -> None:
    text = page("docs/explanation/security.md").section("What is promised")
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| promise")):
            assert "`tests/" in line, line
