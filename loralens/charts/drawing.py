"""The figure of matplotlib that a notebook shows by itself, without pyplot and without ``%matplotlib inline``."""

from io import BytesIO

from matplotlib.figure import Figure

from loralens.charts.mpl_style import ignore_missing_letters, style_context


# A class at the top of a module, so that a figure can be pickled. Only functions import this module, as matplotlib
# takes half a second.
class Drawing(Figure):
    """A figure whose value at the end of a cell of a notebook is its picture."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        stream = BytesIO()
        with style_context(), ignore_missing_letters():
            self.savefig(stream, format="png", dpi=self.dpi)
        # The size on the screen in CSS pixels. The picture itself has more dots, for screens of high resolution.
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        return stream.getvalue(), {"width": width, "height": height}
