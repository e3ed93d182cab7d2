"""What every figure shares: its style, names that fit into it, and its way to the disk."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loralens.errors import OptionError
from loralens.formats.files.replacing import replacing

if TYPE_CHECKING:  # a page of charts that draws no figure shortens its names here, and does without matplotlib
    from matplotlib.figure import Figure

DPI = 150  # of a .png, and of the layout: letters are as wide in the one as they were measured in the other

SUFFIXES: Mapping[str, Mapping[str, Any]] = {
    ".png": {"dpi": DPI},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}

STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "figure.constrained_layout.h_pad": 0.06,  # inches
    "figure.constrained_layout.hspace": 0.0,  # a share of the height would grow with tall figures
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "figure.titlesize": 10,
    "font.family": ["DejaVu Sans"],  # ships with matplotlib and has σ, Δ, ᵢ and –
    "font.size": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "loralens",
    "text.usetex": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}

# What a map looks like where it has no value.
EMPTY: dict[str, Any] = {"facecolor": "0.93", "hatch": "////", "edgecolor": "0.8", "linewidth": 0}


def styled() -> AbstractContextManager[None]:
    """A block in which matplotlib draws in the style of the house, whatever the user's own settings."""
    from matplotlib import rc_context

    return rc_context(STYLE)


@contextmanager
def _boxes_for_missing_letters() -> Iterator[None]:
    """No warning for a letter that the font lacks: it comes out as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def settle(figure: "Figure") -> "Figure":
    """``figure`` itself with its layout made once and kept: matplotlib makes a slightly other one at every drawing."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with styled(), _boxes_for_missing_letters():
            engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


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


def save(figure: "Figure", path: Path | str) -> None:
    """Write ``figure`` in the format of the suffix; a file that stood there stays until the new one is whole.

    A settled figure gives the same bytes every time under the same version of matplotlib: no dates, no random ids.

    Raises
    ------
    OptionError
        See `check_suffix`.
    FormatError
        The disk refuses.
    """
    path = Path(path)
    kind = check_suffix(path)
    with replacing(path) as stream:
        write(figure, stream, kind)


def write(figure: "Figure", stream: BinaryIO, kind: str) -> None:
    """Write ``figure`` as ``png``, ``svg`` or ``pdf`` into a stream."""
    with styled(), _boxes_for_missing_letters():
        figure.savefig(stream, format=kind, **SUFFIXES[f".{kind}"])


def fit(name: str, width: int) -> str:
    """``name`` on one line and in at most ``width`` characters: what is too long loses its middle to '…'."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"
