"""The documents name no option that does not exist, and the workflow of the cookbook has the inputs of the action."""

import re
from pathlib import Path

import click
import pytest

from loralens.verbs import COMMANDS
from tests.cli.command import main
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
# Options of other programs, each in the pages that may name it.
OTHERS = {
    "--concat": {"doctor.md", "others.md"},  # sd-scripts
    "--clamp": {"others.md"},  # sd-scripts: --clamp_quantile
    "--no-deps": {"formats.md", "paper.md", "train.md"},  # pip
    "--full": {"paper.md"},  # examples/nlg_study.py and without_regret_study.py
    "--nproc-per-node": {"train.md"},  # torchrun
    "--lora": {"low_bit.md"},  # llama.cpp
    "--max-lora-rank": {"cookbook.md"},  # vLLM
}


def options_of(command: click.Command) -> set[str]:
    """The options of a command; those of a group are the options of all its sub-commands."""
    named = {
        name
        for param in command.params
        if isinstance(param, click.Option)
        for name in (*param.opts, *param.secondary_opts)
    }
    if isinstance(command, click.Group):
        context = click.Context(command)
        parts = (command.get_command(context, name) for name in command.list_commands(context))
        named = named.union(*(options_of(part) for part in parts if part))
    return named | {"--help"}


OPTIONS = {name: options_of(main.get_command(click.Context(main), name)) for name in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_in_a_page_exists(page: Path) -> None:
    known = {"--version"}.union(*OPTIONS.values()) | {name for name, pages in OTHERS.items() if page.name in pages}
    for line in page.read_text(encoding="utf-8").splitlines():
        assert set(OPTION.findall(line)) <= known, line
        for command, words in re.findall(r"\bloralens ([a-z]+)\b([^`|;&()]*)", line):
            if command in OPTIONS:
                assert set(OPTION.findall(words)) <= OPTIONS[command] | OTHERS.keys(), line


def test_the_workflow_of_the_cookbook_has_the_inputs_of_the_action() -> None:
    inputs = (ROOT / "action.yml").read_text(encoding="utf-8").partition("inputs:")[2].partition("outputs:")[0]
    known = set(re.findall(r"^  ([a-z-]+):$", inputs, re.MULTILINE))
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    step = page.partition("uses: OWNER/loralens@VERSION")[2].partition("      - uses:")[0]
    given = set(re.findall(r"^          ([a-z-]+):", step, re.MULTILINE))
    assert "adapters" in given
    assert given <= known
