"""``loralens.trajectory``: a run, its checkpoints, and adapters that have been read."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command
from tests.verbs.shown import record_of

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
    assert record_of(result) == run.told(folder)
    assert run.good(folder, "--csv").stdout == result.to_csv()
    checkpoints = [folder / f"checkpoint-{step}" for step in (100, 5, 20)]
    assert loralens.trajectory(*checkpoints).record() == loralens.trajectory(checkpoints).record() == result.record()
    assert result.settled is not None
    assert result.settled.step == 20


def test_adapters_that_have_been_read_have_no_steps(folder: Path) -> None:
    loaded = [loralens.load(folder / f"checkpoint-{step}") for step in (5, 20, 100)]
    result = loralens.trajectory(*loaded)
    assert result.names == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert (result.settled, result.run.ordered) == (None, False)
    told = loralens.trajectory(folder)
    assert [point.cosine for point in result] == [point.cosine for point in told]
    with pytest.raises(loralens.OptionError, match="give all of them as paths, or all as adapters"):
        loralens.trajectory(loaded[0], folder / "checkpoint-100")
    with pytest.raises(loralens.OptionError, match="one adapter is not a training run"):
        loralens.trajectory(loaded[0])
    with pytest.raises(loralens.OptionError, match="this adapter was already read"):
        loralens.trajectory(*loaded, alpha=3.0)
