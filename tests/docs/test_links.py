"""Every link from one page of the repository to another, or to a heading, finds what it names."""

import re
import unicodedata
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2$", re.DOTALL | re.MULTILINE)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as the sites that show Markdown make them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    found = (
        re.sub(r"[`*]", "", line.lstrip("#")).strip().lower() for line in text.splitlines() if line.startswith("#")
    )
    return {
        "#" + "".join(c for c in one.replace(" ", "-") if c in "-_" or unicodedata.category(c)[0] in "LN")
        for one in found
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for target, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} names {target}, which is not there"
        if anchor and there.suffix == ".md":
            assert anchor in slugs(there), f"{page.name} names {target}{anchor}; there are {sorted(slugs(there))}"
