"""Numbers as text, and sizes read back."""

import pytest

from loralens.errors import OptionError
from loralens.tables.numbers import change, exact_size, parse_size, size


@pytest.mark.parametrize(
    ("text", "count"),
    [("20MB", 20_000_000), ("512KiB", 524_288), ("1.5 MiB", 1_572_864), ("100000", 100_000), ("3kb", 3000), ("7B", 7),
     ("2G", 2_000_000_000), (".5k", 500), ("0", 0), (" 1TiB ", 2**40)],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "20 parsecs", "-1", "1e3", "MB", "nan", "1,000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("count", [1, 999, 1000, 20_000_000])
def test_a_size_that_was_written_is_read_as_the_same(count: int) -> None:
    assert parse_size(size(count)) == count


def test_changes() -> None:
    assert change(120, 60, "{:,}".format) == "120 → 60, 50.0% of it"
    assert change(0, 60, "{:,}".format) == "0 → 60"
    assert exact_size(110_184) == "110.2 kB (110,184 bytes)"
