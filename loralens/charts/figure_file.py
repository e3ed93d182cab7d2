"""Writes figures to .png, .jpg, .webp, .svg and .pdf files; a file is written completely or not at all."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

from loralens.charts.spec import Figure
from loralens.errors import OptionError, target_exists
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.disk import check_room

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# Options of matplotlib for each format. Without a date, the same figure gives the same bytes. Lines and letters on
# white keep their edges in a JPEG of this quality, and in a WebP without loss, which is also smaller than a PNG.
JPEG = {"pil_kwargs": {"quality": 95, "subsampling": 0}}
SUFFIXES: Mapping[str, Mapping[str, Any]] = {
    ".png": {},
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": {"pil_kwargs": {"lossless": True}},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}
# matplotlib draws no picture of more dots on a side.
MOST_DOTS = 1 << 16


@final
@dataclass(frozen=True, slots=True)
class FigureStyle:
    """The style options of a figure.

    Attributes
    ----------
    figure_title : str, optional
        The title in place of its own; empty for none.
    figure_size : (float, float), optional
        Width and height in inches.
    figure_dpi : float, optional
        Dots per inch of a picture, and of the maps within .svg and .pdf.
    """

    figure_title: str | None = None
    figure_size: tuple[float, float] | None = None
    figure_dpi: float | None = None

    def check(self) -> None:
        """Refuse sizes that cannot be drawn.

        Raises
        ------
        OptionError
            A width, a height or a number of dots that is not positive and finite.
        """
        values = [*(self.figure_size or ()), *(() if self.figure_dpi is None else (self.figure_dpi,))]
        if any(not 0 < value < inf for value in values):
            raise OptionError(
                "the size and the dots per inch of a figure must be positive", fix="give numbers such as 6.5x4 and 300"
            )

    def draw(self, figure: Figure) -> "Drawing":
        """Draw a figure in this style.

        Raises
        ------
        OptionError
            The picture would have too many dots.
        """
        from loralens.charts.mpl import draw_figure, resize_drawing

        self.check()
        drawing = draw_figure(figure if self.figure_title is None else replace(figure, title=self.figure_title))
        if self.figure_size:
            resize_drawing(drawing, self.figure_size)
        if self.figure_dpi:
            drawing.set_dpi(self.figure_dpi)
        if max(drawing.get_size_inches()) * drawing.dpi >= MOST_DOTS:
            raise OptionError("this figure would have more than 65,535 dots on a side", fix="lower the dots per inch")
        return drawing


def check_suffix(path: Path | str) -> str:
    """Return the format that the suffix of ``path`` stands for, such as ``png``.

    Verbs call this before any work, so that a wrong name is not found after minutes of computation.

    Raises
    ------
    OptionError
        The suffix is none of `SUFFIXES`, or the folder of the file cannot be made.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(
            f"{path}: figures are not written as {suffix or 'files without a suffix'}",
            fix="end the name in .png, .jpg, .webp, .svg or .pdf",
        )
    check_room(path)
    return suffix.removeprefix(".")


def check_figure_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that exists, unless it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise target_exists(path)


def save_figure(figure: "Figure | Drawing", path: Path | str, *, overwrite: bool = False) -> None:
    """Write a figure in the format of the suffix; an existing file is replaced once the new one is complete.

    The same figure gives the same bytes under the same version of matplotlib: files hold no dates and no random ids.

    Parameters
    ----------
    figure : Figure, or matplotlib Figure
    path : path
    overwrite : bool
        Whether the file may exist.

    Raises
    ------
    OptionError
        The file exists, or see `check_suffix`.
    FormatError
        The file cannot be written.
    """
    path = Path(path)
    kind = check_suffix(path)  # checked again, because a script may call this function with any path
    check_figure_file(path, overwrite=overwrite)
    with atomic_file(path) as stream:
        write_figure(figure, stream, kind)


def write_figure(figure: "Figure | Drawing", stream: BinaryIO, kind: str) -> None:
    """Write a figure as ``png``, ``jpg``, ``webp``, ``svg`` or ``pdf`` into a stream."""
    from loralens.charts.mpl import draw_figure, fix_layout, style_context

    drawing = draw_figure(figure) if isinstance(figure, Figure) else figure
    fix_layout(drawing)
    with style_context():
        # A drawing has its own dots per inch: 150, or those that the user chose.
        drawing.savefig(stream, format=kind, dpi=drawing.dpi, **SUFFIXES[f".{kind}"])
