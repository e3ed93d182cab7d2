"""The figure of the README: what is drawn is what was measured."""

import pytest

from examples.hero import Cut, draw


def test_the_bars_are_the_sizes_and_the_accuracies() -> None:
    cuts = [Cut(64, 1197384, 0.94375), Cut(2, 54520, 0.9359375)]
    figure = draw(cuts, 640, 0.48)
    sizes, accuracies = figure.axes
    assert [bar.get_height() for bar in sizes.patches] == [1197.384, 54.52]
    assert [bar.get_height() for bar in accuracies.patches] == pytest.approx([94.375, 93.59375])
    (line,) = accuracies.lines
    assert set(line.get_ydata()) == {48.0}
    assert [label.get_text() for label in sizes.get_xticklabels()] == ["64", "2"]
    assert "640 held-out texts" in figure.get_suptitle()
