"""Words are quoted so that bash reads them back as they were."""

import subprocess

import pytest

from loralens.core.messages import command_line, quote_word

WORDS = [
    "plain",
    "two words",
    "it's",
    '"x"',
    "$HOME",
    "a\nb",
    "tab\there",
    "\r",
    "back\\slash\n'",
    "\x1b[31m",
    "日本\n",
    "",
]


@pytest.mark.parametrize("word", WORDS)
def test_bash_reads_the_word_back(word: str) -> None:
    done = subprocess.run(["bash", "-c", f"printf %s {quote_word(word)}"], capture_output=True, check=True)
    assert done.stdout.decode() == word
    assert quote_word(word).isprintable()


def test_a_command_stands_on_one_line() -> None:
    assert command_line("loralens", "report", "a\nb", "c d") == r"loralens report $'a\nb' 'c d'"
