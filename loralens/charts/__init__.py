"""Figures as plain data, and their two renderers: SVG for pages, matplotlib for files and notebooks."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.charts.amplification_charts import amplification_figure as amplification_figure
    from loralens.charts.figure_file import check_suffix as check_suffix
    from loralens.charts.figure_file import save_figure as save_figure
    from loralens.charts.mpl import draw_figure as draw_figure
    from loralens.charts.pair_charts import nesting_figure as nesting_figure
    from loralens.charts.pair_charts import pairwise_figure as pairwise_figure
    from loralens.charts.pair_charts import similarity_figure as similarity_figure
    from loralens.charts.run_charts import trajectory_figure as trajectory_figure
    from loralens.charts.spec import Figure as Figure
    from loralens.charts.spectrum_charts import curve_figure as curve_figure
    from loralens.charts.spectrum_charts import spectrum_figure as spectrum_figure
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
