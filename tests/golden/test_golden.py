"""Golden output: what is recorded compares equal, and every kind of change is noticed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.golden.__main__ import main
from tests.golden.content import steady, steady_lines
from tests.golden.difference import differences

ADAPTER = "conformance/kohya-locon/adapter_model.safetensors"
PRINTS, WRITES = (f"{verb}/{ADAPTER}" for verb in ("spectrum", "compress"))
WHICH = ["--cases", PRINTS, "--cases", WRITES, "--jobs", "1"]


def changed(folder: Path, case: str) -> Any:
    """The record of a case, to be changed and written back."""
    return json.loads((folder / f"{case.replace('/', '~')}.json").read_text())


def write(folder: Path, record: Any) -> None:
    (folder / f"{record['case'].replace('/', '~')}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of two cases: one prints numbers, one writes files."""
    folder = tmp_path_factory.mktemp("golden") / "record"
    assert main(["record", str(folder), *WHICH]) == 0
    return folder


def compared(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["compare", str(folder), *WHICH, *options])
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_the_same_again_is_no_difference(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = compared(golden, capsys)
    assert code == 0, out
    assert "2 cases compared: 0 differ, 0 with additions" in out
    text = "".join(path.read_text() for path in golden.iterdir())
    assert str(golden.parent) not in text
    assert "/golden-" not in text  # the folder that the cases ran in


@pytest.mark.slow
def test_a_number_a_key_and_a_file_are_noticed(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(golden, tmp_path / "record"))
    prints, writes = changed(folder, PRINTS), changed(folder, WRITES)
    spectrum = prints["calls"][0]["stdout"]["adapters"][0]
    first = next(iter(spectrum["modules"]))
    first["scale"] += 1e-15
    first["of old"] = 1
    file = "peft/adapter_model.safetensors"
    tensors = writes["calls"][1]["files"][file]["tensors"]
    key = next(iter(tensors))
    tensors[key]["sha256"] = "0" * 64
    writes["calls"][1]["files"]["peft/gone.json"] = {"kind": "json", "json": {}}
    write(folder, prints)
    write(folder, writes)
    code, out = compared(folder, capsys, "--allow-added")
    assert code == 1
    assert "calls[0].stdout.adapters[0].modules[0].scale: " in out
    assert "calls[0].stdout.adapters[0].modules[0].of old: missing" in out
    assert f"calls[1].files.{file}.tensors.{key}.sha256: 000" in out
    assert "calls[1].files.peft/gone.json: missing" in out
    assert "2 cases compared: 2 differ, 0 with additions" in out


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert main(["record", str(tmp_path), *WHICH]) == 2
    assert main(["compare", str(tmp_path), *WHICH]) == 2
    assert (tmp_path / "mine").read_text() == "mine"


def apart(before: Any, after: Any, tolerance: float = 0.0) -> list[str]:
    return [f"{one.kind} {one.path}" for one in differences(before, after, tolerance=tolerance)]


def test_numbers_are_equal_to_the_bit_unless_there_is_a_tolerance() -> None:
    assert apart({"a": [1.0, 2.0]}, {"a": [1.0, 2.0000000000000004]}) == ["changed a[1]"]
    assert apart(0.0, -0.0) == apart(1, 1.0) == apart(1, True) == apart([1], [1, 2]) == ["changed "]
    assert (
        apart(1.0, 1.0 + 1e-9, 1e-6) == apart(1e-17, -1e-18, 1e-6) == apart("at 0.31 s", "at 0.3100001 s", 1e-6) == []
    )
    assert apart(1.0, 1.1, 1e-6) == apart("at 0.31", "at 0.32", 1e-6) == apart("a 1", "b 1", 1e-6) == ["changed "]


def test_tensors_are_judged_by_digest_and_with_a_tolerance_by_norm() -> None:
    before = {"dtype": "F32", "sha256": "0", "norm": 1.0, "sum": 0.5}
    after = before | {"sha256": "1", "norm": 1.0 + 1e-9}
    assert apart({"t": before}, {"t": after}) == ["changed t.sha256"]
    assert apart({"t": before}, {"t": after}, 1e-6) == []
    assert apart({"t": before}, {"t": after | {"norm": 2.0}}, 1e-6) == ["changed t.norm"]


def test_the_command_may_change_and_clocks_do_not_count() -> None:
    assert apart({"command": ["a"], "exit": 0}, {"command": ["b"], "exit": 0}) == []
    assert steady({"seconds": 3.1, "x": '{"torch": "2"}'}) == {
        "seconds": "<varies>",
        "x": {"json": {"torch": "<varies>"}},
    }
    assert steady_lines("1,042 tokens/s  0:07 left") == ["… tokens/s  … left"]
