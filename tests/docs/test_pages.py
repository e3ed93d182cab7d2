"""Every page says in its first line for whom it is, and the pages of commands have the same parts in the same order."""

from pathlib import Path

import pytest

from loralens.verbs import COMMANDS
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [page for page in DOCS.rglob("*.md") if page.name not in ("glossary.md", "json.md", "benchmarks.md")]
FIRST, LAST = ["Example", "How to read the output"], ["Python", "Options"]


def lines_outside_of_blocks(page: Path) -> list[str]:
    *outside, last = page.read_text(encoding="utf-8").split("\n```")[::2]
    return "\n".join([*outside, last]).splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_says_for_whom_it_is(page: Path) -> None:
    assert lines_outside_of_blocks(page)[2].startswith("For ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parts_of_a_page_come_in_their_order(command: str) -> None:
    lines = lines_outside_of_blocks(DOCS / "commands" / f"{command}.md")
    assert lines[0] == f"# loralens {command}"
    # The demo is no function.
    wanted = [*FIRST, *LAST] if command != "demo" else [*FIRST, "Options"]
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == wanted
