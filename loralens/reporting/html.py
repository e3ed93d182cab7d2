"""The HTML page of a report: self-contained, with every name escaped, and the same bytes for the same report."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from math import isfinite, nan, prod
from pkgutil import get_data
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from loralens.charts.palette import classes, stylesheet
from loralens.charts.spec import Chart, HeatMap, LineChart
from loralens.charts.svg_lines import lines_svg
from loralens.charts.svg_maps import heat_svg, key_svg, overlaps_svg
from loralens.errors import visible
from loralens.reporting.document import PageTable, Report, code_pieces
from loralens.tables.table import Column
from loralens.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

# The colours of text and surfaces on a dark page; those of charts are in `loralens.charts.palette`.
DARK = (
    "--page:#12171c;--card:#181f26;--text:#e4e8eb;--soft:#a3aeb8;--faint:#6f7b85;--edge:#2b343d;--accent:#74b8ea;"
    "--wash:#1e262e;--bar:#24445c;--error:#ff8a80;--warning:#e7b05a;--note:#86b6d1;--good:#63c995;color-scheme:dark;"
)


# The policy of the page allows the one script with this hash, so that no name in it can run another. A constant, as
# hashlib loads OpenSSL, which takes 4 MB; a test computes it from report.js.
SCRIPT_HASH = "sha256-/VtbmxlI1Ggzh0qMyR3MR23TiiHbom+XJEYuGd4yIlc="

PIECES = 256  # pieces of a template that are one part of the page


def report_html(report: Report) -> str:
    """The page."""
    return "".join(report_html_parts(report))


def report_html_parts(report: Report) -> Iterator[str]:
    """The page from beginning to end in parts, so that a page of many long names is never held in memory as a whole."""
    # The style repeats both sets of colours: the dark one for the setting of the system and for the button, the light
    # one for the screen and for paper.
    style = _template("report.css").replace("DARK", DARK + stylesheet("dark")).replace("LIGHT", stylesheet("light"))
    pieces = (
        _environment()
        .get_template("report.html")
        .generate(
            report=report,
            version=__version__,
            style=Markup(style.replace("CLASSES", classes())),  # noqa: S704  # ours, not a reader's
            script=Markup(_template("report.js")),  # noqa: S704
            script_hash=SCRIPT_HASH,
            data=script_json({"modules": list(map(_make_visible, report.modules)), "adapters": list(report.sliders)}),
        )
    )
    # A template yields a piece for every expression in it, and most are a few letters.
    while piece := "".join(islice(pieces, PIECES)):
        yield _make_visible(piece)


def _make_visible(text: str) -> str:
    """Text with control characters made visible.

    Names come from files of other people, and a browser obeys characters that reverse the direction of text. The names
    that the filter compares are treated in the same way, so that a name copied from a table is found.
    """
    return visible(text, keep="\n\t")


def script_json(values: Mapping[str, Any]) -> Markup:
    """JSON in which no text can end the script element that holds it.

    Raises
    ------
    ValueError
        A number is NaN or infinite: JSON has neither, and a page with one would show nothing.
    """
    # JSON allows these letters as escapes, and HTML then sees no tag.
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704  # escaped above


_BREAK = re.compile(r"\.(?=\D)")


def _template(name: str) -> str:
    # Not by path: a package may be imported from a zip archive. `importlib.resources` does this too, but loads zipfile.
    data = get_data("loralens.reporting", f"templates/{name}")
    assert data is not None, name
    return data.decode("utf-8")


# Kept, as the templates of a page take more memory to compile than its adapters do.
@cache
def _environment() -> "Environment":
    # Imported here because it takes 36 ms, which --help and every refusal of a report would pay.
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    # With autoescape nothing that a template shows is markup, unless it was made a Markup below. StrictUndefined makes
    # a misspelt name in a template an error, where jinja2 would write nothing.
    environment = Environment(loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "draw": _draw,
        "key": lambda key: Markup("".join(key_svg(key))),  # noqa: S704  # escaped where it was made
        "kind": lambda part: type(part).__name__,
        "lines": _lines,
        "mark_code": lambda text: Markup("").join(
            Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in enumerate(code_pieces(text))
        ),
        # No line breaks between a number and its unit.
        "join_units": lambda text: re.sub(r"(?<=\d) (?=(?:%|[kMGT]?B)(?!\w))", "\u00a0", text),
    }
    environment.tests |= {"lines": lambda chart: isinstance(chart, LineChart)}
    return environment


def _draw(chart: Chart, alt: str, count: int) -> Iterator[Markup]:
    """A chart in pieces, because a map of many modules with long names is larger than the adapter."""
    if isinstance(chart, LineChart):
        # A chart that is alone in its picture has the width of the page, and room for long names in its legend.
        pieces = lines_svg(chart, f"{chart.title}. {alt}" if chart.title else alt, alone=count == 1)
    elif isinstance(chart, HeatMap):
        pieces = heat_svg(chart, f"{chart.title}. {alt}" if chart.title else alt)
    else:
        # There are many maps of φ in one picture, so each is described by its own numbers and not by the caption.
        pieces = overlaps_svg(chart, f"{chart.title}: {', '.join(chart.notes)}")
    return map(Markup, pieces)  # escaped where they were made


def _lines(table: PageTable) -> Iterator[Markup]:
    """The rows of a table, one after the other.

    They are not in the template, which would take three times as long, and a page may have a hundred thousand rows.
    """
    columns = table.table.shown
    for row, modules in table.lines:
        cells = "".join(_cell(column, column.value(row)) for column in columns)
        numbers = f' data-m="{" ".join(map(str, modules))}"' if modules else ""
        yield Markup(f"<tr{numbers}>{cells}</tr>")  # noqa: S704  # escaped in `_cell`


def _cell(column: Column[Any], value: object) -> str:
    text = escape(column.text(value))
    if column.align == "left":
        # A line may break after the dots of a module name, but not after a decimal point.
        return f'<td class="words">{_BREAK.sub(".<wbr>", text)}</td>'
    bar = f' class="bar" style="--f:{100 * value:.1f}%"' if column.bar and isinstance(value, int | float) else ""
    return f'<td{bar} data-s="{_sort_key(value)}">{text}</td>'


def _sort_key(value: object) -> str:
    """The number by which a column is sorted: for shapes and ranges their product; empty for a missing value."""
    values = value if isinstance(value, list | tuple) else (value,)
    number = prod(float(part) for part in values) if all(isinstance(part, int | float) for part in values) else nan
    return repr(float(number)) if isfinite(number) else ""
