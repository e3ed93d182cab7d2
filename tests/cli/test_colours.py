"""Colours: on a terminal, unless NO_COLOR says otherwise; never in a pipe."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loralens
from tests.cli.terminals import read_until

PACKAGE = Path(loralens.__file__).parent
ESCAPE = "\x1b["
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m")
MAY_STYLE = {"cli/messages.py"}  # rich there; click.secho anywhere, which `main` switches off

RUN = [sys.executable, "-m", "loralens"]


def on_a_terminal(command: list[str], **more: str) -> str:
    """What a command writes where standard output and error are a terminal."""
    ours, theirs = os.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm-256color"} | more)
    told = read_until(ours, theirs, process.wait)
    assert process.returncode == 0
    return told


@pytest.mark.slow
def test_a_terminal_gets_colours_and_with_no_color_none(small: Path) -> None:
    command = [*RUN, "spectrum", str(small)]
    assert COLOUR.search(on_a_terminal(command))
    plain = on_a_terminal(command, NO_COLOR="1")
    assert "q_proj" in plain
    assert not COLOUR.search(plain)


@pytest.mark.slow
def test_nobody_else_writes_escapes() -> None:
    """So the tests above stand for every command."""
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).as_posix() in MAY_STYLE:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert ESCAPE not in node.value, file
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert not _imported(node) & {"rich", "colorama", "termcolor"}, file


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The packages that a statement imports from."""
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").partition(".")[0]}
    return {alias.name.partition(".")[0] for alias in node.names}
