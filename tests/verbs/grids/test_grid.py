"""Grids of runs: what is made, what is not made again, and what a kill leaves."""

import csv
import logging
import multiprocessing
import shutil
import signal
from io import StringIO
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

import loralens
from loralens import FormatError, MismatchError, OptionError
from loralens.formats.records.training import Training
from tests import models
from tests.cli.command import Command
from tests.processes import TIMEOUT, run_module, run_to_end, start

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

LABELS = ["x", "y", "y", "x"]
TRAIN = Command("train", "--threads", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.folder(models.bert(), home / "bert")
    models.jsonl(home / "d.jsonl", models.TEXTS * 3, label=LABELS * 3)
    (home / "d.txt").write_text("\n".join(models.TEXTS * 3), encoding="utf-8")
    (home / "other.txt").write_text("\n".join(models.TEXTS[1:]), encoding="utf-8")
    return home


def speak(home: Path, **more: Any) -> dict[str, Any]:
    return {"model": home / "llama", "task": "causal-lm", "data": home / "d.txt", "eval": home / "d.txt", "steps": 3,
            "batch": 4, "threads": 1, "lr": 0.01, "jobs": 1} | more  # fmt: skip


def grid(**options: Any) -> Any:
    return loralens.train(**options)


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO((folder / "runs.csv").read_text())))


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


AXES: dict[str, Any] = {"rank": [1, 2], "seed": range(2), "targets": ["all-linear", "q_proj,v_proj"]}


@pytest.fixture(scope="module")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return grid(**speak(home), grid=AXES, output=tmp_path_factory.mktemp("made") / "g")


def test_every_run_has_the_bytes_of_the_run_alone(home: Path, made: Any, tmp_path: Path) -> None:
    """Whatever the runs before it have left in the model, which is loaded once."""
    assert len(made) == 8
    for run in made:
        settings = run.settings
        alone = {"rank": settings["rank"], "seed": settings["seed"], "targets": settings["targets"].replace("+", ",")}
        single = speak(home) | alone | {"output": tmp_path / run.name}
        single.pop("jobs")
        loralens.train(**single)
        assert weights(tmp_path / run.name) == weights(run.output)


def test_starts_that_change_the_weights_leave_them_as_they_were(home: Path, tmp_path: Path) -> None:
    """Also for the checks before the first run: the start along the gradient has none yet."""
    for run in grid(**speak(home), grid={"start": ["pissa", "lora-ga", "kaiming"]}, output=tmp_path / "g"):
        single = speak(home, start=run.settings["start"]) | {"output": tmp_path / run.name, "jobs": None}
        loralens.train(**single)
        assert weights(tmp_path / run.name) == weights(run.output)


def test_runs_csv_has_every_setting_and_result(made: Any) -> None:
    found = {row["run"]: row for row in rows(made.output)}
    assert set(found) == {run.name for run in made}
    for run in made:
        row = found[run.name]
        assert row["status"] == run.status == "done"
        assert (row["rank"], row["seed"]) == (str(run.settings["rank"]), str(run.settings["seed"]))
        result = run.results
        assert float(row["eval_loss"]) == result["eval_loss"]
        evaluations = [line["evaluation"]["loss"] for line in run.log if "evaluation" in line]
        assert [result["before_loss"], result["eval_loss"]] == [evaluations[0], evaluations[-1]]
        losses = [line["loss"] for line in run.log if "loss" in line]
        assert result["loss"] == losses[-1]
        assert result["trainable"] == run.adapter.parameters
        assert (result["steps_done"], result["modules"]) == (3, len(run.adapter))
        assert result["frozen"] == sum(parameter.numel() for parameter in models.llama().parameters())
        assert float(row["seconds"]) > 0


def test_runs_are_chosen_by_their_settings(made: Any) -> None:
    assert [run.settings["seed"] for run in made.where(rank=2, targets="q_proj+v_proj")] == [0, 1]
    assert made.where(rank=3) == []
    assert made.where(targets=["q_proj", "v_proj"], rank=1, seed=1)[0].results["modules"] == 4


