"""Elements of SVG: texts, numbers, and the outer element of a picture.

Every text is escaped here, because names come from files of other people. Colours, fonts and themes are left to the
stylesheet of the page, so that one picture serves light and dark pages. `data-` attributes hold what the scripts for
hovering and filtering need.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape


def words(text: str, x: float, y: float, kind: str) -> str:
    """Return a text at a place; ``kind`` holds its classes."""
    return f'<text class="{kind}" x="{n(x)}" y="{n(y)}">{escape(text)}</text>'


def upwards(text: str, x: float, y: float, kind: str) -> str:
    """Return a text that is written upwards."""
    return f'<text class="{kind}" transform="translate({n(x)} {n(y)}) rotate(-90)">{escape(text)}</text>'


def svg(width: float, height: float, parts: Iterable[str], alt: str, attributes: str) -> Iterator[str]:
    """Yield a picture of these parts, with an accessible name unless ``alt`` is empty, and further attributes."""
    # The width is a property of the style and no attribute, so that a page can shrink a picture to its column.
    size = f'viewBox="0 0 {n(width)} {n(height)}" style="--w:{n(width)}px"'
    label = f' role="img" aria-label="{escape(alt)}"' if alt else ""
    yield f"<svg{attributes} {size}{label}>"
    yield from parts
    yield "</svg>"


def n(value: float, places: int = 1) -> str:
    """Return a coordinate as text, as short as possible, because a page holds many thousands of them."""
    # One digit behind the point: a tenth of a pixel cannot be seen.
    if places == 1 and type(value) is float:  # `round` of NumPy's numbers has another rule for halves
        text = f"{value:.1f}"
        return text.removesuffix(".0")
    # "0" where stripping zeros has left nothing.
    return f"{round(value, places):.{places}f}".rstrip("0").rstrip(".") or "0"


def modules_attribute(numbers: Sequence[int]) -> str:
    """Return the attribute by which the filter of the page finds what is drawn for these modules."""
    return f' data-m="{" ".join(map(str, numbers))}"' if numbers else ""
