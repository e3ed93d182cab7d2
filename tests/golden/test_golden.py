"""Golden output: what is recorded compares equal, and every kind of change is noticed."""

from pathlib import Path
from typing import Any

import pytest

from tests.golden.__main__ import main
from tests.golden.content import steady, steady_lines
from tests.golden.difference import differences

ADAPTER = "conformance/kohya-locon/adapter_model.safetensors"
PRINTS, WRITES = (f"{verb}/{ADAPTER}" for verb in ("spectrum", "compress"))
WHICH = ["--cases", PRINTS, "--cases", WRITES, "--jobs", "1"]


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