def test_what_is_done_is_not_done_again_and_new_values_add_runs(
    home: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "g"
    shutil.copytree(made.output, folder)
    before = {run.name: weights(run.output) for run in made}
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        # Nothing is read for it.
        patch.setattr("loralens.verbs.runs.grid.read_training_inputs", None)
        again = grid(**speak(home), grid=AXES, output=folder)
    assert (again.trained, len(again)) == (0, 8)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == times
    more = grid(**speak(home), grid={**AXES, "rank": [2, 3], "seed": 0}, output=folder)
    assert (more.trained, len(more)) == (2, 4)
    assert len(rows(folder)) == 10
    assert {row["status"] for row in rows(folder)} == {"done"}
    assert {name: weights(folder / name) for name in before} == before


def test_another_setting_in_the_same_folder_is_refused_and_overwrite_replaces(home: Path, tmp_path: Path) -> None:
    folder, axes = tmp_path / "g", {"rank": [1, 2]}
    first = grid(**speak(home), grid=axes, output=folder)
    old = weights(first[0].output)
    with pytest.raises(MismatchError, match=r"rank=1 was made with other settings: lr is 0.01 there, 0.02 here"):
        grid(**speak(home, lr=0.02), grid=axes, output=folder)
    assert weights(first[0].output) == old
    second = grid(**speak(home, lr=0.02), grid={"rank": [1]}, output=folder, overwrite=True)
    assert second.trained == 1
    assert weights(first[0].output) != old
    assert [(row["rank"], row["lr"]) for row in rows(folder)] == [("1", "0.02"), ("2", "0.01")]


@pytest.mark.parametrize("name", ["runs.csv", "run.json", "adapter_model.safetensors"])
def test_a_folder_of_something_else_is_refused(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / name).write_text("mine")
    with pytest.raises(OptionError, match=f"holds {name}, which no grid has written there"):
        grid(**speak(home), grid={"rank": [1]}, output=tmp_path / "g")
    assert (tmp_path / "g" / name).read_text() == "mine"
    with pytest.raises(OptionError, match="is a file, but a grid is a folder"):
        grid(**speak(home), grid={"rank": [1]}, output=tmp_path / "g" / name)


@pytest.mark.slow
def test_a_run_that_diverges_does_not_stop_the_others_and_is_not_tried_again(home: Path, tmp_path: Path) -> None:
    options = speak(home, optimiser="sgd", clip=0)
    options.pop("lr")
    first = grid(**options, grid={"lr": [1e30, 0.01]}, output=tmp_path / "g")
    assert [run.status for run in first] == ["diverged", "done"]
    assert "at step" in first[0].message
    assert {row["run"]: row["message"] for row in rows(tmp_path / "g")} == {run.name: run.message for run in first}
    assert "1 run diverged" in first.conclusion()[1]
    assert grid(**options, grid={"lr": [1e30, 0.01]}, output=tmp_path / "g").trained == 0


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("more", "axes", "words"),
    [
        ({}, {"rank": [1, 200]}, r"rank=200: rank 200 is larger than the matrix of any target allows"),
        ({}, {"targets": ["q_proj", "q_prj"]}, r"targets=q_prj: no module matches 'q_prj'\n  fix: .*q_proj"),
        ({}, {"batch": [4, 6], "accumulate": 4}, "batch=6_accumulate=4: a batch of 6 cannot be cut into 4"),
        ({}, {"start": ["kaiming", "kaimnig"]}, "start=kaimnig: start 'kaimnig' is not possible"),
        ({"eval": None}, {"evaluate_every": [None, 2]}, "evaluate-every=2: evaluate_every= needs texts"),
        ({}, {"data": ["d.txt", "nowhere.txt"]}, "nowhere.txt: "),
    ],
)
def test_every_value_is_checked_before_the_first_run(
    home: Path, tmp_path: Path, more: dict[str, Any], axes: Any, words: str
) -> None:
    options = {key: value for key, value in speak(home, **more).items() if key not in axes}
    if "data" in axes:
        axes = {"data": [home / name for name in axes["data"]]}
    with pytest.raises(OptionError, match=words):
        grid(**options, grid=axes, output=tmp_path / "g")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"resume": True}, "grid= and resume=True exclude each other"),
        ({"output": None}, "missing option 'output='"),
        ({"jobs": 0}, "jobs 0 is not possible"),
    ],
)
def test_options_of_a_single_run_are_refused(home: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        grid(**speak(home) | {"output": tmp_path / "g"} | more, grid={"rank": [1]})


def test_jobs_without_a_grid_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="jobs= is the number of runs of a grid"):
        loralens.train(**speak(home), output=tmp_path / "a")


