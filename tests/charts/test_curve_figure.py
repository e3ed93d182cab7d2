"""The figure of the trade-off: what it shows, and the same bytes each time."""

from pathlib import Path

import pytest

from loralens.charts.curve import curve_figure
from loralens.charts.figure import save
from loralens.compression.curve import Choice, Point


def points(count: int = 8, *, few: bool = True) -> list[Point]:
    return [
        Point(
            rank,
            Choice((rank, rank), 1000 * rank, 40_000 * rank, 1 - rank / count),
            Choice((1, rank), 1000 * rank, 40_000 * rank, 0.9 * (1 - rank / count)),
            0.1 * (1 - rank / count) if few and rank > 1 else None,
        )
        for rank in range(count, 0, -1)
    ]


def test_axes_lines_and_labels() -> None:
    figure = curve_figure("an [adapter] $x$", points(), chosen=(100_000, 0.5))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [
        "one rank everywhere", "ranks where they save most, at the same size",
        "ranks and bits, at the same size (loralens-q, expected)", "what was written",
    ]  # fmt: skip
    assert axes.get_xlabel() == "size of the file [kB]"
    assert axes.get_title() == "an [adapter] $x$"
    assert axes.get_ylabel() == "‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules [%]"
    on_data = curve_figure("", points(few=False), on_data=True).axes[0]
    assert on_data.get_ylabel() == "√(E‖(ΔW − ΔW')x‖² / E‖ΔWx‖²) over all modules [%]"
    assert lines["one rank everywhere"].get_xdata()[0] == pytest.approx(320)
    assert lines["one rank everywhere"].get_ydata()[-1] == pytest.approx(87.5)
    assert len(lines["ranks and bits, at the same size (loralens-q, expected)"].get_xdata()) == 7
    few = lines["ranks and bits, at the same size (loralens-q, expected)"].get_ydata()
    assert few[-1] == pytest.approx(7.5)
    assert [float(x[0]) for x in (lines["what was written"].get_xdata(), lines["what was written"].get_ydata())] == [
        100, 50,
    ]  # fmt: skip
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)


@pytest.mark.parametrize("count", [1, 8, 64])
def test_rank_labels_do_not_overlap(count: int) -> None:
    figure = curve_figure("", points(count, few=False))
    renderer = figure._get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert boxes
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        save(curve_figure("title", points(), chosen=(1, 0.1)), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
