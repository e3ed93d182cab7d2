"""Numbers as a page writes them."""

import pytest

from loralens.tables.numbers import count, fixed, listed, number, percent, size, span


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.12345, "12.3 %"), (0.99999, "> 99.9 %"), (1e-9, "< 0.0001 %")],
)
def test_percent_says_nothing_false(share: float, text: str) -> None:
    assert percent(share).replace("\u00a0", " ") == text


def test_numbers_that_are_none() -> None:
    assert [number(x) for x in (None, float("nan"), float("inf"), float("-inf"))] == ["–", "–", "∞", "−∞"]
    assert fixed(-0.0001, 2) == "0.00"
    assert fixed(-0.0001, 2, sign=True) == "+0.00"
    assert fixed(None) == "–"
    assert percent(None) == "–"


def test_sizes_and_lists() -> None:
    assert [size(n).replace("\u00a0", " ") for n in (0, 999, 1000, 114_321, 2_180_000_000)] == [
        "0 B", "999 B", "1 kB", "114 kB", "2.18 GB",
    ]  # fmt: skip
    assert (span([]), span([4]), span([4, 2])) == ("–", "4", "2–4")
    assert (count(1, "module"), count(1200, "module")) == ("1 module", "1,200 modules")
    assert (listed([]), listed(["a"]), listed(["a", "b", "c"])) == ("", "a", "a, b and c")
