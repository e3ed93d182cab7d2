"""Numbers as text: one form of every quantity, and none that says something false."""

import pytest

from loralens.tables.numbers import count, fixed, listed, number, percent, size, span, unit_of


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"), (1.0, "100 %"), (0.5, "50 %"), (0.12345, "12.3 %"), (0.99999, "> 99.9 %"), (1e-9, "1.0e-09"),
        (0.00012, "0.012 %"), (12.345, "1230 %"), (None, ""), (float("nan"), "–"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_percent_says_nothing_false(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_percent_to_more_digits() -> None:
    assert [percent(share, 4) for share in (0.123456, 0.99996, 1.0)] == ["12.35 %", "> 99.99 %", "100 %"]


def test_numbers_that_are_none() -> None:
    assert [number(x) for x in (None, float("nan"), float("inf"), float("-inf"))] == ["–", "–", "∞", "−∞"]
    assert (fixed(".2f")(-0.0001), fixed("+.2f")(-0.0001), fixed(".2f")(None)) == ("0.00", "+0.00", "–")


def test_sizes_and_lists() -> None:
    assert [size(n) for n in (0, 999, 1000, 114_321, 2_180_000_000)] == ["0 B", "999 B", "1.0 kB", "114.3 kB", "2.2 GB"]
    assert [unit_of(n) for n in (0, 999, 1000, 114_321, 2_180_000_000)] == [
        ("B", 1), ("B", 1), ("kB", 1000), ("kB", 1000), ("GB", 1000**3),
    ]  # fmt: skip
    assert (span([]), span([4]), span([4, 2])) == ("–", "4", "2–4")
    assert (count(1, "module"), count(1200, "module")) == ("1 module", "1,200 modules")
    assert (listed([]), listed(["a"]), listed(["a", "b", "c"])) == ("", "a", "a, b and c")
