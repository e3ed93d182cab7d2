"""``loralens train``: finished runs that go on, runs that start from an adapter, and runs that a signal ends."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loralens
from loralens.training import record_of
from tests import models
from tests.cli.command import Command
from tests.processes import start

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

TRAIN = Command("train", "--threads", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.folder(models.bert(), home / "bert")
    models.jsonl(home / "d.jsonl", models.TEXTS * 3, label=["x", "y", "y", "x"] * 3)
    return home


def speak(home: Path, target: Path, *more: object) -> list[object]:
    files = ("--model", home / "llama", "--data", home / "d.jsonl", "--task", "causal-lm", "-o", target)
    return [*files, "--batch", 4, "--lr", 0.01, "--warmup", 0, *more]


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    adapter = loralens.load(folder)
    return {f"{name}.{part}": getattr(module, part) for name, module in adapter.items() for part in "BA"}


@pytest.mark.slow
def test_a_finished_run_goes_on_as_one_that_had_all_steps(home: Path, tmp_path: Path) -> None:
    options = ("--targets", "q_proj,v_proj", "--rank", 2)
    TRAIN.good(*speak(home, tmp_path / "whole", *options, "--steps", 9))
    TRAIN.good(*speak(home, tmp_path / "a", *options, "--steps", 4))
    first = weights(tmp_path / "a")
    result = TRAIN.good(*speak(home, tmp_path / "a", *options, "--more-steps", 3))
    assert "going on after step 4" in result.stderr
    assert "in 7 steps" in result.stdout
    assert weights(tmp_path / "a") != first
    TRAIN.good(*speak(home, tmp_path / "a", *options, "--more-steps", 2))
    ours, wanted = tensors(tmp_path / "a"), tensors(tmp_path / "whole")
    assert all(np.array_equal(ours[name], wanted[name]) for name in wanted)
    assert steps_of(tmp_path / "a") == list(range(1, 10))
    # What the state is kept for does not look like an adapter.
    listed = [adapter.path for adapter in loralens.survey(tmp_path / "a").adapters]
    assert listed == [tmp_path / "a" / "adapter_model.safetensors"]


def test_a_damaged_state_leaves_the_finished_run(home: Path, tmp_path: Path) -> None:
    options = ("--targets", "q_proj", "--rank", 2)
    TRAIN.good(*speak(home, tmp_path / "a", *options, "--steps", 2))
    content = load_file(tmp_path / "a" / "state.safetensors")
    with safe_open(tmp_path / "a" / "state.safetensors", "np") as file:
        metadata = file.metadata()
    name = next(name for name in content if name.endswith("exp_avg"))
    save_file({**content, name: content[name][:1]}, tmp_path / "a" / "state.safetensors", metadata)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    said = TRAIN.refused(*speak(home, tmp_path / "a", *options, "--more-steps", 2))
    assert "a/state.safetensors" in said
    assert "the state of the optimiser is damaged" in said
    assert not (tmp_path / "a.unfinished").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_what_cannot_go_on_is_refused_and_stays(home: Path, tmp_path: Path) -> None:
    options = ("--targets", "q_proj", "--rank", 2)
    assert "there is no run to continue" in TRAIN.refused(*speak(home, tmp_path / "a", *options, "--more-steps", 2))
    TRAIN.good(*speak(home, tmp_path / "a", *options, "--steps", 2))
    before = weights(tmp_path / "a")
    said = TRAIN.refused(*speak(home, tmp_path / "a", "--targets", "q_proj", "--rank", 3, "--more-steps", 2))
    assert "holds another run: rank is 2 there, 3 here" in said
    said = TRAIN.refused(*speak(home, tmp_path / "a", *options, "--more-steps", 2, "--overwrite"))
    assert "--more-steps continues the run that --overwrite would delete" in said
    (tmp_path / "a" / "state.safetensors").unlink()
    said = TRAIN.refused(*speak(home, tmp_path / "a", *options, "--more-steps", 2))
    assert "has no state of its last step" in said
    assert "--start-from" in said
    assert weights(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_starts_from_an_adapter(home: Path, tmp_path: Path) -> None:
    ranks = ("--rank", 3, "--rank-pattern", "q_proj=2", "--alpha", 6)
    TRAIN.good(*speak(home, tmp_path / "a", "--targets", "q_proj,down_proj,embed_tokens", *ranks, "--steps", 5))
    data = ("--eval", home / "d.jsonl", "--steps", 1)
    said = TRAIN.told(*speak(home, tmp_path / "b", "--start-from", tmp_path / "a", *data))
    wanted = Command("evaluate").told(
        tmp_path / "a", "--model", home / "llama", "--task", "causal-lm", "--data", home / "d.jsonl", "--threads", 1
    )
    assert said["evaluations"][0]["loss"] == pytest.approx(wanted["adapters"][0]["loss"], rel=1e-5)
    old, new = loralens.load(tmp_path / "a"), loralens.load(tmp_path / "b")
    assert {name: (m.rank, m.scale) for name, m in old.items()} == {name: (m.rank, m.scale) for name, m in new.items()}
    record = record_of(new) or {}
    assert record["initialisation"] == "adapter"
    assert len(record["started_from"]) > 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 4), "--rank and --start-from exclude each other"),
        (("--method", "dora"), "has no magnitudes, which dora trains"),
        (("--method", "pissa"), "pissa starts with factors of its own"),
    ],
)
def test_what_an_adapter_decides_is_not_asked_twice(
    home: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    models.saved(models.adapter(models.llama(), ("q_proj",)), tmp_path / "a")
    said = TRAIN.refused(*speak(home, tmp_path / "b", "--start-from", tmp_path / "a", "--steps", 1, *options))
    assert message in said
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process could answer")
def test_sigterm_saves_and_ends_with_143_and_resume_goes_on(home: Path, tmp_path: Path) -> None:
    options = ("--targets", "q_proj", "--rank", 2, "--steps", 120, "--save-every", 1000)
    TRAIN.good(*speak(home, tmp_path / "whole", *options))
    running = start("loralens", "train", "--threads", 1, *speak(home, tmp_path / "a", *options))
    log = tmp_path / "a.unfinished" / "log.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 3):
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    _, stderr = running.communicate()
    assert running.returncode == 143, stderr
    assert "holds the last state, and --resume goes on from there" in stderr
    done = len(steps_of(tmp_path / "a.unfinished"))
    assert 3 < done < 120
    result = TRAIN.good(*speak(home, tmp_path / "a", *options, "--resume"))
    assert f"going on after step {done}" in result.stderr  # nothing was lost
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
