"""Errors of ranks, by weights and on real inputs, beside dense ones: table, curve, advice, what the slider is given."""

from pathlib import Path

import pytest

from loralens.reporting.document import Report
from loralens.tables.numbers import percent
from tests.reporting.chosen import RANK, Chosen, chosen, everywhere
from tests.reporting.reading import lines_of, picture, rows, sorted_by, tables

CLOSE = {"rel": 1e-4, "abs": 1e-6}  # white inputs are mixed in, 1e-6 of the energy
KEPT = ("energy kept", "output kept")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, list[Chosen]]:
    return chosen(tmp_path_factory.mktemp("chosen"))


@pytest.mark.parametrize("i", [0, 1])
def test_every_rank(made: tuple[Report, list[Chosen]], i: int, tmp_path: Path) -> None:
    report, both = made
    table = tables(report, "ranks", "Every rank")[i]
    printed, behind = rows(table), sorted_by(table)
    curve = lines_of(picture(report, f"curve-{i + 1}").charts[0])["one rank everywhere"]
    for rank in range(1, RANK + 1):
        error, count = both[i].error(everywhere(rank)), both[i].bytes(everywhere(rank), tmp_path)
        values = behind[str(rank)]
        assert values["peft file"] == count
        assert values["error"] == pytest.approx(error, **CLOSE)
        assert values[KEPT[i]] == pytest.approx(1 - error**2, **CLOSE)
        assert printed[str(rank)][KEPT[i]] == percent(values[KEPT[i]], 4)
        assert curve[count / 1e3] == pytest.approx(100 * error, rel=1e-4, abs=1e-4)
    if i:  # the two errors are not to be confused
        assert abs(both[1].error(everywhere(2)) / both[1].error(everywhere(2), plain=True) - 1) > 0.1
