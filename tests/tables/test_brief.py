"""Tables for people: rows with nothing notable become one sentence, and --top limits the others."""

from typing import Any

from loralens.tables import Column, Table

NUMBER: Column[int] = Column("number", lambda row: row, "number")
TABLE = Table("numbers", (NUMBER,), [3, 0, 5, 0, 0, 7], lambda row: row == 0, "{} zeros".format)


def test_uneventful_rows_are_counted_in_one_sentence() -> None:
    brief, sentence = TABLE.brief()
    assert list(brief.rows) == [3, 5, 7]
    assert sentence == "3 zeros"
    assert TABLE.records() == [{"number": number} for number in (3, 0, 5, 0, 0, 7)]


def test_top_counts_the_rows_that_are_left_out() -> None:
    brief, sentence = TABLE.brief(2)
    assert list(brief.rows) == [3, 5]
    assert sentence == "… 1 more row; 3 zeros"
    assert TABLE.brief(3) == TABLE.brief()


def test_the_rows_that_matter_are_those_that_a_screen_shows() -> None:
    """By the one column that says so: a row without a value matters least, and a sign may count or not."""
    rows = [3.0, None, -7.0, 5.0, float("nan"), 0.5]

    def first(matters: Any, top: int = 2) -> tuple[list[Any], str]:
        columns = (Column("name", str, "name"), Column("value", lambda row: row, "value", matters=matters))
        brief, sentence = Table("", columns, rows).brief(top, foremost=True)
        return list(brief.rows), sentence

    assert first("largest") == ([5.0, 3.0], "… 4 more rows (these have the largest value)")
    assert first("smallest") == ([-7.0, 0.5], "… 4 more rows (these have the smallest value)")
    assert first("strongest") == ([-7.0, 5.0], "… 4 more rows (these have the strongest value)")
    assert first("") == ([3.0, None], "… 4 more rows")
    assert first("largest", 6) == (rows, "")
