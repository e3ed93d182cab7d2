"""Figures in files: .png, .svg and .pdf, each whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loralens.charts.mpl import boxes_for_missing_letters, draw, styled
from loralens.charts.spec import Figure
from loralens.errors import OptionError
from loralens.formats.files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SUFFIXES: Mapping[str, Mapping[str, Any]] = {
    ".png": {"dpi": 150},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}


def check_suffix(path: Path | str) -> str:
    """The format that the suffix of ``path`` asks for, such as ``png``; for a check before the work.

    Raises
    ------
    OptionError
        Another suffix than .png, .svg and .pdf, or a folder that does not exist.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(f"{path}: cannot draw into {suffix or 'no suffix'}", fix="end the name in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent}: no such folder", fix="make the folder first")
    return suffix.removeprefix(".")


def save(figure: "Figure | Drawing", path: Path | str) -> None:
    """Write a figure in the format of the suffix; a file that stood there stays until the new one is whole.

    The same figure gives the same bytes every time under the same version of matplotlib: no dates, no random ids.

    Parameters
    ----------
    figure : Figure, or matplotlib Figure
    path : path

    Raises
    ------
    OptionError
        See `check_suffix`.
    FormatError
        The disk refuses.
    """
    path = Path(path)
    kind = check_suffix(path)
    with atomic_file(path) as stream:
        write(figure, stream, kind)


def write(figure: "Figure | Drawing", stream: BinaryIO, kind: str) -> None:
    """Write a figure as ``png``, ``svg`` or ``pdf`` into a stream."""
    drawing = draw(figure) if isinstance(figure, Figure) else figure
    with styled(), boxes_for_missing_letters():
        drawing.savefig(stream, format=kind, **SUFFIXES[f".{kind}"])
