"""``torchrun -m loralens train``: two processes from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Adapter
from loralens.training import record_of
from tests import models
from tests.cli.command import Command
from tests.processes import run_to_end
from tests.tolerances import PROCESSES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_torch")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """A model, texts, and the adapter of a single process: home/one."""
    home = tmp_path_factory.mktemp("home")
    models.folder(models.bert(), home / "bert")
    models.jsonl(home / "d.jsonl", models.TEXTS * 2, label=["x", "y", "y", "x"] * 2)
    Command().good("train", *options(home), "-o", home / "one", "--json")
    return home


def options(home: Path) -> list[str]:
    files = ("--model", home / "bert", "--data", home / "d.jsonl", "--eval", home / "d.jsonl")
    sgd = ("--optimiser", "sgd", "--lr", 1.0, "--targets", "query,value,dense", "--rank", 2)
    rest = ("--batch", 4, "--steps", 3, "--watch", 2)
    return [str(part) for part in (*files, "--task", "classification", *sgd, *rest)]


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
    out, errors = run_to_end("torch.distributed.run", *many, *options(home), "-o", tmp_path / "two", "--json")
    assert json.loads(out)["steps"] == 3  # one object: the first process alone speaks
    assert errors.count("step 3: evaluation") == 1
    assert "Warning" not in errors
    close(loralens.load(tmp_path / "two"), loralens.load(home / "one"))
    see_the_same(tmp_path / "two", home / "one")
    files = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "two", home / "one")]
    assert files[0] == files[1]
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
