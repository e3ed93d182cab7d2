"""``loralens.curve``: paths and objects, one result, the command's numbers."""

from csv import DictReader
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.core.fingerprint import fingerprint
from loralens.core.moments import Moment, Moments
from loralens.errors import OptionError
from tests.cli.command import Command

command = Command("curve")


def plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("loralens", "source")}


def test_a_path_an_object_and_the_command_say_the_same(small: Path) -> None:
    record = command.told(small, "--to", "kohya", "--dtype", "f16", "-m", "q_proj", "--weights", "relative")
    options: dict[str, Any] = {"to": "kohya", "dtype": "f16", "modules": ["q_proj"], "weights": "relative"}
    assert plain(loralens.curve(small, **options).record()) == plain(record)
    assert plain(loralens.curve(loralens.load(small), **options).record()) == plain(record)


def test_csv_has_one_line_a_rank_with_the_numbers_of_the_json(small: Path) -> None:
    rows = list(DictReader(StringIO(command.good(small, "--csv").stdout)))
    points = command.told(small)["points"]
    assert [int(row["rank"]) for row in rows] == [point["rank"] for point in points]
    for row, point in zip(rows, points, strict=True):
        for choice in ("uniform", "budget"):
            assert row[f"{choice}_ranks"] == " ".join(map(str, point[choice]["ranks"]))
            assert int(row[f"{choice}_bytes"]) == point[choice]["bytes"]
            assert float(row[f"{choice}_relative_error"]) == point[choice]["relative_error"]
    assert loralens.curve(small).to_csv().splitlines()[0] == ",".join(rows[0])


def test_on_data(small: Path) -> None:
    adapter = loralens.load(small)
    modules = {name: Moment(np.diag([1e-4, 1.0]), 10) for name in adapter}
    result = loralens.curve(adapter, activations=Moments(modules=modules, fingerprint=fingerprint(adapter)))
    assert result.on_data
    assert result.record()["activations"] == "moments"
    assert "data_error" in result.record()["points"][0]["uniform"]
    (axes,) = loralens.plot(result).axes
    assert ")x‖" in axes.get_ylabel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "choose one of peft, kohya"),
        ({"dtype": "int8"}, "choose one of f32, bf16, f16"),
        ({"weights": "most"}, "no such file"),
        ({"modules": "k_prj"}, "the nearest names are"),
    ],
    ids=str,
)
def test_wrong_values_are_option_errors(options: dict[str, Any], message: str, small: Path) -> None:
    with pytest.raises(OptionError) as refusal:
        loralens.curve(small, **options)
    assert message in str(refusal.value)


def test_one_line(small: Path) -> None:
    assert repr(loralens.curve(small)) == "CurveResult(2 ranks of 6 modules, peft)"
