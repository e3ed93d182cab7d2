"""Numbers as text: one form of every quantity, and none that says something false; sizes read back."""

import csv
from io import StringIO

import pytest

from loralens import OptionError
from loralens.tables import Column, Table, lay_out, percent, signed
from loralens.tables.numbers import change, fixed, number, parse_size, true_minus, whole_percent
from loralens.tables.render import csv_text, html_table, latex


@pytest.mark.parametrize(
    ("text", "count"),
    [("20MB", 20_000_000), ("512KiB", 524_288), ("1.5 MiB", 1_572_864), ("100000", 100_000), ("3kb", 3000), ("7B", 7),
     ("2G", 2_000_000_000), (".5k", 500), ("0", 0), (" 1TiB ", 2**40),
     ("20 GiB", 20 * 2**30), ("1.5k", 1500), ("500mb", 5 * 10**8), ("0B", 0)],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "20 parsecs", "-1", "1e3", "MB", "nan", "1,000", "20GBB", "9" * 400 + "GB", "9" * 305 + "GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match=r"is not a size|too many digits"):
        parse_size(text)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"), (1.0, "100 %"), (0.5, "50 %"), (0.12345, "12.3 %"), (0.99999, "> 99.9 %"), (1e-9, "1.0e-09"),
        (0.00012, "0.012 %"), (12.345, "1230 %"), (None, ""), (float("nan"), "–"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_percent_says_nothing_false(share: float | None, text: str) -> None:
    assert percent(share) == text


def test_a_number_below_zero_has_a_minus_sign_for_people_and_a_hyphen_for_programs() -> None:
    assert (number(-0.25), number(-2.4e-5), number(float("-inf"))) == ("−0.25", "−2.4e-05", "−∞")
    assert (fixed(".2f")(-1.5), fixed("+.3f")(-1.5), fixed(".0%")(-0.5)) == ("−1.50", "−1.500", "−50 %")
    assert (signed(-0.5), signed(0.5)) == ("−0.500", "+0.500")
    assert (percent(-0.25), percent(-1e-7), whole_percent(-0.25)) == ("−25 %", "−1.0e-07", "−25 %")
    assert true_minus("2-3") == "2-3"
    columns = (Column("gain", lambda row: row, "gain", fixed(".2f")), Column("z", lambda row: row, "z", number))
    table = Table("", columns, [-0.25])
    laid_out = str(lay_out(table))
    assert "−0.25" in laid_out
    assert "-0" not in laid_out
    assert "−0.25" in html_table(table)
    assert csv_text(table).splitlines()[1] == "-0.25,-0.25"
    assert table.records() == [{"gain": -0.25, "z": -0.25}]
    assert "-0.25 & -0.25" in latex(table)
    assert "−" not in latex(table)


@pytest.mark.parametrize("start", [*"=+-@\uff1d\uff0b\uff0d\uff20", "\t=", "\n="])
def test_a_text_in_csv_is_no_formula_and_a_number_stays_one(start: str) -> None:
    columns = (Column("name", lambda row: row), Column("x", lambda _: -1.5), Column("each", lambda _: [-1, 2]))
    text = f"{start}cmd|' /C calc'!A0"
    _, row = csv.reader(StringIO(csv_text(Table("", columns, [text]))))
    assert row == [f"'{text}", "-1.5", "-1 2"]


def test_a_change_gives_the_share_that_is_left() -> None:
    assert change(120, 60, str) == "120 → 60 (50.0 % of the original)"
    assert change(0, 60, str) == "0 → 60"
