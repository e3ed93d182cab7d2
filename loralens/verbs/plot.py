"""``plot``: the figure of a result."""

from typing import TYPE_CHECKING

from loralens.errors import OptionError
from loralens.verbs.compress import CompressResult
from loralens.verbs.curve import CurveResult
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
    if isinstance(result, CurveResult):
        from loralens.charts.curve import curve_figure

        return curve_figure(result.source, result.points, on_data=result.on_data)
    if isinstance(result, CompressResult):
        from loralens.charts.curve import curve_figure

        chosen = result.bytes_after, result.relative_error if result.data_error is None else result.data_error
        points = result.trade_off()
        return curve_figure(result.source, points, chosen=chosen, on_data=result.data_error is not None)
    if isinstance(result, SpectrumResult):
        from loralens.charts.spectrum import spectrum_figure  # matplotlib takes half a second

        return spectrum_figure({adapter.path: adapter.spectra for adapter in result.adapters})
    raise OptionError(f"{type(result).__name__} has no figure", fix="plot what a verb returned")
