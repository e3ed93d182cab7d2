"""The folder of a run of our own: while it lasts, when it is killed, and when it is done."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import FormatError, OptionError
from loralens.core import State
from loralens.formats import Stored
from loralens.formats.records.training import KEY, Training
from tests.conftest import small_adapter
from tests.formats.files import write_safetensors

RUN = {"rank": 2, "targets": ["q_proj"], "data": {"texts": 3}}


def begun(target: Path, *, overwrite: bool = False) -> Training:
    training = Training(target)
    training.begin(RUN, overwrite=overwrite)
    return training


def state(step: int) -> State:
    tensors = {
        "trained.a": np.arange(6, dtype=np.float32).reshape(2, 3) + step,
        "best.a": np.array([1.5, -2], dtype=ml_dtypes.bfloat16),
        "optimiser.a.step": np.array(float(step), dtype=np.float32),
    }
    return State(step, tensors, {"best": 0.25, "best_step": None, "waited": 1})


def test_a_finished_run_takes_the_name_of_its_target(tmp_path: Path) -> None:
    training = begun(tmp_path / "deep" / "out")
    assert not training.target.exists()
    training.log({"step": 1, "loss": 2.0})
    training.save(state(1))
    training.snapshot(1, small_adapter())
    training.finish(small_adapter())
    assert not training.folder.exists()
    found = {path.name for path in training.target.iterdir()}
    wanted = {"run.json", "log.jsonl", "checkpoint-1", "adapter_model.safetensors", "adapter_config.json"}
    assert found == {*wanted, "state.safetensors"}
    assert set(loralens.load(training.target)) == set(small_adapter())
    assert list(tmp_path.joinpath("deep").iterdir()) == [training.target]


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    training = begun(tmp_path / "out")
    assert not training.has_state
    assert training.resume(RUN) is None
    training.save(state(3))
    training.save(state(4))
    assert training.has_state
    found = training.resume(RUN)
    assert found is not None
    assert (found.step, found.record) == (4, state(4).record)
    for name, array in state(4).tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)
        assert found.tensors[name].dtype == array.dtype


def test_what_came_after_the_state_is_cut(tmp_path: Path) -> None:
    training = begun(tmp_path / "out")
    for step in range(6):
        training.log({"step": step})
        training.snapshot(step, small_adapter())
    with (training.folder / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "los')  # where a kill has cut it short
    training.save(state(3))
    (training.folder / ".state.safetensors.part").write_text("half")
    (training.folder / ".checkpoint-9.part").mkdir()
    (training.folder / "checkpoint-best").mkdir()  # somebody else's
    training.resume(RUN)
    lines = (training.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert [step for step, _ in training.snapshots] == [0, 1, 2, 3]
    assert not list(training.folder.glob(".*"))


def test_what_exists_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    with pytest.raises(OptionError, match="holds an unfinished run") as refused:
        Training(tmp_path / "out").check(overwrite=False)
    assert "--resume" in refused.value.fix
    Training(tmp_path / "out").save(state(7))
    with pytest.raises(OptionError, match="stopped after step 7"):
        Training(tmp_path / "out").check(overwrite=False)
    Training(tmp_path / "out").finish(small_adapter())
    with pytest.raises(OptionError):
        Training(tmp_path / "out").check(overwrite=False)
    Training(tmp_path / "out").check(overwrite=True)


@pytest.mark.parametrize("name", ["mine", "mine.unfinished"])
def test_what_is_no_run_is_never_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years")
    with pytest.raises(OptionError, match=r"not a training run|holds no training run"):
        Training(tmp_path / "mine").begin(RUN, overwrite=True)
    with pytest.raises(OptionError):
        Training(tmp_path / "mine").begin(RUN, overwrite=False)
    assert (tmp_path / name / "thesis.txt").read_text() == "years"


def test_the_old_stands_until_the_new_is_finished(tmp_path: Path) -> None:
    begun(tmp_path / "out").finish(small_adapter())
    (tmp_path / "out" / "log.jsonl").write_text("old")
    training = begun(tmp_path / "out", overwrite=True)
    training.save(state(1))
    assert (tmp_path / "out" / "log.jsonl").read_text() == "old"
    training.release()
    again = Training(tmp_path / "out")
    again.resume(RUN)  # killed, and resumed without saying again that the old may go
    again.finish(small_adapter())
    assert not (tmp_path / "out" / "log.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["note.txt", "checkpoint-1/optimizer.pt", "model/adapter_model.safetensors"])
def test_what_no_run_wrote_is_never_lost(tmp_path: Path, name: str) -> None:
    for folder in ("out", "out.unfinished"):
        run = begun(tmp_path / "out")
        run.snapshot(1, small_adapter())
        run.save(state(1))
        if folder == "out":
            run.finish(small_adapter())
        run.release()
        Training(tmp_path / "out").check(overwrite=True)
        note = tmp_path / folder / name
        note.parent.mkdir(exist_ok=True)
        note.write_text("years")
        with pytest.raises(OptionError, match=f"{folder}: holds files that no run wrote, which would be lost: {name}"):
            Training(tmp_path / "out").begin(RUN, overwrite=True)
        note.unlink()
        run = begun(tmp_path / "out", overwrite=True)
        note.parent.mkdir(exist_ok=True, parents=True)
        note.write_text("years")
        if folder == "out":
            with pytest.raises(OptionError, match="would be lost"):
                run.finish(small_adapter())
            note.unlink()
        run.finish(small_adapter())
        assert folder == "out" or (tmp_path / "out" / name).read_text() == "years"
        shutil.rmtree(tmp_path / "out")
        run.release()


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    training = begun(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OptionError, match="has appeared meanwhile") as refused:
        training.finish(small_adapter())
    assert str(training.folder) in refused.value.fix
    assert (training.folder / "adapter_model.safetensors").exists()


NO_STEP = '{"step": "1", "record": {}, "run": {}}'


@pytest.mark.parametrize("text", ['{"step": Infinity, "record": {}}', '{"step": 1}', NO_STEP, "[" * 100_000])
def test_a_state_that_says_nonsense(tmp_path: Path, text: str) -> None:
    training = begun(tmp_path / "out")
    write_safetensors(Stored({}, {KEY: text}), training.folder / "state.safetensors")
    with pytest.raises(FormatError, match="holds no state of a training run"):
        training.resume(RUN)


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    begun(tmp_path / "out").finish(small_adapter())
    running = begun(tmp_path / "out", overwrite=True)
    running.save(state(1))
    other = Training(tmp_path / "out")
    for refused in (
        lambda: other.check(overwrite=True),
        lambda: other.begin(RUN, overwrite=True),
        lambda: other.resume(RUN),
    ):
        with pytest.raises(OptionError, match="a run is going on there"):
            refused()
    running.log({"step": 2})
    assert running.has_state
    running.release()
    assert other.resume(RUN) is not None
    with pytest.raises(OptionError, match="a run is going on there"):
        Training(tmp_path / "out").check(overwrite=True)
    other.finish(small_adapter())
    Training(tmp_path / "out").check(overwrite=True)


@pytest.mark.parametrize("target", [".", "..", "/", ""])
def test_a_run_needs_a_name(target: str) -> None:
    with pytest.raises(OptionError, match="is not a name for a run"):
        Training(Path(target))
