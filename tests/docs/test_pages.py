"""Every page of a command has the same parts in the same order, so that a reader in a hurry knows where to look."""

from pathlib import Path

import pytest

from loralens.verbs import VERBS

PAGES = Path(__file__).parents[2] / "docs" / "commands"
ORDER = ["Example", "How to read the output", "Options", "Python", "Notes"]


@pytest.mark.parametrize("command", [*VERBS, "demo", "fleet"])
def test_the_parts_of_a_page_come_in_their_order(command: str) -> None:
    # What is inside of blocks is the output of programs.
    *outside, last = (PAGES / f"{command}.md").read_text(encoding="utf-8").split("\n```")[::2]
    lines = "\n".join([*outside, last]).splitlines()
    assert lines[0] == f"# loralens {command}"
    assert lines[2].endswith("?") or "? " in lines[2], "a page begins with the question that it answers"
    # Neither the demo nor fleet is a function.
    wanted = [title for title in ORDER if title != "Python" or command in VERBS]
    assert [line.removeprefix("## ") for line in lines if line.startswith("#")][1:] == wanted
