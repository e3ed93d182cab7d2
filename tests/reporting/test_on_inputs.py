"""Errors of ranks, by weights and on real inputs, beside dense ones: table, curve, advice, what the slider is given."""

from pathlib import Path

import pytest

import loralens
from loralens.reporting.document import Report, Slider
from loralens.tables.numbers import percent, size, span
from tests.reporting.chosen import INPUTS, RANK, Chosen, chosen, everywhere
from tests.reporting.reading import lines_of, number, parts_of, picture, rows, sorted_by, tables, texts

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


@pytest.mark.parametrize("i", [0, 1])
def test_the_advice(made: tuple[Report, list[Chosen]], i: int, tmp_path: Path) -> None:
    report, both = made
    one = both[i]
    best = next(rank for rank in range(1, RANK + 1) if one.error(everywhere(rank)) ** 2 <= 0.01)
    assert 1 < best < RANK
    error, plain = one.error(everywhere(best)), one.error(everywhere(best), plain=True)
    small, whole = (one.bytes(everywhere(rank), tmp_path) for rank in (best, RANK))
    kept = "the squared output on the inputs given" if i else "the energy"
    measured = (
        f"{INPUTS} positions; error {percent(error)}; {percent(plain)} of ΔW itself" if i else f"error {percent(error)}"
    )
    said = (
        f"Rank {best} of {RANK} for all modules keeps {percent(1 - error**2)} of {kept} ({measured}) in {size(small)}, "
        f"{percent(1 - small / whole)} less than now."
    )
    (own,) = [text for text in report.summary if text.startswith(f"{('weights', 'inputs')[i]}: ")]
    assert said in own
    # Of several adapters the page repeats it only where it says more than the first table: on how many inputs.
    assert (f"inputs: {said}" in texts(report, "ranks")) == (i == 1)
    sliders = [part for part in parts_of(report, "ranks") if isinstance(part, Slider)]
    assert [(slider.label, slider.share) for slider in sliders] == [("weights", KEPT[0]), ("inputs", KEPT[1])]
    assert sliders[i].data["start"] + 1 == best


@pytest.mark.parametrize("i", [0, 1])
def test_what_the_slider_is_given(made: tuple[Report, list[Chosen]], i: int, tmp_path: Path) -> None:
    """Every rank with its bytes and its error: of ΔW, or of outputs on the inputs given."""
    report, both = made
    one = both[i]
    carried = [part for part in parts_of(report, "ranks") if isinstance(part, Slider)][i].data
    assert carried["command"].startswith(f"loralens compress {one.path} -o {one.path}-small")
    assert carried["command"].endswith(f" --activations {one.path.parent}/x.safetensors") == bool(i)
    assert [stop["value"] for stop in carried["stops"]] == [str(rank) for rank in range(1, RANK + 1)]
    for rank, stop in enumerate(carried["stops"], start=1):
        kilobytes, error = stop["rank"]["at"]
        assert kilobytes * 1000 == pytest.approx(one.bytes(everywhere(rank), tmp_path), abs=1e-6)
        assert error == pytest.approx(100 * one.error(everywhere(rank)), rel=1e-4, abs=1e-4)
        assert stop["rank"]["option"] == f"--rank {rank}"
        words = stop["rank"]
        kept, whole = 1 - one.error(everywhere(rank)) ** 2, one.bytes(everywhere(RANK), tmp_path)
        assert number(words["kept"]) == pytest.approx(kept, rel=6e-3, abs=1e-6)
        assert words["bytes"] == size(one.bytes(everywhere(rank), tmp_path))
        assert number(words["now"]) == pytest.approx(one.bytes(everywhere(rank), tmp_path) / whole, rel=6e-3)
        # The best ranks in this size are those that compress chooses for as many parameters.
        option, budget = stop["budget"]["option"].split()
        inputs = {"activations": one.path.parent / "x.safetensors"} if i else {}
        written = loralens.compress(one.path, output=tmp_path / f"best-{rank}", parameters=int(budget), **inputs)
        ranks = {row["name"]: row["rank_after"] for row in written.record()["modules"]}
        assert option == "--parameters"
        assert stop["budget"]["at"][1] == pytest.approx(100 * one.error(ranks), rel=1e-4, abs=1e-4)
        assert stop["budget"]["ranks"].split()[1] == span(list(ranks.values()))
        assert error >= stop["budget"]["at"][1] - 1e-6
