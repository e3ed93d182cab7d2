"""``plot``: draws the figure of a verb's result."""

from typing import TYPE_CHECKING

from loralens.charts.amplification_charts import amplification_figure
from loralens.charts.explanation_chart import explanation_figure
from loralens.charts.figure_file import FigureStyle
from loralens.charts.liveness_chart import liveness_figure
from loralens.charts.pair_charts import nesting_figure, pairwise_figure, similarity_figure
from loralens.charts.run_charts import trajectory_figure, watched_figure
from loralens.charts.spec import Figure
from loralens.charts.spectrum_charts import curve_figure, spectrum_figure
from loralens.errors import OptionError
from loralens.exports import checks_keywords
from loralens.verbs.comparisons.pair_similarity import NestedSimilarity, PairSimilarity
from loralens.verbs.comparisons.similarity import CollectionSimilarity
from loralens.verbs.comparisons.trajectory import TrajectoryResult, WatchedResult
from loralens.verbs.served.explain import Explanation
from loralens.verbs.served.prove import Proof
from loralens.verbs.shared.adapters import short_labels
from loralens.verbs.sizes.compress import CompressResult
from loralens.verbs.sizes.curve import CurveResult
from loralens.verbs.spectra.amplify import AmplifyResult
from loralens.verbs.spectra.spectrum import SpectrumResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


@checks_keywords
def plot(
    result: object,
    ax: "Axes | None" = None,
    *,
    figure_title: str | None = None,
    figure_size: tuple[float, float] | None = None,
    figure_dpi: float | None = None,
) -> "Drawing":
    """Draw the figure of a verb's result with matplotlib.

    Parameters
    ----------
    result : object
        The result of a verb that has a figure.
    ax : matplotlib Axes, optional
        The axes to draw into, for figures of one panel.
    figure_title : str, optional
        The title in place of the figure's own; empty for none.
    figure_size : (float, float), optional
        Width and height in inches. In a size that is smaller than the figure's own, texts shrink too.
    figure_dpi : float, optional
        Dots per inch, by default 150.

    Returns
    -------
    matplotlib Figure
        The figure of ``ax`` where it is given. A notebook shows it; no window is opened. Call its ``savefig`` to save
        it.

    Raises
    ------
    OptionError
        The result has no figure; ``ax`` is given and the figure has several panels, or a title, size or number of dots
        is given too; a size or a number of dots that is not positive, or too large to draw.
    """
    style = FigureStyle(figure_title, figure_size, figure_dpi)
    if ax is not None and style != FigureStyle():
        raise OptionError("ax has a figure already, with its own title, size and dots", fix="change those of the axes")
    # In two steps, as the pages of reports draw the same figures as SVG.
    figure = figure_of(result)
    if ax is None:
        return style.draw(figure)
    from loralens.charts.mpl import draw_figure

    return draw_figure(figure, ax)


def figure_of(result: object) -> Figure:
    """The figure of a result as plain data; ``--plot`` and `plot` draw it.

    Raises
    ------
    OptionError
        The result has no figure.
    """
    # Results have no method for their figures, so that a command that draws nothing imports no charts.
    match result:
        case CurveResult():
            return curve_figure(_name(result.source), result.points, on_data=result.on_data)
        case CompressResult():
            # The point of the chosen ranks, with an error of the same kind as those of the curve.
            chosen = result.bytes_after, result.relative_error if result.data_error is None else result.data_error
            points, on_data = result.trade_off(), result.data_error is not None
            return curve_figure(_name(result.source), points, chosen=chosen, on_data=on_data)
        case SpectrumResult():
            names = short_labels([adapter.path for adapter in result.adapters])
            return spectrum_figure(dict(zip(names, (adapter.spectra for adapter in result.adapters), strict=True)))
        case PairSimilarity():
            first, second = short_labels(result.adapters)
            return similarity_figure(result.comparison, labels=(first, second), of=result.of)
        case NestedSimilarity():
            return nesting_figure(result.groups, label=_name(result.adapters[0]), of=result.of, side=result.side)
        case CollectionSimilarity():
            return pairwise_figure(result.labels, result.pairs, result.energy, result.order, (result.side,))
        case TrajectoryResult(run=run):
            # All logged losses, and not only those nearest to the checkpoints, which the table shows.
            losses = {"loss": run.train, "eval loss": run.evaluation}
            curves = {name: [(loss.step, loss.value) for loss in logged] for name, logged in losses.items() if logged}
            steps = [checkpoint.step for checkpoint in run.checkpoints]
            return trajectory_figure(result.trajectory, steps, curves, result.names)
        case WatchedResult():
            return watched_figure(result.rows, result.warned)
        case AmplifyResult():
            title = f"{_name(result.path)} on {_name(result.base)}"
            return amplification_figure(result.modules, title=title, phi_rank=result.phi_rank)
        case Proof():
            title = f"{_name(result.adapter)} on {result.where}: {result.verdict}"
            return liveness_figure(result.points, result.strength.value, title=title)
        case Explanation():
            title = f"what {_name(result.adapter)} makes more and less likely"
            return explanation_figure(result.more, result.less, title=title, texts=result.texts)
    raise OptionError(f"{type(result).__name__} has no figure", fix="plot what a verb returned")


def _name(path: str) -> str:
    """The last part of a path: a title says which adapter it is, and not where it lies."""
    return short_labels([path])[0]
