"""``torchrun -m loralens train``: two processes from the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.main import main
from loralens.core.adapter import Adapter
from loralens.core.stored import record_of
from tests import models
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name
from tests.tolerances import PROCESSES
from tests.warm import run_warm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_torch")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """A model, texts, and the adapter of a single process: home/one."""
    home = tmp_path_factory.mktemp("home")
    models.folder(models.bert(), home / "bert")
    models.jsonl(home / "d.jsonl", models.TEXTS * 2, label=["x", "y", "y", "x"] * 2)
    result = CliRunner().invoke(main, ["train", *options(home), "-o", str(home / "one"), "--json"])
    assert result.exit_code == 0, result.output
    shutil.copytree(home / "one", home / "old")
    return home


def options(home: Path) -> list[str]:
    files = ("--model", home / "bert", "--data", home / "d.jsonl", "--eval", home / "d.jsonl")
    sgd = ("--optimiser", "sgd", "--lr", 1.0, "--targets", "query,value,dense", "--rank", 2)
    rest = ("--batch", 4, "--steps", 3, "--watch", 2)
    return [str(part) for part in (*files, "--task", "classification", *sgd, *rest)]


@pytest.fixture(scope="module")
def forked(home: Path) -> dict[str, list[dict[str, Any]]]:
    """What either process says, by case, where two are started as torchrun starts them."""
    given = [*options(home), "--threads", "1"]
    cases = {
        "shard": [*given, "-o", str(home / "shard"), "--json", "--shard"],
        "parts": [*given, "-o", str(home / "parts"), "--batch", "3"],
        "again": [*given, "-o", str(home / "old"), "--overwrite"],
    }
    (home / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = run_warm("tests.cli.processes", home)
    assert done.code == 0, done.stderr
    return {name: [json.loads((home / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in cases}


def close(theirs: Adapter, ours: Adapter) -> None:
    assert ((record_of(theirs) or {})["processes"], (record_of(ours) or {})["processes"]) == (2, 1)
    assert set(theirs) == set(ours)
    for name, module in ours.items():
        np.testing.assert_allclose(theirs[name].B, module.B, **PROCESSES)
        np.testing.assert_allclose(theirs[name].A, module.A, **PROCESSES)
    assert np.abs(next(iter(ours.modules.values())).B).max() > 1e-4


def see_the_same(theirs: Path, ours: Path) -> None:
    """Both runs have one log, with a line for every look."""
    lines = [(folder / "watch.jsonl").read_text(encoding="utf-8").splitlines() for folder in (theirs, ours)]
    assert [len(one) for one in lines] == [4, 4]
    looks = [loralens.trajectory(folder / "watch.jsonl").rows for folder in (theirs, ours)]
    assert [row.step for row in looks[0]] == [row.step for row in looks[1]] == [0, 2, 3]
    for first, second in zip(*looks, strict=True):
        assert first.frobenius == pytest.approx(second.frobenius, rel=1e-3)
        assert first.drift == pytest.approx(second.drift, rel=1e-3)


def test_torchrun_starts_two_that_write_one_adapter(home: Path, tmp_path: Path) -> None:
    many = ("--standalone", "--nproc-per-node", 2, "-m", "loralens", "train", "--threads", 1)
    two = run_warm("torch.distributed.run", *many, *options(home), "-o", tmp_path / "two", "--json")
    assert two.code == 0, two.stderr
    assert json.loads(two.stdout)["steps"] == 3  # one object: the first process alone speaks
    assert two.stderr.count("step 3: evaluation") == 1
    assert "Warning" not in two.stderr
    close(loralens.load(tmp_path / "two"), loralens.load(home / "one"))
    see_the_same(tmp_path / "two", home / "one")
    files = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "two", home / "one")]
    assert files[0] == files[1]
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_a_model_in_shards_gives_the_same(home: Path, forked: dict[str, list[dict[str, Any]]]) -> None:
    first, second = forked["shard"]
    assert (first["code"], second["code"]) == (0, 0), first["stderr"] + second["stderr"]
    assert json.loads(first["stdout"])["steps"] == 3
    assert second["stdout"] == second["stderr"] == ""
    assert "Warning" not in first["stderr"]
    close(loralens.load(home / "shard"), loralens.load(home / "one"))
    see_the_same(home / "shard", home / "one")


def test_an_error_ends_both(home: Path, forked: dict[str, list[dict[str, Any]]]) -> None:
    assert [process["code"] for process in forked["parts"]] == [2, 2]
    assert "a batch of 3 cannot be cut into 2 equal parts" in forked["parts"][0]["stderr"]
    assert not (home / "parts").exists()
    assert not (home / "parts.unfinished").exists()


def test_what_is_there_is_replaced_once(home: Path, forked: dict[str, list[dict[str, Any]]]) -> None:
    assert [process["code"] for process in forked["again"]] == [0, 0], forked["again"]
    assert (record_of(loralens.load(home / "old")) or {})["processes"] == 2
    assert not (home / "old.unfinished").exists()
