"""``plot``: the figure of a result."""

from typing import TYPE_CHECKING

from loralens.errors import OptionError
from loralens.verbs.spectrum import SpectrumResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(result: object) -> "Figure":
    """The figure of what a verb returned, drawn by matplotlib.

    Raises
    ------
    OptionError
        A result that has no figure.
    """
    if isinstance(result, SpectrumResult):
        from loralens.charts.spectrum import spectrum_figure  # matplotlib takes half a second

        return spectrum_figure({adapter.path: adapter.spectra for adapter in result.adapters})
    raise OptionError(f"{type(result).__name__} has no figure", fix="plot what a verb returned")
