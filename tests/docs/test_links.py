"""Every link leads somewhere."""

import pytest

from tests.conftest import PROJECT
from tests.docs.pages import Page, pages


@pytest.mark.parametrize("page", pages(), ids=str)
def test_every_relative_link_and_anchor_resolves(page: Page) -> None:
    for link in page.links():
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in Page(target).anchors(), f"{page}: {link}"


def test_every_page_of_the_docs_is_linked_from_their_index() -> None:
    index = Page(PROJECT / "docs/README.md")
    linked = {(index.path.parent / link.partition("#")[0]).resolve() for link in index.links()}
    assert {page.path for page in pages() if page.path.is_relative_to(PROJECT / "docs")} - linked == {index.path}


def test_the_only_mirror_that_is_named_is_debians() -> None:
    for page in pages():
        for word in page.text.split():
            if "://" in word and "debian" in word.lower():
                assert any(
                    host in word for host in ("http://deb.debian.org/", "https://www.debian.org", "snapshot.debian.org")
                ), f"{page}: {word}"
