"""``loralens trajectory``: exact output on a small run, the JSON contract, strangers, errors."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command

CALL = Command("trajectory")
run, told, refused = CALL.run, CALL.told, CALL.refused


def checkpoint(angle: float, size: float) -> loralens.Adapter:
    """One direction of length ``size``, turned by ``angle`` from the last one's on the out side."""
    B, A = np.zeros((4, 1), np.float32), np.zeros((1, 4), np.float32)
    B[0], B[1], A[0, 0] = size * np.cos(angle), size * np.sin(angle), 1
    return loralens.Adapter(modules={"layers.0.q": loralens.LowRank(B, A)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step, angle, size in ((5, 1.0, 0.5), (20, 0.1, 1.5), (100, 0.0, 2.0)):
        loralens.save(checkpoint(angle, size), tmp_path / f"checkpoint-{step}")
    state = {
        "global_step": 100,
        "log_history": [{"step": 1, "loss": 3.5}, {"step": 19, "loss": 2.25}, {"step": 100, "eval_loss": 2.5}],
    }
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


TABLE = """\
The direction is settled from step 20 of 100 on: from there every cosine with the last checkpoint is at least 0.9.
φ in is high from the first checkpoint on because A stays near its initialisation (cosine 1.00 of A first to last): \
what was learnt is on the out side.

3 checkpoints, in order of steps
checkpoint      step  ‖ΔW‖F   σ₁  effective   moved  cos previous  cos last  φ out last  φ in last      loss  eval \
loss
checkpoint-5       5    0.5  0.5       1.00                           0.540       0.292      1.000    3.5 @1   2.5 \
@100
checkpoint-20     20    1.5  1.5       1.00   1.252         0.622     0.995       0.990      1.000  2.25 @19   2.5 \
@100
checkpoint-100   100      2    2       1.00  0.5291         0.995     1.000       1.000      1.000  2.25 @19        \
2.5

chance level of φ: in 0.25, out 0.25; moved: ‖ΔW − ΔW of the row above‖F
@N: a loss of step N, the nearest that was logged
"""


def test_table_is_exactly_this(folder: Path) -> None:
    result = run(folder)
    assert result.stdout == TABLE
    assert "warning" not in result.stderr


def test_what_still_turns_is_said_to_turn(tmp_path: Path) -> None:
    for step, angle in ((1, 1.0), (2, 0.6), (3, 0.0)):
        loralens.save(checkpoint(angle, 1.0), tmp_path / f"checkpoint-{step}")
    said = run(tmp_path).stdout
    assert "The direction was still turning: cosine 0.825 between the last two checkpoints." in said
    assert "settled" not in said
    assert "  loss" not in said


def test_a_stranger_is_named_and_nothing_is_concluded(folder: Path, tmp_path: Path) -> None:
    other = checkpoint(0.0, 1.0)["layers.0.q"]
    A = np.roll(other.A, 1)
    loralens.save(loralens.Adapter(modules={"layers.0.q": loralens.LowRank(other.B, A)}), tmp_path / "another")
    result = run(*(folder / f"checkpoint-{step}" for step in (5, 20, 100)), tmp_path / "another")
    assert "warning: another is not of one run with the others" in result.stderr
    conclusion, title, *_ = (block.splitlines() for block in result.stdout.split("\n\n"))
    assert conclusion == ["These 4 checkpoints are not of one run, so nothing is said about when a direction settled."]
    assert title[0] == "4 checkpoints, 1 of them without a step and last, as given"
    assert title[5].split()[:2] == ["another", "–"]
    pair = run(folder / "checkpoint-5", tmp_path / "another")
    assert "warning: checkpoint-5, another are not of one run:" in pair.stderr
    assert len(told(folder / "checkpoint-5", tmp_path / "another")["runs"]) == 2


@pytest.mark.parametrize("named", [("late", "early", "middle"), ("checkpoint-5", "late", "middle")])
def test_without_steps_there_is_no_order_and_no_conclusion(named: tuple[str, ...], tmp_path: Path) -> None:
    for name, angle in zip(named, (0.0, 0.1, 1.0), strict=True):
        loralens.save(checkpoint(angle, 1.0), tmp_path / name)
    paths = [tmp_path / name for name in named]
    said, record = run(*paths).stdout, told(*paths)
    assert (record["ordered"], record["settled"]) == (False, None)
    assert said.startswith("Without steps there is no order")
    assert not any(word in said for word in ("settled from", "still turning", "from the start"))
    first = (
        "as given: their steps are unknown" if "-" not in named[0] else "2 of them without a step and last, as given"
    )
    assert f"\n3 checkpoints, {first}\n" in said


def test_a_checkpoint_that_is_0_does_not_hide_the_chance_level(tmp_path: Path) -> None:
    for step, size in ((0, 0.0), (10, 1.0), (20, 2.0)):
        loralens.save(checkpoint(0.1, size), tmp_path / f"checkpoint-{step}")
    result = run(tmp_path)
    assert "chance level of φ: in 0.25, out 0.25; moved" in result.stdout
    loralens.save(checkpoint(0.1, 0.0), tmp_path / "checkpoint-30")
    text = run(tmp_path).stdout
    assert "nan" not in text
    assert "The last checkpoint is 0, so there is no direction to compare the others with.\n" in text


def test_an_error_says_which_checkpoint_it_is_in(folder: Path) -> None:
    loralens.save(checkpoint(0.1, np.nan), folder / "checkpoint-50")
    assert refused(folder).startswith(f"error: {folder / 'checkpoint-50'}: layers.0.q: a factor holds NaN or Inf\n")


def test_json_keeps_its_contract(folder: Path) -> None:
    record = told(folder)
    assert record["loralens"] == loralens.__version__
    assert record["trainer_state"] == str(folder / "checkpoint-100" / "trainer_state.json")
    assert record["settled"] == str(folder / "checkpoint-20")
    assert record["runs"] == [[str(folder / f"checkpoint-{step}") for step in (5, 20, 100)]]
    assert record["history"] == {"loss": [[1, 3.5], [19, 2.25]], "eval_loss": [[100, 2.5]]}
    first, second, _ = record["checkpoints"]
    assert (first["path"], first["step"], first["frobenius"]) == (str(folder / "checkpoint-5"), 5, pytest.approx(0.5))
    assert first["cosine"] == pytest.approx(np.cos(1.0), abs=1e-6)
    assert first["phi"] == {"in": pytest.approx(1), "out": pytest.approx(np.cos(1.0) ** 2, abs=1e-6)}
    assert second["step_length"] == pytest.approx(np.sqrt(0.25 + 2.25 - 1.5 * np.cos(0.9)), rel=1e-6)
    assert (second["loss"], second["eval_loss"]) == ({"value": 2.25, "step": 19}, {"value": 2.5, "step": 100})
