"""``loralens fleet near``, ``copies``, ``runs``, ``families`` and ``bases``: outputs, options and exit codes."""

import csv
import io
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.fleet.synthetic import make_fleet

fleet = Command("fleet")


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "fleet", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "fleet")
    fleet.good("index", ".", "-q")
    return tmp_path / "fleet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "fleet"
    make_fleet(folder, families=2, runs=2, checkpoints=2)
    shutil.copytree(folder / "f0-r0" / "checkpoint-200", folder / "final")
    return folder


def rows(result: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result)))


def test_near(root: Path) -> None:
    lines = fleet.good("near", "final", "-k", 3).stdout.splitlines()
    assert (
        lines[0]
        == "Of 8 adapters with common modules the nearest to final is f0-r0/checkpoint-200, a copy (cosine +1.000)."
    )
    table = [line.split()[:2] for line in lines[4:7]]
    assert table[:2] == [["f0-r0/checkpoint-200", "copy"], ["f0-r0/checkpoint-100", "run"]]
    assert table[2][1] == "family"
    assert any(line.startswith("chance: two unrelated updates of these shapes") for line in lines)
    told = rows(fleet.good("near", "final/adapter_model.safetensors", "-k", 3, "--csv").stdout)
    assert [row["name"] for row in told] == [words[0] for words in table]
    sketched = fleet.told("near", "final", "--sketch")
    assert sketched["read"] == 0
    assert not any(row["exact"] for row in sketched["neighbours"])
    assert fleet.told("near", "final", "--exact")["read"] == 8


def test_sketch_and_exact_exclude_each_other(root: Path) -> None:
    told = fleet.refused("near", "final", "--sketch", "--exact")
    assert told.startswith("error: sketch and exact exclude each other")


def test_near_something_that_is_not_there(root: Path) -> None:
    assert "nothing-here" in fleet.refused("near", "nothing-here")


def test_the_paths_of_copies_can_be_deleted(root: Path) -> None:
    assert fleet.good("copies").stdout.splitlines()[0] == "9 adapters: 1 is a copy of 1 other."
    shown = fleet.good("copies").stdout.splitlines()
    assert [line.split()[:2] for line in shown[5:7]] == [["1", "final"], ["1", "f0-r0/checkpoint-200"]]
    assert shown[5].endswith("stays")
    assert shown[6].endswith("safe")
    assert shown[-1] == "to list their files: loralens fleet copies --paths"
    paths = fleet.good("copies", "--paths").stdout.splitlines()
    # Both are of one time, and the shorter name stays.
    weights = "f0-r0/checkpoint-200/adapter_model.safetensors"
    assert paths == [weights, "f0-r0/checkpoint-200/adapter_config.json"]
    there = f"to list their files: loralens fleet copies --paths --fleet {root}"
    assert fleet.good("copies", "--fleet", root).stdout.splitlines()[-1] == there
    for path in paths:
        (root / path).unlink()
    assert "cannot be read" not in fleet.good("index", ".", "-q").stdout
    assert fleet.good("copies", "--paths").stdout == ""
    assert fleet.good("copies").stdout == "8 adapters: none is a copy of another.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"run\x1b[1mA", b"b\xff", b"x\ny"])
def test_a_path_that_cannot_be_printed_exactly_is_left_out(name: bytes, root: Path) -> None:
    source = root / "f0-r0" / "checkpoint-100"
    shutil.copytree(source, os.fsdecode(bytes(root) + b"/" + name))
    for file in source.iterdir():
        os.utime(file, (1e9, 1e9))  # the oldest file stays
    fleet.good("index", ".", "-q")
    done = fleet.good("copies", "--paths")
    kept = "f0-r0/checkpoint-200"
    assert done.stdout.splitlines() == [f"{kept}/adapter_model.safetensors", f"{kept}/adapter_config.json"]
    assert "2 paths with a line end, a control character or a wrong encoding left out" in done.stderr


def test_groups_as_csv_have_a_line_for_each_adapter(root: Path) -> None:
    for command, column in (("families", "family"), ("runs", "run")):
        told = rows(fleet.good(command, "--csv").stdout)
        assert len(told) == 9
        groups = {row["name"]: row[column] for row in told}
        assert groups["final"] == groups["f0-r0/checkpoint-100"] != groups["f1-r0/checkpoint-100"]
    assert len({row["family"] for row in rows(fleet.good("families", "--at", 0.95, "--csv").stdout)}) > 2


def test_families_at_a_level_out_of_range(root: Path) -> None:
    assert "--at" in fleet.refused("families", "--at", 1.5)


def test_bases(root: Path) -> None:
    assert fleet.good("bases", "-q").stdout == "9 adapters for 1 base model.\n"
    assert {row["base"] for row in rows(fleet.good("bases", "--csv").stdout)} == {"tiny"}


@pytest.mark.parametrize("command", ["copies", "runs", "families", "bases"])
def test_a_fleet_of_one_is_no_error(command: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "final", tmp_path / "one" / "only")
    fleet.good("index", tmp_path / "one", "-q")
    assert fleet.good(command, "--fleet", tmp_path / "one").stdout.startswith("1 adapter")
    assert "no other adapter" in fleet.good("near", "only", "--fleet", tmp_path / "one").stdout
