"""The axes of the charts of a drawn figure."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels(figure: Figure) -> list[Axes]:
    """The axes of charts, without those of trees and colour bars."""
    return [axes for axes in figure.axes if not str(axes.get_label()).startswith("<")]
