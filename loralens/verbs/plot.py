"""``plot``: draws the figure of a verb's result."""

from typing import TYPE_CHECKING

from loralens.charts.amplification import amplification_figure
from loralens.charts.curve import curve_figure
from loralens.charts.mpl import draw_figure
from loralens.charts.pairwise import pairwise_figure
from loralens.charts.similarity import similarity_figure
from loralens.charts.similarity_nested import nesting_figure
from loralens.charts.spec import Figure
from loralens.charts.spectrum import spectrum_figure
from loralens.charts.trajectory import trajectory_figure
from loralens.errors import OptionError
from loralens.verbs.amplify import AmplifyResult
from loralens.verbs.curve import CurveResult
from loralens.verbs.outputs.collection_similarity import CollectionSimilarity
from loralens.verbs.outputs.compress_result import CompressResult
from loralens.verbs.outputs.nested_similarity import NestedSimilarity
from loralens.verbs.outputs.pair_similarity import PairSimilarity
from loralens.verbs.spectrum import SpectrumResult
from loralens.verbs.trajectory import TrajectoryResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


def plot(result: object, ax: "Axes | None" = None) -> "Drawing":
    """Draw the figure of a verb's result with matplotlib.

    Parameters
    ----------
    result : object
        The result of a verb that has a figure.
    ax : matplotlib Axes, optional
        The axes to draw into, for figures of one panel.

    Returns
    -------
    matplotlib Figure
        The figure of ``ax`` where it is given. No window is opened: call its ``savefig`` to save it.

    Raises
    ------
    OptionError
        The result has no figure, or ``ax`` is given and the figure has several panels.
    """
    # In two steps, as the pages of reports draw the same figures as SVG.
    return draw_figure(figure_of(result), ax)


def figure_of(result: object) -> Figure:
    """The figure of a result as plain data; ``--plot`` and `plot` draw it.

    Raises
    ------
    OptionError
        The result has no figure.
    """
    # Results have no method for their figures, so that a command that draws nothing imports no charts.
    if isinstance(result, CurveResult):
        return curve_figure(result.source, result.points, on_data=result.on_data)
    if isinstance(result, CompressResult):
        # The point of the chosen ranks, with an error of the same kind as those of the curve.
        chosen = result.bytes_after, result.relative_error if result.data_error is None else result.data_error
        points = result.trade_off()
        return curve_figure(result.source, points, chosen=chosen, on_data=result.data_error is not None)
    if isinstance(result, SpectrumResult):
        return spectrum_figure({adapter.path: adapter.spectra for adapter in result.adapters})
    if isinstance(result, PairSimilarity):
        return similarity_figure(result.comparison, labels=result.adapters, of=result.of)
    if isinstance(result, NestedSimilarity):
        return nesting_figure(result.groups, label=result.adapters[0], of=result.of, side=result.side)
    if isinstance(result, CollectionSimilarity):
        return pairwise_figure(result.labels, result.pairs, result.energy, result.tree, (result.side,))
    if isinstance(result, TrajectoryResult):
        run = result.run
        losses = {"loss": run.train, "eval loss": run.evaluation}
        # All logged losses, and not only those nearest to the checkpoints, which the table shows.
        curves = {name: [(loss.step, loss.value) for loss in logged] for name, logged in losses.items() if logged}
        steps = [checkpoint.step for checkpoint in run.checkpoints]
        return trajectory_figure(result.trajectory, steps, curves, result.names)
    if isinstance(result, AmplifyResult):
        title = f"{result.path} on {result.base}"
        return amplification_figure(result.modules, title=title, phi_rank=result.phi_rank)
    raise OptionError(f"{type(result).__name__} has no figure", fix="plot what a verb returned")