def test_a_run_that_was_interrupted_goes_on_from_its_state(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = speak(home, save_every=1) | {"grid": {"rank": [1, 2]}, "output": tmp_path / "g"}
    log = Training.log

    def interrupt(training: Training, record: Any) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt
        log(training, record)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            grid(**options)
    assert [run.status for run in grid(**options, dry_run=True)] == ["unfinished", "missing"]
    shutil.copytree(tmp_path / "g", tmp_path / "damaged")
    with caplog.at_level(logging.INFO, "loralens"):
        assert grid(**options).trained == 2
    assert "rank=1: going on after step 2" in caplog.text
    assert [row["steps_done"] for row in rows(tmp_path / "g")] == ["3", "3"]
    # The advice of the error is true for a grid too.
    options["output"] = tmp_path / "damaged"
    (tmp_path / "damaged" / "rank=1.unfinished" / "state.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="rank=1: "):
        grid(**options)
    assert grid(**options, overwrite=True).trained == 2


# ---- The command


@pytest.mark.slow
def test_the_command_makes_the_same_several_at_a_time_and_its_table_has_the_axes(
    home: Path, made: Any, tmp_path: Path
) -> None:
    words = ["--model", home / "llama", "--task", "causal-lm", "--data", home / "d.txt", "--eval", home / "d.txt"]
    words += ["--steps", 3, "--batch", 4, "--lr", 0.01, "--jobs", 2, "--grid", "rank=1,2", "--grid", "seed=0..1"]
    words += ["--grid", "targets=all-linear,q_proj+v_proj", "-o", tmp_path / "g"]
    out = run_module("loralens", *TRAIN.words, *words)
    assert [weights(tmp_path / "g" / run.name) for run in made] == [weights(run.output) for run in made]
    assert out.startswith(f"{tmp_path / 'g'}: 8 runs done; runs.csv has their results.")
    assert "q_proj+v_proj" in out
    said = TRAIN.told(*words)
    assert said["axes"] == ["rank", "seed", "targets"]
    assert [run["run"] for run in said["runs"]] == [run.name for run in made]
    assert said["trained"] == 0


@pytest.mark.slow
def test_other_commands_read_the_folder(made: Any, tmp_path: Path) -> None:
    survey = Command("survey").told(made.output)
    assert len(survey["adapters"]) == 8
    assert not survey["unreadable"]
    similar = Command("similarity").told(made.output)
    assert {Path(path).name for path in similar["adapters"]} == {run.name for run in made}


# ---- Kills, and errors


def command(home: Path, folder: Path, *more: object) -> list[object]:
    """The options of a grid of three runs, but for its threads."""
    words: list[object] = ["--model", home / "llama", "--task", "causal-lm", "--data", home / "d.txt"]
    words += ["--eval", home / "d.txt", "--batch", 4, "--lr", 0.01, "--steps", 20, "--save-every", 5]
    return [*words, "--grid", "rank=1,2,3", "-o", folder, *more]


def done_runs(folder: Path) -> int:
    return sum(1 for path in folder.glob("*/adapter_model.safetensors") if not path.parent.name.endswith(".unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_killed_and_repeated_is_complete(home: Path, tmp_path: Path, sent: signal.Signals) -> None:
    killed = tmp_path / "g"
    with start("loralens", *TRAIN.words, *command(home, killed, "--jobs", 2, "--threads", 1)) as process:
        # In the middle: when a run has saved a state.
        begun = monotonic()
        while not any(killed.glob("*.unfinished/state.safetensors")) and monotonic() - begun < 120:
            assert process.poll() is None
            sleep(0.01)
        process.send_signal(sent)
        process.communicate(timeout=TIMEOUT)  # or what it still prints meets a closed pipe
    assert process.returncode in (-signal.SIGKILL, 143)
    assert done_runs(killed) < 3
    _, errors = run_to_end("loralens", *TRAIN.words, *command(home, killed, "--threads", 1))
    assert "going on after step" in errors
    assert [(row["run"], row["status"], row["steps_done"]) for row in rows(killed)] == [
        (f"rank={rank}", "done", "20") for rank in (1, 2, 3)
    ]
    assert not any(killed.glob("*.unfinished"))


class OursAlone(list[Any]):
    """Texts that no other process can read."""

    def __iter__(self) -> Any:
        if multiprocessing.parent_process():
            raise RuntimeError("there is none")
        return super().__iter__()


@pytest.mark.slow
def test_an_error_in_another_process_is_the_error_of_the_grid(home: Path, tmp_path: Path) -> None:
    texts = OursAlone({"text": line} for line in (home / "d.txt").read_text().splitlines())
    with pytest.raises(OptionError, match=r"rank=[12]: RuntimeError: there is none"):
        grid(**speak(home, data=texts, jobs=2), grid={"rank": [1, 2]}, output=tmp_path / "g")
