"""``inspect``, ``equal`` and ``survey`` from Python: the JSON of the commands, natural guesses, narrow terminals."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import OptionError
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.draws import draw_adapter
from tests.verbs.shown import record_of

# --- inspect ---


def test_inspect_gives_the_json_of_the_command_for_paths_and_objects(small: Path) -> None:
    command = Command("inspect")
    assert record_of(loralens.inspect(small)) == command.told(small)
    result = loralens.inspect(small, small, modules=["q_proj"], consumer="vllm")
    words = (small, small, "-m", "q_proj", "--consumer", "vllm", "--json")
    assert record_of(result) == json.loads(command.run(*words).stdout)
    adapter = loralens.load(small)
    record = loralens.inspect(adapter).record()["adapters"][0]
    assert record == loralens.inspect(small).record()["adapters"][0]
    assert [one.path for one in loralens.inspect([adapter, small]).adapters] == [f"{small} 1", str(small)]


def test_the_answer_is_about_errors_of_the_consumer_alone(small: Path) -> None:
    command = Command("inspect")
    assert loralens.inspect(small).answer is None
    for consumer, answer in (("peft", True), ("vllm", True), ("llama.cpp", False)):
        result = loralens.inspect(small, consumer=consumer)
        assert result.answer is answer
        for option in ("--consumer", "--for"):
            assert command.run(small, option, consumer).exit_code == int(not answer)
    nan = small_adapter().map(lambda m: loralens.LowRank(m.B * np.float32(np.nan), m.A, m.scale))
    broken = loralens.inspect(nan, consumer="comfyui")
    assert {finding.level for finding in broken.findings} >= {"error"}
    assert loralens.inspect(nan).answer is False


def test_a_warning_of_the_consumer_is_not_its_no(tmp_path: Path) -> None:
    loralens.save(draw_adapter(0, {"model.layers.0.self_attn.q_proj": (64, 64)}, 32), tmp_path / "wide")
    result = loralens.inspect(tmp_path / "wide", consumer="vllm")
    assert [finding.level for finding in result.adapters[0].refusals] == ["warning"]
    assert result.answer is True
    assert Command("inspect").run(tmp_path / "wide", "--consumer", "vllm").exit_code == 0


# --- equal ---


def test_equal_is_a_truth_value_and_gives_the_json_of_the_command(small: Path, tmp_path: Path) -> None:
    other = small_adapter().map(lambda m: loralens.LowRank(m.B, m.A, np.float32(1.001) * m.scale))
    loralens.save(other, tmp_path / "other")
    same, different = loralens.equal(small, loralens.load(small)), loralens.equal(small, tmp_path / "other")
    assert (bool(same), same.equal, same.answer) == (True, True, True)
    assert (bool(different), different.equal) == (False, False)
    assert loralens.equal(small, other, tolerance=0.01)
    result = Command("equal").run(small, tmp_path / "other", "--json")
    assert (record_of(different), result.exit_code) == (json.loads(result.stdout), 1)
    assert len(different.to_csv().splitlines()) == 1 + 6
    with pytest.raises(OptionError, match="tolerance -1 is not possible"):
        loralens.equal(small, small, tolerance=-1)


# --- survey ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters and a copy of each, and a file that is none."""
    for name, factor in {"a": 1, "b": 3}.items():
        for copy in (name, f"{name}-again"):
            loralens.save(factor * small_adapter(), tmp_path / "collection" / copy)
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    return tmp_path


def test_survey_gives_the_json_of_the_command(folder: Path) -> None:
    result = loralens.survey(folder)
    assert record_of(result) == Command("survey").told(folder)
    assert result.to_csv() == Command("survey").good(folder, "--csv").stdout
    assert (len(result), [row.label for row in result.unreadable]) == (4, ["bad"])
    copies = [row for row in result if row.original]
    assert [row.verdict for row in copies] == [f"copy of {row.original.label}" for row in copies if row.original]
    assert len(copies) == 2
    with pytest.raises(OptionError, match="is not a folder"):
        loralens.survey(folder / "nowhere")
