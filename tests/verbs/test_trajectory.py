"""``loralens.trajectory``: a run, its checkpoints, and adapters that have been read."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command
from tests.verbs.shown import check_tables_fit, record_of, rows_of

run = Command("trajectory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step, angle, size in ((5, 1.0, 0.5), (20, 0.1, 1.5), (100, 0.0, 2.0)):
        B, A = np.zeros((4, 1), np.float32), np.zeros((1, 4), np.float32)
        B[0], B[1], A[0, 0] = size * np.cos(angle), size * np.sin(angle), 1
        modules = {"layers.0.q": loralens.LowRank(B, A)}
        loralens.save(loralens.Adapter(modules=modules), folder / f"checkpoint-{step}")
    state = {"global_step": 100, "log_history": [{"step": 1, "loss": 3.5}, {"step": 19, "loss": 2.25}]}
    (folder / "checkpoint-100" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_the_result_is_what_the_command_prints(folder: Path) -> None:
    result = loralens.trajectory(folder)
    assert repr(result) == "TrajectoryResult(3 checkpoints)"
    assert record_of(result) == run.told(folder)
    assert run.good(folder, "--csv").stdout == result.to_csv()
    checkpoints = [folder / f"checkpoint-{step}" for step in (100, 5, 20)]
    assert loralens.trajectory(*checkpoints).record() == loralens.trajectory(checkpoints).record() == result.record()
    assert result.settled is not None
    assert result.settled.step == 20


def test_csv_has_a_row_a_checkpoint(folder: Path) -> None:
    rows = rows_of(loralens.trajectory(folder))
    assert [row["step"] for row in rows] == ["5", "20", "100"]
    assert (rows[1]["loss"], rows[1]["loss_step"], rows[1]["eval_loss"]) == ("2.25", "19", "")
    assert rows[0]["step_length"] == rows[0]["previous_phi_in"] == ""
    assert float(rows[0]["phi_out"]) == pytest.approx(np.cos(1.0) ** 2, abs=1e-6)


def test_adapters_that_have_been_read_have_no_steps(folder: Path) -> None:
    loaded = [loralens.load(folder / f"checkpoint-{step}") for step in (5, 20, 100)]
    result = loralens.trajectory(*loaded)
    assert result.names == ["adapter 1", "adapter 2", "adapter 3"]
    assert (result.settled, result.run.ordered) == (None, False)
    told = loralens.trajectory(folder)
    assert [point.cosine for point in result] == [point.cosine for point in told]
    with pytest.raises(loralens.OptionError, match="give all of them as paths, or all as adapters"):
        loralens.trajectory(loaded[0], folder / "checkpoint-100")
    with pytest.raises(loralens.OptionError, match="one adapter is not a training run"):
        loralens.trajectory(loaded[0])
    with pytest.raises(loralens.OptionError, match="this adapter was already read"):
        loralens.trajectory(*loaded, alpha=3.0)


def test_tables_fit_every_terminal_and_there_is_a_figure(folder: Path) -> None:
    result = loralens.trajectory(folder)
    check_tables_fit(result)
    assert loralens.plot(result).axes
    (table,) = result.tables()
    assert "eval loss" not in [column.title for column in table.shown]  # nothing logged one


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(loralens.OptionError, match="holds no checkpoints"):
        loralens.trajectory(tmp_path)
