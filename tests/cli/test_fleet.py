"""``loralens fleet``: the sub-commands, their outputs, messages and exit codes."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.fleet import SUBCOMMANDS
from loralens.cli.main import main
from tests.cli.command import Command
from tests.cli.terminals import Terminals
from tests.fleet.makers import LAYERS, random_adapter, save, save_many

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
    told = json.loads(fleet.good("index", root, "--json").stdout)
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


def test_rows(root: Path) -> None:
    lines = fleet.good("rows", "select name, rank, base from adapters order by name").stdout.splitlines()
    assert lines[0] == "3 rows."
    assert lines[-2].split() == ["a002", "4", "tiny/base"]
    told = json.loads(fleet.good("rows", "select name from adapters order by name limit 1", "--json").stdout)
    assert told["rows"] == [{"name": "a000"}]


@pytest.fixture(scope="module")
def terminals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    running = Terminals(tmp_path_factory.mktemp("terminals"))
    yield running
    running.close()


def test_texts_of_rows_are_aligned_left_and_shortened_before_one_is_left_out(root: Path, terminals: Terminals) -> None:
    shutil.copyfile(root / "a000" / "adapter_model.safetensors", root / "cut.safetensors")
    os.truncate(root / "cut.safetensors", 1500)
    fleet.good("index", root)
    select = "select rank, path, status, reason from files order by path"
    lines = terminals.run(60, ["fleet", "rows", select, "--fleet", str(root)]).splitlines()
    assert lines[0] == "4 rows."
    assert lines[3].split() == ["rank", "path", "status", "reason"]
    assert all(len(line) <= 60 for line in lines)
    assert lines[4].startswith("   4  a000/")
    status, reason = lines[3].index("status"), lines[3].index("reason")
    assert [line[status:].split()[0] for line in lines[4:8]] == ["adapter"] * 3 + ["unreadable"]
    assert lines[7][reason - 1] == " "
    assert lines[7][reason] != " "


def test_sentences_below_a_table_are_wrapped_and_commands_are_not(root: Path, terminals: Terminals) -> None:
    save(root / "a000-copy", random_adapter(0))
    fleet.good("index", root)
    lines = terminals.run(60, ["fleet", "families", "--fleet", str(root)]).splitlines()
    chance = next(i for i, line in enumerate(lines) if line.startswith("chance: "))
    assert "cosine" in " ".join(lines[chance : chance + 2])
    long = [line for line in lines if len(line) > 60]
    assert len(long) == 1
    assert f"loralens fleet families --csv --fleet {root}" in long[0]


@pytest.mark.parametrize("words", [["stats"], ["copies"], ["near", "a"], ["rows", "select 1"]])
def test_a_folder_that_is_no_option_is_told_which_one_it_is(words: list[str], root: Path) -> None:
    result = CliRunner().invoke(main, ["fleet", *words, str(root)])
    assert result.exit_code == 2
    assert result.stderr.endswith(f"({root})\n  fix: the index, or the folder that holds it, is given as --fleet DIR\n")
    assert "--fleet" not in CliRunner().invoke(main, ["fleet", "index", "a", "b"]).stderr


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


ODD_NAMES = [
    "plain",
    "a\x1b[31mb",
    "ab",
    "a\\x1b[31mb",
    "a\\\x1b[31mb",
    "a\\\\x1b[31mb",
    "c\x85",
    "c\\x85",
    "tab\there",
]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_csv_tells_names_with_control_characters_apart(tmp_path: Path) -> None:
    names = [*ODD_NAMES, os.fsdecode(b"c\x85")]
    for i, name in enumerate(names):
        save(tmp_path / name, random_adapter(i))
    fleet.good("index", tmp_path)
    words = ["rows", "select name from adapters", "--fleet", tmp_path]
    told = {row["name"] for row in json.loads(fleet.good(*words, "--json").stdout)["rows"]}
    assert told == set(names)
    shown = fleet.good(*words, "--csv").stdout
    assert "\x1b" not in shown
    rows = [row["name"] for row in csv.DictReader(io.StringIO(shown))]
    assert len(set(rows)) == len(names)
    assert {"plain", "a\\x1b[31mb", "ab", "a\\\\x1b[31mb"} <= set(rows)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the command is for a shell of Unix")
def test_the_command_of_stats_makes_all_fit_and_touches_no_other(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / "fleet" / f"a{i}", random_adapter(i))
    wide = ["b/my checkpoint-5", "c/my checkpoint-5"]
    save(tmp_path / "fleet" / wide[0], random_adapter(30, rank=16))
    home = ("--fleet", tmp_path / "fleet")
    for count, folder in ((1, "one"), (2, "two")):
        save(tmp_path / "fleet" / wide[count - 1], random_adapter(31, rank=16), overwrite=True)
        fleet.good("index", tmp_path / "fleet", "-q")
        line = next(line for line in fleet.good("stats", *home).stdout.splitlines() if "loralens compress" in line)
        assert f"need no more than 4. {count} " in line
        command = line.partition(": ")[2].replace("OUT", str(tmp_path / folder))
        # Both are called so, so that one call cannot write both.
        assert ("while IFS= read" in command) == (count == 2)
        (tmp_path / "bin").mkdir(exist_ok=True)
        script = tmp_path / "bin" / "loralens"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m loralens "$@"\n')
        script.chmod(0o755)
        path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(["sh", "-c", command], env=environment, check=True, capture_output=True)
        written = sorted(path.parent for path in (tmp_path / folder).rglob("*.safetensors"))
        # A single adapter is written into the folder itself.
        assert written == ([tmp_path / folder] if count == 1 else [tmp_path / folder / name for name in wide])
        assert {loralens.load(path)[LAYERS[0]].rank for path in written} == {4}
        told = json.loads(fleet.good("stats", *home, "--json").stdout)
        assert (told["common_rank"], len(told["above"])) == (4, count)


def test_empty(root: Path) -> None:
    assert "none of 3 adapters is empty" in fleet.good("empty").stdout


def test_wrong_usage(root: Path) -> None:
    assert "exclude each other" in fleet.refused("index", root, "--jobs", 2, "--dask", "tcp://localhost:1")
    assert "-json has two dashes" in fleet.refused("stats", "-json")
    assert "No such command 'nonsense'" in fleet.refused("nonsense")
    assert "No such command 'copie'.\n  fix: the nearest command is copies" in fleet.refused("copie")
    assert "is not a folder" in fleet.refused("index", root / "nowhere")
    assert fleet.run("index", root, "--jobs", 0).exit_code == 2


def test_dask_without_its_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    told = fleet.refused("index", root, "--dask", "tcp://localhost:1")
    assert "needs distributed" in told
    assert "pip install" in told


def test_names_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    save(tmp_path / "x\x1b[2Jy", random_adapter(1))
    (tmp_path / "z\x1b[2J.safetensors").write_bytes(b"{}")
    shown = fleet.good("index", tmp_path).output
    shown += fleet.good("rows", "select name, name as 'a\x1b[2J' from files", "--fleet", tmp_path).output
    assert "\x1b" not in shown


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What every sub-command says of itself, and in its last line whether NumPy was imported; all in one process."""
    code = (
        "import sys\nfrom loralens.cli.main import main\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        main(['fleet', name, '--help'], standalone_mode=False)\n"
        "    finally:\n        print('numpy' in sys.modules, end='\\0')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code, *SUBCOMMANDS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(SUBCOMMANDS, done.stdout.split("\0")[:-1], strict=True))


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_sub_command_says_what_it_does_and_imports_no_numpy(name: str, helps: dict[str, str]) -> None:
    assert helps[name].splitlines()[-1] == "False"
    # An index is made of a folder, and an adapter is taken from a file.
    assert ("--fleet HOME" in helps[name]) == (name not in {"index", "expand"})
    assert "--json" in helps[name]


def test_help_lists_the_sub_commands_in_their_order() -> None:
    lines = fleet.good("--help").stdout.partition("Commands:\n")[2].splitlines()
    # The help of a sub-command may go on in a second line, which is indented further.
    assert [line.split()[0] for line in lines if line[2] != " "] == list(SUBCOMMANDS)
