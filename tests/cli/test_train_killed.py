"""``loralens train`` killed at random points, and resumed: the bytes of a run that nothing disturbed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.cli.command import Command
from tests.processes import run_module

pytest.importorskip("torch")
pytest.importorskip("transformers")

KILLS = 3  # of each run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_torch")]

BASE = (
    "--task",
    "classification",
    "--rank",
    "2",
    "--batch",
    "4",
    "--threads",
    "1",
    "--save-every",
    "1",
    "--steps",
    "18",
)
RUNS = {
    "adamw": ("--save-every", "2", "--dropout", "0.3", "--accumulate", "2", "--snapshots", "5", "--schedule", "cosine"),
    "sgd": ("--optimiser", "sgd", "--lr", "0.1", "--base-dropout", "--method", "dora"),
    "patience": ("--patience", "30", "--evaluate-every", "2", "--method", "lora+", "--lr", "0.02"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.bert(), home / "bert")
    models.jsonl(home / "d.jsonl", models.TEXTS * 3, label=["x", "y", "y", "x"] * 3)
    return home


def options(home: Path, name: str) -> list[str]:
    files = ("--model", home / "bert", "--data", home / "d.jsonl")
    held_out = ("--eval", home / "d.jsonl") if name == "patience" else ()
    return [str(part) for part in (*files, *held_out, *BASE, *RUNS[name])]


@pytest.fixture(scope="module")
def killed(home: Path) -> Path:
    """The folder of the runs that were killed, each by its name."""
    folder = home / "killed"
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps({name: options(home, name) for name in RUNS}), encoding="utf-8")
    done = run_module("tests.cli.killed", KILLS, folder)
    assert json.loads(done.splitlines()[-1]) == dict.fromkeys(RUNS, KILLS)
    return folder


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_in_the_same_bytes(home: Path, killed: Path, tmp_path: Path, name: str) -> None:
    Command().good("train", *options(home, name), "-o", tmp_path / "whole")
    there, here = killed / name, tmp_path / "whole"
    files = sorted(str(file.relative_to(here)) for file in here.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(there)) for file in there.rglob("*") if file.is_file())
    for file in files:
        if file != "log.jsonl":
            assert (there / file).read_bytes() == (here / file).read_bytes(), file
    assert logged(there) == logged(here)
    assert [line["step"] for line in logged(there) if "loss" in line] == list(range(1, 19))
