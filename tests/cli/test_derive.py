"""Commands are derived from functions: every option has a text and its function's default, and the examples run."""

import ast
import re
import shlex
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.command_table import ARGUMENTS, HEADINGS, METAVARS, NAMES, RANGES, ROWS, Row
from loralens.cli.commands import command_of
from loralens.cli.derive import DerivedCommand, DerivedGroup, derive, read_function
from loralens.exports import Options, takes_options
from loralens.verbs import COMMANDS, VERBS
from tests.cli.command import Command, main

EXAMPLE = '''
"""A module with a function."""

from typing import Literal


def weigh(
    *adapters: Source, base: str | PathLike[str], top: int | None = None, share: float = 0.5, no_top: bool = False,
    tied: bool | None = None, modules: Sequence[str] = (), seed: int = 0, to: TargetFormat = "peft",
) -> None:
    """Weigh
    adapters.

    With ``no_top`` the ``adapters`` are not compared; see `loralens.spectrum`.

    Parameters
    ----------
    *adapters : path
    base, top : path and int
        What both
        say.

        For Python alone.
    share
        A share.
    no_top
        No top.

    Examples
    --------
    $ loralens weigh adapter --base model
    """
'''


@pytest.fixture
def weigh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> click.Command:
    """A command of the function above; it prints what it is called with."""
    (tmp_path / "weighing.py").write_text(EXAMPLE)
    monkeypatch.setattr("loralens.cli.derive.SOURCES", tmp_path)
    function = read_function("weighing", "weigh", Row())
    return derive("weigh", function, Row(shows=False), lambda values, given: print(values, sorted(given), sep="\n"))


def test_a_signature_and_its_text_become_a_command(weigh: click.Command) -> None:
    page = CliRunner().invoke(weigh, ["--help"], terminal_width=80).output
    lines = " ".join(page.split())
    assert "weigh [OPTIONS] ADAPTER..." in lines
    assert "Weigh adapters. Examples: loralens weigh adapter --base model Options: --base MODEL What both say." in lines
    assert "Python alone" not in page
    assert "More: With --no-top the ADAPTER are not compared; see `loralens spectrum`." in lines
    assert "--share X A share. [default: 0.5]" in lines
    assert "--tied / --no-tied" in lines
    assert page.index("Options:") < page.index("Writing:") < page.index("--to [peft|") < page.index("Computing:")


def test_values_have_the_types_of_the_signature(weigh: click.Command) -> None:
    said = (
        CliRunner().invoke(weigh, ["a", "b", "--base", "m", "-m", "x", "-m", "y", "--no-tied", "--share", "1"]).output
    )
    values, given = said.splitlines()
    assert ast.literal_eval(values) == {
        "adapters": ("a", "b"),
        "base": "m",
        "top": None,
        "share": 1.0,
        "no_top": False,
        "tied": False,
        "modules": ("x", "y"),
        "seed": 0,
        "to": "peft",
    }
    assert given == "['adapters', 'base', 'modules', 'share', 'tied']"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a"], "missing option '--base'"),
        (["--base", "m"], "missing argument 'ADAPTER...'"),
        (["a", "--base", "m", "--share", "nan"], "must be a finite number"),
        (["a", "--base", "m", "--top", "0"], "0 is not in the range x>=1"),
        (["a", "--base", "m", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["a", "--base", "m", "--to", "exe"], "'exe' is not one of 'peft'"),
        (["", "--base", "m"], "is empty; a variable of the shell may not be set"),
    ],
)
def test_values_of_other_types_are_refused(words: list[str], said: str, weigh: click.Command) -> None:
    result = CliRunner().invoke(weigh, words)
    assert (result.exit_code, said in result.output) == (2, True)


def commands() -> list[click.Command]:
    found: list[click.Command] = []
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        parts = command.list_commands(click.Context(command)) if isinstance(command, DerivedGroup) else []
        found += [command.find(part) for part in parts] if isinstance(command, DerivedGroup) else [command]
    return found


