"""``loralens fleet``: the sub-commands, their outputs, messages and exit codes."""

import csv
import io
import os
import shutil
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.fleet.makers import random_adapter, save, save_many

fleet = Command("fleet")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_many(tmp_path / "fleet", 3)
    monkeypatch.chdir(tmp_path / "fleet")
    fleet.good("index", ".")
    return tmp_path / "fleet"


def test_the_first_index_and_the_next(tmp_path: Path) -> None:
    save_many(tmp_path / "fleet", 3)
    home = tmp_path / "fleet" / ".loralens-fleet"
    first = fleet.good("index", tmp_path / "fleet").stdout
    assert first == f"{tmp_path}/fleet: 3 adapters in the index {home}.\n"
    save(tmp_path / "fleet" / "b", random_adapter(9))
    shutil.rmtree(tmp_path / "fleet" / "a000")
    (tmp_path / "fleet" / "bad.safetensors").write_bytes(b"{}")
    lines = fleet.good("index", tmp_path / "fleet").stdout.splitlines()
    assert lines[0] == f"{tmp_path}/fleet: 3 adapters in the index {home}. 2 new, 1 gone. 1 file cannot be read."
    rows = {" ".join(line.split()) for line in lines}
    assert {"b/adapter_model.safetensors new", "a000/adapter_model.safetensors gone"} <= rows
    assert "bad.safetensors 2 bytes are too few for any tensor file" in rows
    assert fleet.good("index", tmp_path / "fleet", "-q").stdout.splitlines() == [
        f"{tmp_path}/fleet: 3 adapters in the index {home}. Nothing has changed. 1 file cannot be read."
    ]


def test_a_folder_called_as_an_option_is_a_path_of_a_copy(root: Path) -> None:
    shutil.copytree(root / "a000", root / "-rf")
    os.utime(root / "-rf" / "adapter_model.safetensors", (2e9, 2e9))
    fleet.good("index", ".")
    listed = fleet.good("copies", "--paths").stdout.splitlines()
    assert listed == ["./-rf/adapter_model.safetensors", "./-rf/adapter_config.json"]


def test_the_changes_as_json_and_csv(root: Path) -> None:
    save(root / "b", random_adapter(9))
    told = fleet.told("index", root)
    assert (told["new"], told["changed"], told["gone"]) == (1, 0, 0)
    assert told["changes"] == [{"path": "b/adapter_model.safetensors", "change": "new"}]
    shutil.rmtree(root / "b")
    rows = list(csv.DictReader(io.StringIO(fleet.good("index", root, "--csv").stdout)))
    assert rows == [{"path": "b/adapter_model.safetensors", "change": "gone"}]


def test_an_index_elsewhere(root: Path, tmp_path: Path) -> None:
    fleet.good("index", root, "-o", tmp_path / "index", "--jobs", 1)
    assert "3 adapters" in fleet.good("stats", "--fleet", tmp_path / "index").stdout
    save(root / "b", random_adapter(9))
    told = fleet.good("stats", "--fleet", tmp_path / "index").stderr
    assert f"loralens fleet index {root} -o {tmp_path}/index" in told


def test_the_default_is_the_current_folder(root: Path) -> None:
    assert fleet.good("stats").stdout.startswith(".: 3 adapters, ")
    assert fleet.good("stats", "--fleet", ".loralens-fleet").stdout.startswith(".: 3 adapters, ")


@pytest.mark.parametrize("words", [["stats"], ["empty"], ["rows", "select 1"]])
def test_a_missing_index_is_one_message(words: list[str], tmp_path: Path) -> None:
    told = fleet.refused(*words, "--fleet", tmp_path / "nowhere")
    assert told.splitlines() == [
        f"error: {tmp_path}/nowhere: there is no index of a fleet",
        f"  fix: make one: loralens fleet index DIR -o {tmp_path}/nowhere; --fleet names the index, or the folder that "
        "holds it",
    ]


def test_a_stale_index_is_one_note(root: Path) -> None:
    save(root / "b", random_adapter(9))
    save(root / "a001", random_adapter(8), overwrite=True)
    result = fleet.good("rows", "select count(*) from adapters", "--csv")
    assert result.stderr.splitlines() == [
        "note: .loralens-fleet: the files have changed since they were indexed: 1 new, 1 changed",
        "  fix: loralens fleet index .",
    ]
    assert result.stdout == "count(*)\n3\n"


@pytest.mark.parametrize("words", [["stats"], ["copies"], ["near", "a"], ["rows", "select 1"]])
def test_a_folder_that_is_no_option_is_told_which_one_it_is(words: list[str], root: Path) -> None:
    end = f"({root})\n  fix: the index, or the folder that holds it, is given as --fleet DIR\n"
    assert fleet.refused(*words, root).endswith(end)
    assert "--fleet" not in fleet.run("index", "a", "b").stderr


def test_rows_that_are_refused(root: Path) -> None:
    told = fleet.refused("rows", "drop table files")
    assert told.startswith("error: the catalogue is only read here\n  fix: give one SELECT")
    assert "no such column: nonsense" in fleet.refused("rows", "select nonsense from adapters")
    for empty in ("", "  ", ";", "/* nothing */"):
        assert fleet.refused("rows", empty).startswith("error: the SELECT is empty\n  fix: give one SELECT")


def test_a_folder_without_an_index_is_named_in_the_fix(tmp_path: Path) -> None:
    (tmp_path / "my adapters").mkdir()
    told = fleet.refused("stats", "--fleet", tmp_path / "my adapters")
    assert f"loralens fleet index '{tmp_path}/my adapters'" in told


def test_empty(root: Path) -> None:
    assert "none of 3 adapters is empty" in fleet.good("empty").stdout


def test_wrong_usage(root: Path) -> None:
    assert "exclude each other" in fleet.refused("index", root, "--jobs", 2, "--dask", "tcp://localhost:1")
    assert "-json has two dashes" in fleet.refused("stats", "-json")
    assert "no such command 'nonsense'" in fleet.refused("nonsense")
    assert "no such command 'copie'\n  fix: the nearest command is copies" in fleet.refused("copie")
    assert "is not a folder" in fleet.refused("index", root / "nowhere")
    assert fleet.run("index", root, "--jobs", 0).exit_code == 2


def test_names_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    save(tmp_path / "x\x1b[2Jy", random_adapter(1))
    (tmp_path / "z\x1b[2J.safetensors").write_bytes(b"{}")
    shown = fleet.good("index", tmp_path).output
    shown += fleet.good("rows", "select name, name as 'a\x1b[2J' from files", "--fleet", tmp_path).output
    assert "\x1b" not in shown
