"""``loralens.curve``: paths and objects, one result, the command's numbers."""

from csv import DictReader
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.compression.plan import recommended_point
from loralens.core.fingerprint import fingerprint
from loralens.core.stored import Moment, Moments
from loralens.errors import OptionError
from loralens.formats.files.location import find_adapter
from loralens.tables.numbers import whole_percent
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


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_what_an_adapter_could_save_is_one_number_in_every_command(form: str, tmp_path: Path) -> None:
    """Of the file that is there: with a head or a module that does nothing, no file of full rank is as large."""
    rng = np.random.default_rng(0)
    modules = {
        f"model.layers.{i}.self_attn.{kind}": loralens.LowRank(
            (rng.standard_normal((60, 8)) * 0.3 ** np.arange(8) * (i < 3)).astype(np.float16),
            rng.standard_normal((8, 40)).astype(np.float16),
            2.0,
        )
        for i in range(4)
        for kind in ("q_proj", "v_proj")
    }
    path = tmp_path / ("a.safetensors" if form == "kohya" else "a")
    loralens.save(loralens.Adapter(modules=modules), path, format=form)
    there = find_adapter(path).file.stat().st_size

    def saved(**rule: float) -> float:
        out = tmp_path / f"{path.stem}-out{path.suffix}"
        loralens.compress(path, output=out, overwrite=True, **rule)
        return 1 - find_adapter(out).file.stat().st_size / there

    (fix,) = [finding.fix for finding in loralens.doctor(path).findings if finding.code == "rank-unused"]
    assert fix.endswith(f" saves {whole_percent(saved(energy=0.99))} of the file")
    found = loralens.curve(path)
    assert found.bytes_before == there
    for point in found.points:
        assert point.uniform.bytes == pytest.approx(there * (1 - saved(rank=point.rank)), rel=0.01)
    best = recommended_point(found.points)
    assert best is not None
    share = saved(rank=best.rank)
    assert f", {100 * share:.0f} % less" in found.conclusion()[0]
    (verdict,) = loralens.report(path).record()["verdicts"]
    assert verdict["saved"] == pytest.approx(share)
