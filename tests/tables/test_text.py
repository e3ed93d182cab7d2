"""Tables in the width of a terminal: names are shortened, columns left out and named, numbers never cut."""

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from loralens.tables import Column, Table, lay_out
from loralens.tables.numbers import number
from loralens.tables.table import ALWAYS
from loralens.tables.text import display_width, shorten, shorten_names, wrap

Row = tuple[str, float, int]
COLUMNS: tuple[Column[Row], ...] = (
    Column("name", lambda row: row[0], "module", align="left", priority=ALWAYS),
    Column("norm", lambda row: row[1], "‖ΔW‖F", number, priority=3),
    Column("count", lambda row: row[2], "parameters", "{:,}".format, priority=2),
    Column("hidden", lambda row: row[2]),
)
ROWS = st.lists(st.tuples(st.text(max_size=90), st.floats(0, 1e12), st.integers(0, 10**12)), min_size=1, max_size=5)


@given(ROWS, st.integers(30, 200))
def test_every_cell_that_is_shown_is_whole(rows: list[Row], width: int) -> None:
    layout = lay_out(Table("title", COLUMNS, rows), width)
    for row, line in zip(rows, layout.lines, strict=True):
        assert display_width(line) <= width
        for column in COLUMNS[1:3]:
            if column.title in layout.heading:
                assert re.search(rf"(^| ){re.escape(column.cell(row))}( |$)", line)
            else:
                assert column.title in layout.note
    assert len({display_width(layout.heading)} | set()) == 1


def test_all_columns_stand_where_there_is_no_limit() -> None:
    layout = lay_out(Table("title", COLUMNS, [("m" * 300, 0.007318, 36864)]))
    assert "m" * 300 in layout.lines[0]
    assert "0.007318" in layout.lines[0]
    assert "36,864" in layout.lines[0]
    assert not layout.note
    assert "hidden" not in layout.heading


def test_the_column_of_the_lowest_priority_goes_first_and_is_named() -> None:
    layout = lay_out(Table("title", COLUMNS, [("model.layers.0.self_attn.q_proj", 1.5, 36864)]), 30)
    assert "parameters" not in layout.heading
    assert "‖ΔW‖F" in layout.heading
    assert layout.note.startswith("not shown here: parameters")


def test_a_sentence_loses_its_end_and_a_name_its_middle() -> None:
    columns = [
        Column("name", lambda row: row[0], "module", align="left", priority=ALWAYS),
        Column("reason", lambda row: row[1], "reason", align="left", priority=ALWAYS, sentence=True),
    ]
    rows = [("model.layers.0.self_attn.q_proj", "層 ΔW is too large for float64, as the sum of its squares is")]
    rows.append(("model.layers.1.self_attn.q_proj", "short"))
    (first, second) = lay_out(Table("title", columns, rows), 50).lines
    assert max(map(display_width, (first, second))) <= 50
    assert "  層 ΔW is too large" in first
    assert first.endswith("…")
    assert second.endswith(" short")
    assert "q_proj" in first


@given(st.text(max_size=60), st.integers(5, 60))
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    assert display_width(short) <= max(width, 0)
    if "…" not in text and "…" in short:
        head, tail = short.split("…")
        assert text.startswith(head)
        assert text.endswith(tail)


def test_names_that_begin_alike_stay_different() -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.value" for i in range(12)]
    short = shorten_names(names, 16)
    assert len({*short}) == 12
    assert all(len(name) <= 16 for name in short)
    assert shorten_names(names, 60) == names
    assert shorten_names(["x" * 40], 16) == [shorten("x" * 40, 16)]


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=30), min_size=1), st.integers(5, 60))
def test_a_wrapped_text_fits_and_has_all_its_words(words: list[str], width: int) -> None:
    lines = wrap(" ".join(words), width)
    assert all(display_width(line) <= width for line in lines)
    assert " ".join(lines).split(" ") == [shorten(word, width) for word in words]
    for line, following in itertools.pairwise(lines):  # no line ends where another word would fit
        assert display_width(f"{line} {following.split(' ')[0]}") > width


def test_names_lose_the_words_that_most_of_them_have() -> None:
    """Numbers, and the last two words, say the block and the projection."""
    names = [
        f"lora_{part}_blocks_{i}_transformer_blocks_0_attn1_to_{kind}"
        for part in ("unet_input", "unet_output")
        for i in (4, 11)
        for kind in ("q", "out_0")
    ]
    short = shorten_names(names, 30)
    assert len({*short}) == len(names)
    assert all(len(name) <= 30 for name in short)
    assert short[0] == "…input_blocks_4…0_attn1_to_q" or short[0] == "…input…4…0_attn1_to_q"


def test_a_command_goes_on_after_a_backslash_and_keeps_its_words_whole() -> None:
    text = "  fix: make it smaller with `loralens compress adapter -o smaller --energy 0.99 --uniform`, and look"
    lines = wrap(text, 40)
    assert all(display_width(line) <= 40 for line in lines)
    assert " ".join("\n".join(lines).replace("\\\n", "").split()) == text.strip()
    assert all(line.startswith("    ") for line in lines[1:])
    # One that fits on a line is whole.
    assert wrap("words before it: `loralens doctor adapter`", 30)[1] == "`loralens doctor adapter`"
