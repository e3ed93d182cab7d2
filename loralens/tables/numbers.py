"""Numbers as text for people: every quantity has one form and one unit, wherever it is shown."""

import re
from collections.abc import Callable, Sequence
from math import isfinite
from typing import TypeAlias

from loralens.errors import OptionError, visible

UNDEFINED = "–"  # where a quantity has no value
MINUS = "−"  # U+2212, in every text for people; CSV, JSON and LaTeX have the hyphen, which programs read
# Block characters by eighths of a line's height; the space stands for 0.
BLOCKS = " ▁▂▃▄▅▆▇█"
# Smaller shares are written as powers of ten: 0.001 % is still easy to read, but the zeros of 0.000012 % would have to
# be counted.
SMALL_SHARE = 1e-5
# Shares are quotients of sums of squares in float64. By rounding, a share of exactly 1 may come out slightly smaller.
# The tolerance is far above the rounding of such sums, and far below the 0.05 % that three digits can show.
WHOLE = 1e-9
# Types of values in JSON: a matrix, and numbers for both sides of ΔW.
JsonMatrix: TypeAlias = list[list[float]]
SIDES = {"in": float, "out": float}
UNITS = ("kB", "MB", "GB", "TB")  # powers of 1000, as the Hub, operating systems and --size 20MB count

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?|\.\d+)\s*(?P<power>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with ``digits`` significant digits, None and NaN as a dash, and infinity as ∞."""
    if value is None or value != value:  # NaN is the only number that differs from itself
        return UNDEFINED
    return true_minus(f"{value:.{digits}g}" if isfinite(value) else "∞" if value > 0 else "-∞")


def true_minus(text: str) -> str:
    """Write the text of a number with a minus sign in place of the hyphen before it.

    The hyphen of an exponent stays: ``−2.4e-05``.
    """
    return MINUS + text[1:] if text.startswith("-") else text


def fixed(form: str) -> Callable[[float | None], str]:
    """Return a function that writes numbers in a format such as ``+.3f``, and None and NaN as a dash.

    The function has the form that `loralens.tables.table.Column.text` expects.
    """

    def text(value: float | None) -> str:
        if value is None or value != value:
            return UNDEFINED
        written = f"{value:{form}}"
        # -0.0001 with two decimals would become "-0.00", which looks like a negative result.
        if value < 0 and not written.strip("-0.%"):
            written = f"{0.0:{form}}"
        # A space before the percent sign, as `percent` writes it and the SI prescribes.
        return true_minus(written).replace("%", " %")

    return text


def or_blank(text: Callable[[float], str]) -> Callable[[float | None], str]:
    """Return a function that writes None as an empty text, and everything else with ``text``."""
    return lambda value: "" if value is None else text(value)


# A cosine, or another number around 0, with its sign and three decimals; and a share in whole percent: ``55 %``.
signed, whole_percent = fixed("+.3f"), fixed(".0%")


def percent(share: float | None, digits: int = 3) -> str:
    """Write a share in percent with at most ``digits`` significant digits, and None as an empty text.

    A share below 0.001 % is written as a power of ten, without the percent sign. A share that is less than 1 is never
    written as 100 %.
    """
    if share is None:
        return ""
    if not isfinite(share):
        return number(share)
    if share == 0:
        return "0"
    if abs(share) < SMALL_SHARE:
        return true_minus(f"{share:.1e}")
    value = float(f"{100 * share:.{digits}g}")  # back to a number: 1230 % would be written as 1.23e+03 %
    # Rounding must not turn a part into the whole: 0.99996 would become 100 %.
    if share < 1 - WHOLE and value >= 100:
        return f"> 99.{'9' * max(digits - 2, 1)} %"
    return true_minus(f"{value:.6f}".rstrip("0").rstrip(".")) + " %"


def size(count: int) -> str:
    """Write a number of bytes in the largest decimal unit that leaves at least 1: 999 B, 110.2 kB, 1.5 GB."""
    # Decimal units, so that the number agrees with what --size takes and the Hub shows.
    value, unit = float(count), "B"
    for bigger in UNITS:
        if value < 999.95:  # what would be rounded to 1000.0 belongs to the next unit
            break
        value, unit = value / 1000, bigger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def change(before: int, after: int, text: Callable[[int], str]) -> str:
    """Write a change as ``120 → 60 (50.0 % of the original)``, where ``text`` writes both numbers."""
    share = f" ({fixed('.1%')(after / before)} of the original)" if before else ""
    return f"{text(before)} → {text(after)}{share}"


def unit_of(largest: int) -> tuple[str, int]:
    """Return a unit for an axis of bytes that ends at ``largest``, and the number of bytes in that unit."""
    power = max((k for k in range(1, len(UNITS) + 1) if largest >= 1000**k), default=0)
    return (UNITS[power - 1] if power else "B"), 1000**power


def parse_size(text: str) -> int:
    """Return the number of bytes of a size that a user wrote: ``20MB`` (10⁶), ``512KiB`` (2¹⁰), ``.5k``, ``100000``.

    Raises
    ------
    OptionError
        The text is not a size.
    """
    fix = "write it like 20MB, 512KiB or 100000"
    written = _SIZE.fullmatch(text.strip())
    if not written:
        raise OptionError(f"{text!r:.100} is not a size", fix=fix)
    base = 1024 if written["binary"] else 1000
    value = float(written["number"]) * base ** " kmgt".index(written["power"].lower() or " ")
    if not isfinite(value):  # from 309 digits on
        raise OptionError(f"{text!r:.100} has too many digits for a size", fix=fix)
    return int(value)


def count(of: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun: ``1 module``, ``12 modules``; ``plural`` is for nouns that add more than an s."""
    return f"{of:,} {noun if of == 1 else plural or f'{noun}s'}"


def shape(sizes: Sequence[int]) -> str:
    """Write a shape as ``768 × 3072``."""
    return " × ".join(map(str, sizes))


def spark(values: Sequence[float], width: int = 16) -> str:
    """Draw non-negative values as a row of at most ``width`` bars, relative to the largest.

    If there are more values than bars, a bar shows the largest of several neighbours.
    """
    top = max(values, default=0.0)
    if top == 0:
        return ""
    bars = min(width, len(values))
    heights = [max(values[len(values) * i // bars : len(values) * (i + 1) // bars]) for i in range(bars)]
    # Only 0 is left blank: a small value would otherwise look like none.
    return "".join(BLOCKS[max(1, round(8 * height / top))] if height > 0 else " " for height in heights)


def json_number(value: float | None) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity: both become None."""
    return float(value) if value is not None and isfinite(value) else None


def as_text(value: object) -> str:
    """Write any value as text: None is empty, and characters that would move the cursor are escaped."""
    return "" if value is None else visible(str(value))


def join_words(names: Sequence[str]) -> str:
    """Join words as in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def span(values: Sequence[float], text: Callable[[float], str] = str, to: str = "–") -> str:
    """Write the range of some values: ``8`` if all are equal, else ``4–16``; a dash if there is none."""
    return to.join(dict.fromkeys(map(text, (min(values), max(values))))) if len(values) else UNDEFINED
