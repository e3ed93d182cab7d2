"""Tables for people: rows with nothing notable become one sentence, and --top limits the others."""

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
