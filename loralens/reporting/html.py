"""The HTML page of a report: self-contained, with every name escaped, and the same bytes for the same report."""

import json
from collections.abc import Iterator, Mapping
from pkgutil import get_data

from loralens.charts.palette import classes, stylesheet
from loralens.errors import visible
from loralens.reporting.document import Report
from loralens.reporting.page.parts import section_html
from loralens.reporting.page.patterns import fill, join_units
from loralens.reporting.page.tables import verdicts_html
from loralens.version import __version__

# The colours of text and surfaces on a dark page; those of charts are in `loralens.charts.palette`.
DARK = (
    "--page:#12171c;--card:#181f26;--text:#e4e8eb;--soft:#a3aeb8;--faint:#6f7b85;--edge:#2b343d;--accent:#74b8ea;"
    "--wash:#1e262e;--bar:#24445c;--error:#ff8a80;--warning:#e7b05a;--note:#86b6d1;--good:#63c995;color-scheme:dark;"
)


# The policy of the page allows the one script with this hash, so that no name in it can run another. A constant, as
# hashlib loads OpenSSL, which takes 4 MB; a test computes it from report.js.
SCRIPT_HASH = "sha256-KXL2yky4Yy2ysFPZNGd+wX7y5dWFzruTy3LXdhvMNdU="

PART = 16_384  # letters of a part of the page, at least: most of its pieces are a few letters


def report_html(report: Report) -> str:
    """The page."""
    return "".join(report_html_parts(report))


def report_html_parts(report: Report) -> Iterator[str]:
    """The page from beginning to end in parts, so that a page of many long names is never held in memory as a whole."""
    pieces: list[str] = []
    length = 0
    for piece in _page(report):
        pieces.append(piece)
        length += len(piece)
        if length >= PART:
            yield _make_visible("".join(pieces))
            pieces, length = [], 0
    yield _make_visible("".join(pieces))


def _page(report: Report) -> Iterator[str]:
    yield from _head(report)
    yield fill('<body>\n<header><div>\n<p class="kicker">loralens report</p>\n<h1>{title}</h1>\n', title=report.title)
    yield from _first_screen(report)
    yield '\n</div></header>\n<nav aria-label="Sections"><div>\n<ul>'
    for section in report.sections:
        yield fill('<li><a href="#{section.key}">{section.title}</a></li>', section=section)
    yield '</ul>\n<span id="filtered" role="status"></span>\n<input id="filter"'
    # A page without modules has nothing to filter.
    yield "" if report.modules else " hidden"
    yield ' type="search" placeholder="filter modules: q_proj" aria-label="Filter modules by parts of their names">\n'
    yield '<button id="theme" type="button" aria-label="Switch between light and dark">◐</button>\n</div></nav>\n<main>'
    for section in report.sections:
        yield from section_html(section)
    yield f"\n</main>\n<footer>Made by loralens {__version__}. "
    yield "Nothing on this page was fetched from anywhere, and nothing is sent.</footer>\n"
    yield '<div id="tip" role="tooltip" hidden></div>\n<script id="data" type="application/json">'
    yield from _json_pieces({"modules": list(map(_make_visible, report.modules)), "adapters": list(report.sliders)})
    yield f"</script>\n<script>{_asset('report.js')}</script>\n</body>\n</html>"


def _head(report: Report) -> Iterator[str]:
    # The style repeats both sets of colours: the dark one for the setting of the system and for the button, the light
    # one for the screen and for paper.
    style = _asset("report.css").replace("DARK", DARK + stylesheet("dark")).replace("LIGHT", stylesheet("light"))
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{SCRIPT_HASH}'"
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield f'<meta name="generator" content="loralens {__version__}">\n'
    yield '<meta name="color-scheme" content="light dark">\n'
    yield fill("<title>{title} – loralens report</title>\n", title=report.title)
    yield f"<style>{style.replace('CLASSES', classes())}</style>\n</head>\n"


def _first_screen(report: Report) -> Iterator[str]:
    if report.headline:
        yield fill('<p class="headline">{text}</p>', text=join_units(report.headline))
    if report.verdicts:
        yield from verdicts_html(report.verdicts)
    if report.remarks:
        yield '<div class="summary" role="region" aria-label="Summary"><ul>'
        for sentence in report.remarks:
            yield fill("<li>{sentence}</li>", sentence=join_units(sentence))
        yield "</ul></div>"
    if report.command:
        yield fill('<code class="command">{command}</code>', command=report.command)


def _make_visible(text: str) -> str:
    """Text with control characters made visible.

    Names come from files of other people, and a browser obeys characters that reverse the direction of text. The names
    that the filter compares are treated in the same way, so that a name copied from a table is found.
    """
    return visible(text, keep="\n\t")


def script_json(value: object) -> str:
    """JSON in which no text can end the script element that holds it.

    Raises
    ------
    ValueError
        A number is NaN or infinite: JSON has neither, and a page with one would show nothing.
    """
    return "".join(_json_pieces(value))


_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def _json_pieces(value: object) -> Iterator[str]:
    """The pieces of `script_json`: one for each text and for each list of numbers."""
    if isinstance(value, Mapping):
        yield "{"
        for i, (key, inner) in enumerate(value.items()):
            yield from ("," * (i > 0), *_json_pieces(key), ":")
            yield from _json_pieces(inner)
        yield "}"
    elif isinstance(value, list) and any(isinstance(inner, str | list | Mapping) for inner in value):
        yield "["
        for i, inner in enumerate(value):
            yield "," * (i > 0)
            yield from _json_pieces(inner)
        yield "]"
    else:
        # JSON allows these letters as escapes, and HTML then sees no tag.
        text = _encode(value)
        for letter in "<>&":
            text = text.replace(letter, f"\\u{ord(letter):04x}")
        yield text


def _asset(name: str) -> str:
    # Not by path: a package may be imported from a zip archive. `importlib.resources` does this too, but loads zipfile.
    data = get_data("loralens.reporting", f"templates/{name}")
    assert data is not None, name
    return data.decode("utf-8")
