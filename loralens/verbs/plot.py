"""``plot``: the figure of a result."""

from typing import TYPE_CHECKING

from loralens.errors import OptionError
from loralens.verbs.outputs.collection_similarity import CollectionSimilarity
from loralens.verbs.outputs.nested_similarity import NestedSimilarity
from loralens.verbs.outputs.pair_similarity import PairSimilarity
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
    if isinstance(result, PairSimilarity):
        from loralens.charts.similarity import similarity_figure

        return similarity_figure(result.comparison, labels=result.adapters, of=result.of)
    if isinstance(result, NestedSimilarity):
        from loralens.charts.similarity_nested import nesting_figure

        return nesting_figure(result.groups, label=result.adapters[0], of=result.of, side=result.side)
    if isinstance(result, CollectionSimilarity):
        from loralens.charts.pairwise import pairwise_figure

        return pairwise_figure(result.labels, result.pairs, result.energy, result.tree, result.sides)
    raise OptionError(f"{type(result).__name__} has no figure", fix="plot what a verb returned")
