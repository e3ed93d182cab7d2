"""Numbers as text for people: every quantity has one form and one unit, wherever it is shown."""

import re
from collections.abc import Callable, Iterable, Sequence
from math import isfinite

from loralens.errors import OptionError, visible

UNDEFINED = "–"  # where a quantity has no value
# Block characters by eighths of a line's height; the space stands for 0.
BLOCKS = " ▁▂▃▄▅▆▇█"
SMALL_SHARE = 1e-5  # below which a share is written as a power of ten
WHOLE = 1e-9  # what float64 leaves of a sum of products that is the whole of another
UNITS = ("kB", "MB", "GB", "TB")  # powers of 1000, as the Hub, operating systems and --size 20MB count

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<power>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits; a dash where there is none."""
    if value is None or value != value:
        return UNDEFINED
    return f"{value:.{digits}g}" if isfinite(value) else "∞" if value > 0 else "−∞"


def fixed(form: str) -> Callable[[float | None], str]:
    """A function that writes numbers in a fixed format, such as ``+.3f``; a dash where there is none.

    What rounds to zero is written without a sign.
    """

    def text(value: float | None) -> str:
        if value is None or value != value:
            return UNDEFINED
        written = f"{value:{form}}"
        return f"{0.0:{form}}" if value < 0 and not written.strip("-0.%") else written

    return text


def percent(share: float | None, digits: int = 3) -> str:
    """A share in percent to so many significant digits; a small one as a power of ten, nothing where it is not known.

    What is less than the whole by more than rounding is never written as 100 %.
    """
    if share is None:
        return ""
    if not isfinite(share):
        return number(share)
    if share == 0:
        return "0"
    if share < SMALL_SHARE:
        return f"{share:.1e}"
    value = float(f"{100 * share:.{digits}g}")
    # Rounding must not claim a whole: 0.99996 would become 100 %.
    if share < 1 - WHOLE and value >= 100:
        return f"> 99.{'9' * max(digits - 2, 1)} %"
    return f"{value:.6f}".rstrip("0").rstrip(".") + " %"


def size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves a number of at least 1: 999 B, 110.2 kB, 1.5 GB."""
    # Decimal units, so that the number agrees with what --size takes and the Hub shows.
    value, unit = float(count), "B"
    for bigger in UNITS:
        if value < 999.95:  # what would be rounded to 1000.0 belongs to the next unit
            break
        value, unit = value / 1000, bigger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def exact_size(count: int) -> str:
    """``110.2 kB (110,184 bytes)``."""
    return f"{size(count)} ({count:,} bytes)"


def change(before: int, after: int, text: Callable[[int], str]) -> str:
    """``120 → 60, 50.0% of it``, both numbers written by ``text``."""
    share = f", {after / before:.1%} of it" if before else ""
    return f"{text(before)} → {text(after)}{share}"


def unit_of(largest: int) -> tuple[str, int]:
    """The unit that numbers of bytes up to ``largest`` share on an axis, and how many bytes it has."""
    power = max((k for k in range(1, len(UNITS) + 1) if largest >= 1000**k), default=0)
    return (UNITS[power - 1] if power else "B"), 1000**power


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: ``20MB`` (10⁶), ``512KiB`` (2¹⁰), ``.5k``, ``100000``.

    Raises
    ------
    OptionError
        It is no size.
    """
    written = _SIZE.fullmatch(text.strip())
    if not written:
        raise OptionError(f"{text!r:.100} is no size", fix="write it like 20MB, 512KiB or 100000")
    base = 1024 if written["binary"] else 1000
    value = float(written["number"]) * base ** " kmgt".index(written["power"].lower() or " ")
    if not isfinite(value):
        raise OptionError(f"{text!r:.100} has too many digits for a size", fix="write it like 20MB, 512KiB or 100000")
    return int(value)


def count(of: int, noun: str) -> str:
    """``1 module``, ``12 modules``."""
    return f"{of:,} {noun}{'' if of == 1 else 's'}"


def shape(sizes: Sequence[int]) -> str:
    """``768 × 3072``."""
    return " × ".join(map(str, sizes))


def spark(values: Sequence[float], width: int = 16) -> str:
    """Bars of non-negative values relative to the largest; each bar the largest of its share of a long row."""
    top = max(values, default=0.0)
    if top == 0:
        return ""
    bars = min(width, len(values))
    shares = [values[len(values) * i // bars : len(values) * (i + 1) // bars] for i in range(bars)]
    return "".join(BLOCKS[max(1, round(8 * max(share) / top))] if max(share) > 0 else " " for share in shares)


def json_number(value: float | None) -> float | None:
    """The number for JSON, which has neither NaN nor infinity: None stands for both."""
    return float(value) if value is not None and isfinite(value) else None


def matrix(values: Iterable[Iterable[float]]) -> list[list[float | None]]:
    """Rows of such numbers."""
    return [[json_number(value) for value in row] for row in values]


def as_text(value: object) -> str:
    """Any value as text: what is not defined is empty, what would move a cursor is escaped."""
    return "" if value is None else visible(str(value))


def join_words(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def span(values: Sequence[int]) -> str:
    """``8``, or ``4–16`` of several; a dash of none."""
    low, high = min(values, default=None), max(values, default=None)
    return UNDEFINED if low is None else str(low) if low == high else f"{low}–{high}"
