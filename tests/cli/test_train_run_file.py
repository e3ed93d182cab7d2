"""Run files: what a run writes of its settings makes the same run again; and the names of PEFT and TRL."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens import OptionError
from tests import models
from tests.cli.command import Command

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")
TRAIN = Command("train")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.jsonl(home / "d.jsonl", models.TEXTS)
    files = ("--model", home / "llama", "--data", home / "d.jsonl", "--task", "causal-lm", "-o", home / "a")
    TRAIN.good(*files, "--steps", 2, "--batch", 2, "--rank-pattern", "q_proj=3", "--targets", "*_proj", "--threads", 1)
    return home


def test_a_run_like_another_has_its_bytes(home: Path, tmp_path: Path) -> None:
    TRAIN.good("--like", home / "a", "-o", tmp_path / "b", "--threads", 1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (home / "a" / name).read_bytes()
    assert (tmp_path / "b" / "run.toml").read_text() == (home / "a" / "run.toml").read_text()


def test_what_is_given_counts_more_also_by_the_names_of_peft(home: Path, tmp_path: Path) -> None:
    words = ("--lora_alpha", 4, "--num-train-epochs", 0.5, "--use-dora", "--r", 2)
    TRAIN.good(home / "a" / "run.toml", "-o", tmp_path / "b", *words)
    settings = tomllib.loads((tmp_path / "b" / "run.toml").read_text())
    assert (settings["alpha"], settings["epochs"], settings["magnitude"], settings["rank"]) == (4.0, 0.5, True, 2)
    assert "steps" not in settings
    assert settings["rank_pattern"] == {"q_proj": 3}
    options: dict[str, Any] = {"target_modules": "q_proj", "max_steps": 1, "rank_pattern": ()}
    result = loralens.train(home / "a" / "run.toml", output=tmp_path / "c", **options)
    assert [name.rpartition(".")[2] for name in result.parts.modules] == ["q_proj"] * 2
    assert result.steps == 1


def test_what_is_no_run_file_is_refused(home: Path, tmp_path: Path) -> None:
    assert "no such file" in TRAIN.refused(tmp_path / "x.toml", "-o", tmp_path / "b")
    (tmp_path / "x.toml").write_text("rnk = 3")
    assert "nearest: rank" in TRAIN.refused(tmp_path / "x.toml", "-o", tmp_path / "b")
    (tmp_path / "x.toml").write_text("rank")
    assert "is not TOML" in TRAIN.refused(tmp_path / "x.toml", "-o", tmp_path / "b")
    assert "no such file" in TRAIN.refused("--like", home, "-o", tmp_path / "b")
    with pytest.raises(OptionError, match="another name of alpha"):
        loralens.train(home / "a" / "run.toml", output=tmp_path / "b", alpha=1.0, lora_alpha=2.0)


HOSTILE: dict[str, tuple[str, str]] = {
    "where it writes": ('output = "x"', "may not set output"),
    "its name in TRL": ('output_dir = "x"', "may not set output"),
    "what it replaces": ("overwrite = true", "may not set overwrite"),
    "what it goes on with": ("resume = true", "may not set resume"),
    "an upload": ("trl = {push_to_hub = true}", "--trl push_to_hub is not among"),
    "a service": ('trl = {report_to = "wandb"}', "trl.report_to sends the run to a service"),
    "code of the Hub": ("trl = {trust_remote_code = true}", "--trl trust_remote_code is not among"),
    "a text for a number": ('epochs = "1"', "epochs is '1', which is not a number"),
    "a truth value for a number": ("rank = true", "rank is True, which is not a whole number"),
    "numbers for globs": ("targets = [1]", "targets is [1], which is not a text"),
    "a list for a model": ('model = ["a"]', "model is ['a'], which is not a text"),
    "a date": ("data = 2026-01-01", "which is not a path"),
    "no pairs": ("trl = 3", "trl is 3, which is not a text"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_run_file_of_a_stranger_sets_nothing_but_the_run(case: str, home: Path, tmp_path: Path) -> None:
    line, message = HOSTILE[case]
    own = [one for one in (home / "a" / "run.toml").read_text().splitlines() if one.split()[0] != line.split()[0]]
    (tmp_path / "run.toml").write_text("\n".join([*own, line]), encoding="utf-8")
    said = TRAIN.refused(tmp_path / "run.toml", "-o", tmp_path / "b")
    assert message in " ".join(said.split())
    assert "run.toml" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
