"""Completion in the shell: what is offered, what is imported for it, and that the scripts are what shells can read."""

import os
import shutil
import subprocess
import sys

import pytest

from loralens.verbs import COMMANDS

SHELLS = ("bash", "zsh", "fish")


def completed(*words: str) -> list[str]:
    """What bash is told for the last of the words: kind and text."""
    asked = {"_LORALENS_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from loralens.cli.main import run; run()"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_names_of_commands_and_of_options_are_completed() -> None:
    assert completed("loralens", "sp") == ["plain,spectrum"]
    assert completed("loralens", "''") == [f"plain,{name}" for name in COMMANDS]
    assert completed("loralens", "merge", "--ba") == ["plain,--base"]
    assert "plain,update" in completed("loralens", "similarity", "--of", "u")


@pytest.mark.some(1)
@pytest.mark.parametrize("words", [("spectrum", "ch"), ("combine", "ch"), ("amplify", "x", "--base", "ch")])
def test_paths_are_left_to_the_shell(words: tuple[str, ...]) -> None:
    assert completed("loralens", *words) == ["file,ch"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_that_it_can_read(shell: str) -> None:
    code = f"import os; os.environ['_LORALENS_COMPLETE'] = '{shell}_source'; from loralens.cli.main import run; run()"
    script = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"_LORALENS_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
