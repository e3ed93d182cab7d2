"""``plot``: the figure of a result."""

from typing import TYPE_CHECKING

from loralens.charts.mpl import draw
from loralens.charts.spec import Figure
from loralens.charts.spectrum import spectrum_figure
from loralens.errors import OptionError
from loralens.verbs.spectrum import SpectrumResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


def plot(result: object, ax: "Axes | None" = None) -> "Drawing":
    """The figure of what a verb returned, drawn by matplotlib.

    Parameters
    ----------
    result : object
        What a verb returned.
    ax : matplotlib Axes, optional
        Draw into these axes; only figures of one panel can be.

    Returns
    -------
    matplotlib Figure
        That of ``ax`` where it is given. No window is opened: save it with its ``savefig``.

    Raises
    ------
    OptionError
        A result that has no figure; a figure of several panels where ``ax`` is given.
    """
    return draw(figure_of(result), ax)


def figure_of(result: object) -> Figure:
    """The figure of a result as plain data: ``--plot`` draws it, and so does `plot`.

    Raises
    ------
    OptionError
        A result that has no figure.
    """
    if isinstance(result, SpectrumResult):
        return spectrum_figure({adapter.path: adapter.spectra for adapter in result.adapters})
    raise OptionError(f"{type(result).__name__} has no figure", fix="plot what a verb returned")
