"""The documentation as data: its pages, their fenced blocks, links, headings and tables."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PROJECT

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language and its text."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(PROJECT))

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The file without its fenced blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[Block]:
        """Return the fenced blocks of one language."""
        return [Block(*match) for match in _FENCE.findall(self.text) if match[0] == language]

    def links(self) -> list[str]:
        """Return the target of every link."""
        return _LINK.findall(self.prose)

    def anchors(self) -> set[str]:
        """Return the anchors that its headings make: lower case, no punctuation, hyphens for blanks."""
        return {
            re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
            for heading in _HEADING.findall(self.prose)
        }

    def section(self, heading: str) -> str:
        """Return what stands below the heading ``## <heading>`` up to the next of its kind."""
        return self.text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]

    def codes(self) -> list[str]:
        """Return every inline code of the prose."""
        return _CODE.findall(self.prose)


def pages() -> list[Page]:
    """Return every Markdown file of the project's own."""
    names = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"]
    return [Page(PROJECT / name) for name in names] + [Page(path) for path in sorted((PROJECT / "docs").rglob("*.md"))]


def page(name: str) -> Page:
    """Return one of them by its path in the project."""
    return Page(PROJECT / name)


def first_cells(text: str) -> list[list[str]]:
    """Return, for every row of the tables in ``text``, the codes of its first cell (heads and rules have none)."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return [codes for cell in rows if (codes := _CODE.findall(cell))]


def names_in_first_cells(text: str) -> set[str]:
    """Return every code of every first cell."""
    return {code for codes in first_cells(text) for code in codes}


def commands(of: Page) -> Iterator[str]:
    """Yield the command lines of a page: lines of its sh blocks, and inline codes that begin with a command of ours."""
    for block in of.blocks("sh"):
        yield from (line for line in block.text.splitlines() if line and not line.startswith("#"))
    yield from (code for code in of.codes() if code.startswith(("./doit", "isochamber ")))
