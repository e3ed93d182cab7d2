"""Marks of SVG: text, numbers, and the frame of a picture.

Every text goes through `escape`; colours, fonts and themes are the stylesheet's, `data-` attributes say what hovering
and filtering need.
"""

from collections.abc import Iterable, Sequence
from html import escape


def words(text: str, x: float, y: float, kind: str) -> str:
    """Text at a place; ``kind`` are its classes."""
    return f'<text class="{kind}" x="{n(x)}" y="{n(y)}">{escape(text)}</text>'


def upwards(text: str, x: float, y: float, kind: str) -> str:
    """Text that runs upwards."""
    return f'<text class="{kind}" transform="translate({n(x)} {n(y)}) rotate(-90)">{escape(text)}</text>'


def svg(width: float, height: float, parts: Iterable[str], alt: str, more: str) -> str:
    """A picture of these parts; ``more`` are further attributes."""
    size = f'viewBox="0 0 {n(width)} {n(height)}" style="--w:{n(width)}px"'
    label = f' role="img" aria-label="{escape(alt)}"' if alt else ""
    return f"<svg{more} {size}{label}>{''.join(parts)}</svg>"


def n(value: float, places: int = 1) -> str:
    """A coordinate, as short as it can be."""
    return f"{round(value, places):.{places}f}".rstrip("0").rstrip(".") or "0"


def modules(numbers: Sequence[int]) -> str:
    """The attribute by which the filter finds what these modules are drawn by."""
    return f' data-m="{" ".join(map(str, numbers))}"' if numbers else ""
