"""The first word after ``loralens``: a command, a path to inspect, or a word that names the right command."""

import shutil
from pathlib import Path

import pytest

from loralens.cli.main import EXAMPLES
from loralens.verbs import COMMANDS, GROUPS
from tests.cli.command import Command

loralens = Command()


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a folder with an adapter, in the working directory."""
    shutil.copytree("examples/adapters/reuters-r8-r8-seed0", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    return "mine"


def test_no_word_at_all_shows_the_help_as_lines() -> None:
    said = loralens.run().output
    assert said.splitlines() == loralens.good("--help").stdout.splitlines()
    assert len(said.splitlines()) > len(COMMANDS)


def test_a_path_alone_is_inspected_and_the_next_commands_are_named(adapter: str) -> None:
    alone = loralens.good(adapter).stdout
    inspected = loralens.good("inspect", adapter).stdout
    assert alone.startswith(inspected)
    (line,) = alone[len(inspected) :].strip().splitlines()
    assert f"loralens doctor {adapter}" in line


def test_options_and_further_adapters_go_with_a_path(adapter: str) -> None:
    shutil.copytree(adapter, "second one")
    assert loralens.good(adapter, "second one", "--json").stdout == (
        loralens.good("inspect", adapter, "second one", "--json").stdout
    )
    # The path is quoted, so that the line can be copied into a shell.
    assert "loralens doctor 'second one'" in loralens.good("second one").stdout
    assert "next:" not in loralens.good(adapter, "--csv").stdout
    assert "next:" not in loralens.good(adapter, "--quiet").stdout


def test_the_name_of_a_command_is_no_path(adapter: str) -> None:
    Path(adapter).rename("spectrum")
    assert "missing argument" in loralens.refused("spectrum")
    assert "next: loralens doctor ./spectrum" in loralens.good("./spectrum").stdout


def test_a_path_that_does_not_exist_is_not_inspected() -> None:
    assert "not an existing file" in loralens.refused("missing.safetensors")
    assert "loralens inspect owner/name" in loralens.refused("owner/name")
    assert "Hub" not in loralens.refused("./missing")


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("info", "inspect"),
        ("svd", "spectrum"),
        ("shrink", "compress"),
        ("merge-adapters", "combine"),
        ("plot", "report"),
        ("Spectrum", "spectrum"),
        ("spectrm", "spectrum"),
        ("merge_and_unload", "merge"),
    ],
)
def test_words_of_other_tools_name_the_right_command(word: str, verb: str) -> None:
    answer = loralens.refused(word)
    assert f"loralens {verb} (" in answer
    assert len(answer.splitlines()) == 1


def test_all_commands_that_may_be_meant_are_named() -> None:
    answer = loralens.refused("merg")
    assert "loralens merge (" in loralens.refused("merg")
    answer = loralens.refused("com")
    assert "loralens compress (" in answer
    assert ", or loralens combine (" in answer


def test_everything_that_is_missing_is_one_message(adapter: str) -> None:
    assert "missing argument 'SOURCE...' and option '-o'\n" in loralens.refused("compress")
    assert "--energy 0.99" in loralens.refused("compress")
    assert "missing argument 'ADAPTER[:W]...' and option '-o'\n" in loralens.refused("combine")
    assert "missing options '--base', '--tuned' and '-o'\n" in loralens.refused("extract")
    assert "missing argument 'ADAPTER...' and option '-o'\n" in loralens.refused("report")
    assert "missing options '--model', '--task', '--data' and '--output'\n" in loralens.refused("train")
    # The adapter says which base is missing.
    base = loralens.told("inspect", adapter)["adapters"][0]["base_model"]
    for verb in ("merge", "intruders", "amplify"):
        said = loralens.refused(verb, adapter)
        assert said.startswith(("error: missing option '--base'\n", "error: missing options '--base' and '-o'\n"))
        assert f"the adapter was trained on {base}" in said


def test_the_names_near_a_wrong_path_are_told(adapter: str, tmp_path: Path) -> None:
    shutil.copytree(adapter, "mine-too")
    assert "nearest names there are mine and mine-too\n" in loralens.refused("inspect", "min")
    assert "nearest name there is mine\n" in loralens.refused("./mnine/adapter_model.safetensors").replace("./", "")
    assert "nearest name there is mine/adapter_model.safetensors" in loralens.refused("inspect", "mine/adapter_modl")


def test_a_word_that_means_nothing_is_answered_with_the_list() -> None:
    assert "loralens --help" in loralens.refused("xyzzy")
    assert "loralens --version" in loralens.refused("version")
    assert "loralens --help" in loralens.refused("help")
    assert "type loralens spectrum --help" in loralens.refused("help", "spectrum")
    assert "type loralens --help" in loralens.refused("help", "xyzzy")


def test_help_groups_every_command_once_below_three_examples() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(COMMANDS)
    page = loralens.good("--help").stdout
    assert len(EXAMPLES) == 3
    assert page.index(EXAMPLES[0][0]) < page.index("Look:") < page.index("Train:")
    for name in COMMANDS:
        assert page.count(f"\n  {name.ljust(11)} ") == 1
