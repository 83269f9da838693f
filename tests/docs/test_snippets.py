"""The examples in the documentation are valid: the YAML as tenants.yaml, the JSON as config.json."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from isochamber.errors import SpecError
from isochamber.spec import load, package
from tests.conftest import PROJECT
from tests.docs.pages import Block, Page, page, pages

_YAML = [(page, block) for page in pages() for block in page.blocks("yaml")]
_JSON = [(page, block) for page in pages() for block in page.blocks("json")]


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")


def _package(directory: Path, name: str) -> None:
    if not directory.exists():
        package.create(directory, name)


def _surroundings(block: Block, directory: Path) -> None:
    """Make what the snippet takes for granted: the packages and files that it names, or that lie in new_tenants/."""
    value: dict[str, Any] = yaml.safe_load(block.text)
    for base in (value.get("bases") or {}).values():
        for source in (base or {}).get("files", {}).values():
            _touch(directory / source)
    for name, tenant in (value.get("tenants") or {}).items():
        named = (tenant or {}).get("package")
        _package(directory / named if named else directory / "state/new_tenants" / name, name)


@pytest.mark.parametrize(("of", "block"), _YAML, ids=[f"{page}-{number}" for number, (page, _) in enumerate(_YAML)])
def test_every_yaml_snippet_is_a_valid_tenants_yaml(of: Page, block: Block, tmp_path: Path) -> None:
    _surroundings(block, tmp_path)
    file = tmp_path / "tenants.yaml"
    file.write_text(block.text)
    load.load(file, root=tmp_path / "state")


@pytest.mark.parametrize(("of", "block"), _JSON, ids=[f"{page}-{number}" for number, (page, _) in enumerate(_JSON)])
def test_every_json_snippet_is_a_valid_config_json(of: Page, block: Block, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(block.text)
    for name in ("install_deps.sh", "main", "sensor"):
        _touch(tmp_path / "progs" / name)
    package.read(tmp_path)


def test_a_snippet_with_a_mistake_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants:\n  sensor:\n    pakage: x\n")
    with pytest.raises(SpecError):
        load.load(file, root=tmp_path / "state")


def test_the_readmes_line_for_a_mistake_is_what_the_mistake_gives(tmp_path: Path) -> None:
    wanted = next(
        block.text.strip() for block in page("README.md").blocks("text") if block.text.startswith("tenants.yaml:")
    )
    place = wanted.split(": ")[0]
    line, column = map(int, place.split(":")[1:])
    file = tmp_path / "tenants.yaml"
    blanks = "#\n" * (line - 3)
    file.write_text(f"{blanks}tenants:\n  sensor:\n{' ' * (column - 1)}pakage: x\n")
    with pytest.raises(SpecError) as caught:
        load.load(file, root=tmp_path / "state")
    # The list of keys grows: the README leaves it out.
    given, allowed = caught.value.lines()[0].removeprefix(f"{tmp_path}/").split(", allowed: ")
    assert f"{given}, allowed: ..." == wanted
    assert "package" in allowed.split(", ")


def test_the_projects_own_tenants_yaml_is_valid_and_so_are_its_comments(tmp_path: Path) -> None:
    text = (PROJECT / "tenants.yaml").read_text()
    assert set(load.load(PROJECT / "tenants.yaml", root=tmp_path).tenants) == {"courier", "hello", "sensor"}
    # Every commented-out key, made active.
    lines = [
        line[2:] if line.startswith(("# root:", "# defaults:", "# bases:", "#   ")) and "./doit" not in line else line
        for line in text.splitlines()
        if not line.startswith("#   isochamber")
    ]
    file = tmp_path / "tenants.yaml"
    file.write_text("\n".join(lines).replace("package: examples", f"package: {PROJECT}/examples"))
    spec = load.load(file)
    assert {"default", "frozen", "old"} == set(spec.bases)
    assert spec.root == Path("/var/lib/isochamber")
    assert spec.tenants["sensor"].install_env == {"http_proxy": "http://proxy.example:3128"}
