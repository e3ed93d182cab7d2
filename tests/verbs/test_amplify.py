"""``loralens.amplify``: paths and objects; the result is what the command prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.analysis import measure_amplification
from loralens.verbs.inputs.bases import base_weights
from tests.cli.command import Command
from tests.cli.test_amplify import small_base
from tests.verbs.shown import check_tables_fit, record_of, rows_of

run = Command("amplify")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ()),
        (
            {"rank": [2, 1], "no_top": True, "modules": ["q_proj"]},
            ("--rank", 2, "--rank", 1, "--no-top", "-m", "q_proj"),
        ),
        ({"rank": 1, "exact": True, "directions": 3}, ("--rank", 1, "--exact", "--directions", 3)),
    ],
)
def test_the_result_is_what_the_command_prints(
    small: Path, base: Path, options: dict[str, Any], words: tuple[object, ...]
) -> None:
    result = loralens.amplify(small, base=base, **options)
    assert record_of(result) == run.told(small, "--base", base, *words)
    assert run.good(small, "--base", base, *words, "--csv").stdout == result.to_csv()
    of_object = loralens.amplify(loralens.load(small), base=str(base), **options)
    assert {**record_of(of_object), "adapter": str(small)} == record_of(result)


def test_it_is_a_mapping_of_what_is_measured_below(small: Path, base: Path) -> None:
    adapter = loralens.load(small)
    result = loralens.amplify(adapter, base=base)
    below = measure_amplification(adapter, base_weights(base, adapter.modules).modules)
    assert list(result) == list(below)
    assert result[QUERY].rows == below[QUERY].rows
    assert repr(result) == f"AmplifyResult('adapter' on '{base}', 6 modules)"


def test_one_module_is_said_of_in_the_singular(small: Path, base: Path) -> None:
    said = loralens.amplify(small, base=base, modules=["model.layers.0.self_attn.q_proj"]).conclusion()
    assert "(median of 1 module)" in said[0]
    assert "1 of 1 module is beyond 3 standard deviations; by chance there would be 0.015 modules." in said[1]


def test_csv_has_a_row_a_module_and_rank_without_infinities(small: Path, base: Path) -> None:
    rows = rows_of(loralens.amplify(small, base=base, rank=[1, 2]))
    assert [(row["name"], row["rank"]) for row in rows[:2]] == [(QUERY, "1"), (QUERY, "2")]
    assert float(rows[1]["amplification"]) == pytest.approx(20**0.5 / 80**0.5)
    assert rows[-1]["amplification"] == rows[-1]["z"] == ""  # of a module that is 0


def test_a_direction_that_w_does_not_know_is_infinitely_amplified(tmp_path: Path) -> None:
    B, A = np.zeros((6, 2), np.float32), np.zeros((2, 4), np.float32)
    B[5, 0], A[0, 0] = 1, 1  # W has no row there
    loralens.save(loralens.Adapter(modules={QUERY: loralens.LowRank(B, A)}), tmp_path / "beside")
    result = loralens.amplify(tmp_path / "beside", base=small_base(tmp_path / "base"))
    assert "∞" in result.tables()[0].columns[-3].cell(result.rows[0])
    assert record_of(result)["modules"][0]["amplification"] is None


@pytest.mark.slow
def test_tables_fit_every_terminal_and_there_is_a_figure(small: Path, base: Path) -> None:
    result = loralens.amplify(small, base=base)
    check_tables_fit(result)
    assert loralens.plot(result).axes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "between 1 and 2"),
        ({"directions": 0}, "give 1 or more"),
        ({"directions": 2, "no_top": True}, "give one of the two"),
        ({"phi_rank": 0}, "give 1 or more"),
        ({"seed": -1}, "give 0 or more"),
        ({"device": "tpu"}, "no device is called 'tpu'"),
        ({"alpha": 3.0}, "the file states its own scale"),
    ],
)
def test_wrong_values_are_refused(small: Path, base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(loralens.LoraLensError, match=message):
        loralens.amplify(small, base=base, **options)
