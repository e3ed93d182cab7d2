"""``loralens train``: which layers are adapted, and with which ranks."""

import json
from pathlib import Path

import pytest

import loralens
from tests import models
from tests.cli.command import Command
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

TRAIN = Command("train", "--threads", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    (home / "d.txt").write_text("\n".join(models.TEXTS * 3), encoding="utf-8")
    return home


def speak(home: Path, target: Path, *more: object) -> list[object]:
    files = ("--model", home / "llama", "--data", home / "d.txt", "--task", "causal-lm", "-o", target)
    return [*files, "--batch", 4, "--steps", 2, *more]


def test_layers_are_excluded_and_get_ranks_of_their_own(home: Path, tmp_path: Path) -> None:
    layers = ("--targets", "all-linear,embed_tokens", "--exclude", "o_proj,*.1.mlp", "--rank", 4)
    ranks = ("--rank-pattern", "down_proj=2", "--rank-pattern", "q_proj=12")
    result = TRAIN.good(*speak(home, tmp_path / "a", *layers, *ranks))
    assert "rank 2 to 12 in 10 modules" in result.stdout
    adapter = loralens.load(tmp_path / "a")
    assert {name.rpartition(".")[2]: module.rank for name, module in adapter.items()} == {
        "q_proj": 12, "k_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 2, "embed_tokens": 4,
    }  # fmt: skip
    assert not any(".1.mlp" in name for name in adapter)
    run = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert (run["exclude"], run["rank_pattern"]) == (["o_proj", "*.1.mlp"], {"down_proj": 2, "q_proj": 12})


def test_a_rank_that_is_too_large_for_some_layers_is_said(home: Path, tmp_path: Path) -> None:
    result = TRAIN.good(*speak(home, tmp_path / "a", "--rank", 16))
    assert "k_proj gets rank 8 (2 of them), v_proj gets rank 8 (2 of them)" in result.stderr


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "=3", "q_proj=x", "q_proj=-1"])
def test_a_rank_without_a_glob_or_a_number_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    assert f"--rank-pattern {text!r} is not GLOB=R" in TRAIN.refused(
        *speak(home, tmp_path / "a", "--rank-pattern", text)
    )
