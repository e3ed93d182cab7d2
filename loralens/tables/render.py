"""Tables for other programs and documents: CSV, HTML, data frames of pandas, and `tabular` environments of LaTeX."""

import csv
import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from loralens.errors import OptionError, visible
from loralens.requirements import missing_packages
from loralens.tables.numbers import MINUS
from loralens.tables.table import Table

if TYPE_CHECKING:
    from pandas import DataFrame


# How formulas of spreadsheets begin: also after a blank that programs drop, and in the wide letters of East Asia.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *"\uff1d\uff0b\uff0d\uff20")

NOTEBOOK_ROWS = 100  # rows of a table that a notebook shows


def csv_text(*tables: Table[Any]) -> str:
    """Return tables that have the same columns as CSV with one heading.

    A list becomes the `repr` of its items with spaces between them, so texts in it keep their quotes. A column with
    lists of texts is therefore for JSON only (``csv=False``). A second column then has one text for CSV, as
    ``findings`` in `survey`.
    """
    columns, rows = _names_and_rows(tables)
    stream = StringIO()
    # By default lines would end with \r\n, which programs of Unix show as a stray character.
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        # repr keeps every digit of a float, as the writer does for cells that are numbers themselves.
        writer.writerow(
            [" ".join(map(repr, cell)) if isinstance(cell, list | tuple) else no_formula(cell) for cell in row]
        )
    return stream.getvalue()


def no_formula(cell: Any) -> Any:
    """Return a cell of CSV, with an apostrophe before a text that a spreadsheet would take for a formula."""
    # Texts come from files of other people. Numbers may begin with a sign.
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def frame(*tables: Table[Any]) -> "DataFrame":
    """Return tables that have the same columns as one data frame of pandas, which has to be installed."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise missing_packages("a data frame", ["pandas"], error) from error
    columns, rows = _names_and_rows(tables)
    data = DataFrame(rows, columns=columns)
    # pandas gives a column with only None the dtype object, which has no mean. Columns of numbers are right-aligned.
    numbers = {column.name for column in tables[0].columns if column.align == "right"}
    absent = [name for name in columns if name in numbers and data[name].isna().all()]
    return data.astype(dict.fromkeys(absent, "float64"))


def html_sentence(sentence: str) -> str:
    """Write a sentence as a paragraph of HTML."""
    return f"<p>{escape(visible(sentence))}</p>"


def html_table(table: Table[Any]) -> str:
    """Return a table as HTML for a notebook. All texts are escaped, as names come from files of other people."""
    heads = rows = ""
    for column in table.shown:
        tooltip = f' title="{escape(column.about)}"' if column.about else ""
        heads += f'<th style="text-align: {column.align}"{tooltip}>{escape(column.title)}</th>'
    shown = table.rows if table.whole else table.rows[:NOTEBOOK_ROWS]
    for row in shown:
        cells = ((column.align, escape(visible(column.cell(row)))) for column in table.shown)
        cell_tags = (f'<td style="text-align: {align}">{text}</td>' for align, text in cells)
        rows += f"<tr>{''.join(cell_tags)}</tr>"
    title = escape(visible(table.title))
    # The title is at the left because a table is narrow, and a gap separates it from the next table.
    title += f" (the first {len(shown)} of {len(table.rows)} rows)" if len(shown) < len(table.rows) else ""
    caption = f'<caption style="text-align: left">{title}</caption>' if title else ""
    return f'<table style="margin-bottom: 1em">{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _names_and_rows(tables: Sequence[Table[Any]]) -> tuple[list[str], list[list[Any]]]:
    """The names of the columns for machines, which all tables share, and the values of all rows."""
    if not tables:
        raise OptionError("this result has no table", fix="call .record() for everything that it holds")
    rows: list[list[Any]] = []
    for table in tables:
        columns = [column for column in table.columns if column.csv]
        rows += [[column.value(row) for column in columns] for row in table.rows]
    return [column.name for column in columns], rows


# Characters that LaTeX would take as commands. `str.translate` looks at each character once, so the braces and
# backslashes of a replacement are not replaced again.
# The minus sign becomes a hyphen: the 8-bit fonts of LaTeX have no minus sign in text, and programs that read the table
# expect a hyphen.
_SPECIAL = {MINUS: "-", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_PLAIN = {"–": "--", "…": r"\ldots{}", "“": "``", "”": "''", "’": "'"}
_TEXT = str.maketrans(_SPECIAL | _PLAIN | {c: f"\\{c}" for c in "&%$#_{}"})

# In text the classical fonts of LaTeX show ¡ for <, ¿ for > and a dash for |.
_NAMED = r"""
    < <  > >  | |  ‖ \|  ° ^{\circ}  × \times  · \cdot  ± \pm  ≤ \le  ≥ \ge  ≈ \approx  → \to  ∞ \infty  √ \surd
    ⟨ \langle  ⟩ \rangle  α \alpha  β \beta  ε \epsilon  θ \theta  κ \kappa  λ \lambda  μ \mu  σ \sigma  φ \varphi
    Δ \Delta  Σ \Sigma
"""
_MATHS = dict(re.findall(r"(\S) (\S+)", _NAMED))
_HIGH = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ᵀ", [*"0123456789-+", r"\top"], strict=True))
_LOW = dict(zip("₀₁₂₃₄₅₆₇₈₉ᵢⱼ", "0123456789ij", strict=True))
# A run of these letters is one formula, so that no two dollar signs stand side by side: they also mark a displayed
# formula.
_FORMULA = re.compile("[" + re.escape("".join([*_MATHS, *_HIGH, *_LOW])) + "]+")
_PIECE = re.compile(f"(?P<high>[{''.join(_HIGH)}]+)|(?P<low>[{''.join(_LOW)}]+)|(?P<sign>.)")


def latex_text(text: str) -> str:
    """Return text as LaTeX. Letters of names, such as Chinese ones, stay as they are."""
    parts, end = [], 0
    for match in _FORMULA.finditer(text):
        parts += [text[end : match.start()].translate(_TEXT), f"${_formula(match[0])}$"]
        end = match.end()
    return "".join([*parts, text[end:].translate(_TEXT)])


def _formula(letters: str) -> str:
    formula = ""
    for piece in _PIECE.finditer(letters):
        if piece["sign"]:
            formula += _MATHS[piece["sign"]]
        else:
            # One pair of braces for the whole run, as TeX refuses a second exponent or index.
            raised = piece["high"] is not None
            formula += ("^{" if raised else "_{") + "".join((_HIGH if raised else _LOW)[c] for c in piece[0]) + "}"
    return formula


def latex(table: Table[Any]) -> str:
    """Return a table as a ``tabular`` environment of LaTeX, which needs no package, below a comment with its title."""
    # Bars made of letters are for terminals and notebooks: fonts of LaTeX do not have them.
    columns = [column for column in table.shown if not column.drawn]
    # LaTeX calls the sides l and r.
    sides = "".join(column.align[0] for column in columns)
    rows = [[column.title for column in columns]]
    rows += [[visible(column.cell(row)) for column in columns] for row in table.rows]
    heading, *lines = (" & ".join(map(latex_text, row)) + r" \\" for row in rows)
    title = [f"% {visible(table.title)}"] if table.title else []
    body = "\n".join([*title, rf"\begin{{tabular}}{{{sides}}}", r"\hline", heading, r"\hline", *lines, r"\hline"])
    return body + "\n" + r"\end{tabular}" + "\n"