@pytest.mark.parametrize("command", commands(), ids=lambda command: str(command.name))
def test_every_option_has_a_text_and_every_command_an_example(command: click.Command) -> None:
    assert isinstance(command, DerivedCommand)
    assert 1 <= len(command.examples) <= 2
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    assert [option.name for option in options if not option.help] == []
    assert all("``" not in str(option.help) for option in options)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_has_the_parameters_and_defaults_of_its_function(verb: str) -> None:
    """The source that the command is derived from, and the function that Python makes of it."""
    function = read_function(type(loralens).__getattribute__(loralens, verb).__module__, verb, ROWS[verb])
    read = {each.name: each.default for each in function.parameters}
    parameters = signature(getattr(loralens, verb)).parameters
    assert {*read, *ROWS[verb].in_python} == set(parameters)
    wrong = {
        name for name in read if (each := parameters[name]).default is not each.empty and read[name] != each.default
    }
    # Constants have names, which the function looks up.
    assert all(read[name] is None for name in wrong)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_python_tells_every_parameter_once(verb: str) -> None:
    function = getattr(loralens, verb)
    names = re.findall(r"^    ((?:\*?\w+, )*\*?\w+) :", function.__doc__, re.MULTILINE)
    told = [name.strip("* ") for several in names for name in several.split(",")]
    assert sorted(told) == sorted(signature(function).parameters)


def test_the_table_names_parameters_that_exist() -> None:
    names = {param.name for command in commands() for param in command.params}
    assert {*ARGUMENTS, *HEADINGS, *METAVARS, *NAMES, *RANGES} <= names
    assert {name for name in ROWS if " " not in name} == {*COMMANDS} - {"fleet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: adapters, a folder of them, and nothing that needs a model."""
    home = tmp_path_factory.mktemp("examples")
    source = Path("examples/adapters/reuters-r8-r8-seed0")
    # Without the classifier, for which not every dialect has a place.
    Command("combine").good(source, "--take", "none", "-o", home / "adapter")
    for name in ("other", "folder/one", "run/checkpoint-1", "run/checkpoint-2"):
        shutil.copytree(home / "adapter", home / name)
    return home


NEEDS_MODEL = {"amplify", "intruders", "calibrate", "merge", "unmerge", "verify", "extract", "train", "evaluate"}
NEEDS_MODEL |= {"behave", "demo", "explain", "prove", "served"}  # the last one needs a server
LINES = [(command, line) for command in commands() if isinstance(command, DerivedCommand) for line in command.examples]


@pytest.mark.parametrize(("command", "line"), LINES, ids=[line for _, line in LINES])
def test_examples_run(command: click.Command, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(line)[1:]
    if NEEDS_MODEL & {words[0], command.name}:
        for name in ("model", "tuned", "merged", "texts.txt"):
            (folder / name).touch()
        # Parsed, which refuses every word that is none of the command's.
        assert command.make_context(str(command.name), words[1 + (words[0] == "fleet") :])
        return
    if "--fleet" in words:
        Command("fleet", "index", "folder").good()
    words = ["bert.*query" if word == "v_proj" else word for word in words]
    result = Command().run(*words, *(["--overwrite"] if "-o" in words else []))
    assert result.exit_code in ((0, 1) if "--for" in words or words[0] == "doctor" else (0,)), result.output


# ---- Options that a function gets in groups


class Pair(Options):
    def __init__(self, *, left: int = 1, right: int) -> None:
        self.sum = left + right


@takes_options
def total(first: int, *, pair: Pair, last: int = 0) -> int:
    return first + pair.sum + last


def test_keywords_are_gathered_and_written_out() -> None:
    assert str(signature(total)) == "(first: int, *, left: int = 1, right: int, last: int = 0) -> int"
    assert total(1, right=2, last=3) == 7
    assert total(first=1, left=5, right=2) == 8


@pytest.mark.parametrize(
    ("keywords", "said"),
    [({}, "missing a required"), ({"right": 1, "top": 2}, r"total\(\) has no 'top'")],
)
def test_wrong_keywords_raise_what_python_raises(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        total(1, **keywords)


def test_commands_are_derived_once() -> None:
    assert command_of("spectrum") is command_of("spectrum")
