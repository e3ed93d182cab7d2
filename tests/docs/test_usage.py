"""Every command has a page, which shows its options when it is built."""

import runpy

import pytest

from loralens.verbs import COMMANDS
from tests.conftest import ROOT

PAGES = ROOT / "docs" / "commands"
usage = runpy.run_path(str(ROOT / "docs" / "usage.py"))


def test_every_command_has_a_page_with_a_place_for_its_options() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in PAGES.glob("*.md")}
    assert pages.keys() == {*COMMANDS, "index"}
    assert [name for name, text in pages.items() if text.count(usage["MARK"]) != 1] == []


@pytest.mark.parametrize("command", ["compress", "fleet", "demo"])
def test_the_page_of_a_command_shows_its_help_and_its_function(command: str) -> None:
    text = usage["usage"](command)
    assert f"Usage: loralens {command}" in text
    assert ("loralens.compress(\n    source, " in text) == (command == "compress")
    assert ("Usage: loralens fleet near" in text) == (command == "fleet")


def test_the_overview_names_every_command() -> None:
    assert all(f"[`{name}`]({name}.md)" in usage["usage"]("index") for name in COMMANDS)
