"""`loralens.extract`: the adapter as an object, and the same numbers as the command's."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import OptionError
from tests.bases import contents
from tests.cli.command import Command
from tests.cli.test_extract import both, run, step
from tests.verbs.shown import record_of

__all__ = ["both"]


def test_without_an_output_the_result_holds_the_adapter(both: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = both
    before = contents(tmp_path)
    result = loralens.extract(base, tuned, energy=0.99)
    assert contents(tmp_path) == before
    assert isinstance(result.adapter, loralens.Adapter)
    assert list(result.adapter) == list(result.modules) == ["layers.0.q", "layers.0.v"]
    np.testing.assert_allclose(result.adapter["layers.0.q"].dense(), step(6, 4, 4, 1), atol=1e-6)
    assert "rote" not in " ".join(result.conclusion())


def test_the_result_is_what_the_command_says_and_writes(both: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = both
    rule = {"rank": 1, "drop_extra": True, "dtype": "bf16", "to": "kohya"}
    result = loralens.extract(str(base), tuned=str(tuned), output=tmp_path / "python", **rule)
    words = ("--rank", 1, "--drop-extra", "--dtype", "bf16", "--to", "kohya", "-o", tmp_path / "shell")
    told = Command("extract").told("--base", base, "--tuned", tuned, *words)
    assert {**record_of(result), "target": None} == {**told, "target": None}
    assert contents(tmp_path / "python") == contents(tmp_path / "shell")
    listed = run("extract", "--base", base, "--tuned", tuned, *words[:-2], "--dry-run", "--csv")
    assert listed.stdout == result.to_csv()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank="),
        ({"energy": 0.9, "rank": 1, "noise_edge": "median"}, "noise_edge= and energy= exclude each other"),
        ({"noise_edge": "mean"}, "rounding, median"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, both: tuple[Path, Path]) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.extract(*both, **options)
