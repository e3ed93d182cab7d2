"""Writes figures to .png, .svg and .pdf files; a file is written completely or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loralens.charts.mpl import draw_figure, ignore_missing_letters, style_context
from loralens.charts.spec import Figure
from loralens.errors import OptionError
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.disk import check_room

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# Options of matplotlib for each format. Without a date, the same figure gives the same bytes. At 150 dots per inch a
# figure of four panels is about 1,600 pixels wide.
SUFFIXES: Mapping[str, Mapping[str, Any]] = {
    ".png": {"dpi": 150},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}


def check_suffix(path: Path | str) -> str:
    """Return the format that the suffix of ``path`` stands for, such as ``png``.

    Verbs call this before any work, so that a wrong name is not found after minutes of computation.

    Raises
    ------
    OptionError
        The suffix is none of .png, .svg and .pdf, or the folder of the file cannot be made.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(
            f"{path}: figures are not written as {suffix or 'files without a suffix'}",
            fix="end the name in .png, .svg or .pdf",
        )
    check_room(path)
    return suffix.removeprefix(".")


def save_figure(figure: "Figure | Drawing", path: Path | str) -> None:
    """Write a figure in the format of the suffix; an existing file is replaced once the new one is complete.

    The same figure gives the same bytes under the same version of matplotlib: files hold no dates and no random ids.

    Parameters
    ----------
    figure : Figure, or matplotlib Figure
    path : path

    Raises
    ------
    OptionError
        See `check_suffix`.
    FormatError
        The file cannot be written.
    """
    path = Path(path)
    kind = check_suffix(path)  # again, as a script may call this function with any path
    with atomic_file(path) as stream:
        write_figure(figure, stream, kind)


def write_figure(figure: "Figure | Drawing", stream: BinaryIO, kind: str) -> None:
    """Write a figure as ``png``, ``svg`` or ``pdf`` into a stream."""
    drawing = draw_figure(figure) if isinstance(figure, Figure) else figure
    with style_context(), ignore_missing_letters():
        drawing.savefig(stream, format=kind, **SUFFIXES[f".{kind}"])
