"""Runs on disk: which checkpoints, in what order, with which losses."""

import json
from pathlib import Path

import pytest

from loralens import FormatError, OptionError
from loralens.formats.records.training import LoggedLoss, read_run


def checkpoint(folder: Path, state: object = None) -> Path:
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


HISTORY = [
    {"step": 10, "loss": 3.0},
    {"step": 20, "loss": 2.0, "learning_rate": 1e-4},
    {"step": 20, "eval_loss": 2.5},
    {"step": 30, "loss": float("nan")},
    {"step": 32, "loss": 10**400},
    {"step": 34, "loss": True},
    {"step": 40, "loss": 1},
    {"step": 40, "train_runtime": 1.0},
    "nonsense",
]


def test_a_folder_of_the_trainer_is_in_order_of_steps(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-1000", {"global_step": 1000, "log_history": HISTORY})
    checkpoint(tmp_path / "checkpoint-200", {"global_step": 200, "log_history": HISTORY[:1]})
    checkpoint(tmp_path / "checkpoint-90")
    checkpoint(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-7").write_text("a file")
    run = read_run([tmp_path])
    assert [(one.path.name, one.step) for one in run.checkpoints] == [
        ("checkpoint-90", 90), ("checkpoint-200", 200), ("checkpoint-1000", 1000),
    ]  # fmt: skip
    assert run.train == (LoggedLoss(3.0, 10), LoggedLoss(2.0, 20), LoggedLoss(1.0, 40))
    assert run.evaluation == (LoggedLoss(2.5, 20),)
    assert run.source == tmp_path / "checkpoint-1000" / "trainer_state.json"


def test_the_state_is_believed_before_the_name(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "checkpoint-5", {"global_step": 50})
    second = checkpoint(tmp_path / "checkpoint-6", {"global_step": 40, "log_history": None})
    assert [(one.path.name, one.step) for one in read_run([first, second]).checkpoints] == [
        ("checkpoint-6", 40), ("checkpoint-5", 50),
    ]  # fmt: skip


def test_a_list_is_sorted_and_those_without_a_step_come_last_as_given(tmp_path: Path) -> None:
    names = ("final", "other", "model-ckpt750", "step_20", "iter-100")
    run = read_run([checkpoint(tmp_path / name) for name in names])
    assert [(one.path.name, one.step) for one in run.checkpoints] == [
        ("step_20", 20), ("iter-100", 100), ("model-ckpt750", 750), ("final", None), ("other", None),
    ]  # fmt: skip
    assert run.train == ()
    assert run.source is None


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nowhere: "):
        read_run([tmp_path / "nowhere"])
    with pytest.raises(OptionError, match="holds no checkpoints"):
        read_run([tmp_path])
    one = checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(OptionError, match="holds 1 checkpoint\n"):
        read_run([tmp_path])
    twin = checkpoint(tmp_path / "b" / "checkpoint-1")
    with pytest.raises(OptionError, match="both of step 1"):
        read_run([one, twin])
    (twin / "trainer_state.json").write_text("[")
    with pytest.raises(FormatError, match="trainer_state"):
        read_run([one, twin])


def test_our_own_log_has_the_losses(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-1")
    checkpoint(tmp_path / "checkpoint-2")
    lines = [
        '{"step": 0, "evaluation": {"loss": 3.5, "accuracy": 0.1}}',
        '{"step": 1, "loss": 3.0, "lr": 0.1}',
        '{"step": 2, "loss": 2.0}',
        '{"step": 2, "evaluation": {"loss": 2.5}}',
        '{"step": 2, "other": {"norm": 1.0}}',
        "[1]",
        '{"step": 3, "lo',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    run = read_run([tmp_path])
    assert run.train == (LoggedLoss(3.0, 1), LoggedLoss(2.0, 2))
    assert run.evaluation == (LoggedLoss(3.5, 0), LoggedLoss(2.5, 2))
    assert run.source == tmp_path / "log.jsonl"
    assert read_run([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]).source is None
