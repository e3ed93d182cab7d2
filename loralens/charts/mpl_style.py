"""The style of loralens in matplotlib, whatever the settings of the user."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.labelsize": 8,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 9,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib and has the letters σ, Δ, ᵢ and –
    "font.size": 8,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 7.5,
    "svg.fonttype": "path",  # so that the picture is the same where the font is not installed
    "svg.hashsalt": "loralens",  # without it the ids of an SVG are random, and the same figure has other bytes
    "text.parse_math": False,  # names come from files and may hold a dollar sign
    "text.usetex": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


def style_context() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws in the style of loralens, whatever the settings of the user."""
    from matplotlib import rc_context

    return rc_context(STYLE)


@contextmanager
def ignore_missing_letters() -> Iterator[None]:
    """Return a context without warnings for letters that the font lacks, which are drawn as boxes."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
