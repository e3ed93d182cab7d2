"""A report as an HTML page and as Markdown with pictures, by the templates beside this file."""

import os
import re
from base64 import b64encode
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from hashlib import sha256
from io import BytesIO
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from loralens.charts.figure_file import write_figure
from loralens.charts.module_grid import fit_name
from loralens.charts.palette import colours
from loralens.charts.spec import Band, Figure
from loralens.errors import OptionError, target_exists, visible
from loralens.formats.files.atomic import atomic_file, atomic_path, tidy
from loralens.formats.files.disk import check_room, disk_errors
from loralens.reporting.document import Picture, Report, Slider
from loralens.reporting.svg import MARKS, KeyPlot, plots_of
from loralens.tables.numbers import number
from loralens.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

SUFFIX = ".html"
_UNIT = re.compile(r"(?<=\d) (?=(?:%|[kMGT]?B)(?!\w))")  # between a number and its unit, where no line may end
_OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")  # within which no line may end either
# Letters that mean something to Markdown or HTML anywhere in a line: each is escaped. Those that mean something only at
# the beginning of a line, such as + and 1., need no escape, as no line begins with a text of the report.
_ESCAPES = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>#|~&"})


@cache
def _environment(*, markdown: bool) -> "Environment":
    from jinja2 import Environment, PackageLoader  # only where a page is made

    made = Environment(
        loader=PackageLoader("loralens.reporting"),
        autoescape=True,
        trim_blocks=markdown,
        lstrip_blocks=markdown,
        # What the templates write: in Markdown every text is escaped, and on the page numbers are places in pixels.
        finalize=_escape_markdown if markdown else lambda x: f"{x:.5g}" if isinstance(x, float) else x,
    )
    made.filters |= {"units": lambda text: _whole(_UNIT.sub("\u00a0", text)), "number": number, "fit": fit_name}
    made.filters |= {
        "pieces": _code_pieces,
        "whole": _whole,
        "raw": Markup,
        # For readers who do not see the charts.
        "described": lambda panel, picture: ". ".join(
            filter(None, (picture.title, panel.label, panel.remark.removesuffix(".")))
        ),
        "sort_key": _sort_key,
        "one_line": lambda x: " ".join(x.split()),
        "words": lambda x: Markup(x.translate(_ESCAPES)),  # noqa: S704  # escaped
        # A line may break after the dots of a module's name, but not after a decimal point.
        "breaks": lambda x: Markup(re.sub(r"\.(?=\D)", ".<wbr>", str(escape(x)))),  # noqa: S704  # escaped
    }
    made.globals |= {"plots_of": plots_of, "key_plot": KeyPlot, "version": __version__, "mark_of": MARKS}
    made.globals |= {"looks": {"-": "", "--": "dashed", ":": "dotted", "": "unjoined"}}
    return made


def render_page(template: str, script_name: str, **content: Any) -> str:
    """A page with its script: self-contained, with every text escaped, and the same bytes for the same content."""
    environment = _environment(markdown=False)
    assert environment.loader is not None
    script = environment.loader.get_source(environment, script_name)[0]
    text = environment.get_template(template).render(
        **content,
        schemes={scheme: "".join(f"--{k}:{v};" for k, v in colours(scheme).items()) for scheme in ("light", "dark")},
        colours=colours("light"),
        script=Markup(script),  # noqa: S704  # our own
        # The policy of the page allows this script alone, so that no name in it can run another.
        digest=b64encode(sha256(script.encode()).digest()).decode(),
    )
    # Names come from files of other people, and a browser obeys characters that reverse the direction of text.
    return visible(text, keep="\n\t")


def report_html(report: Report) -> str:
    """The page of a report."""
    sliders = [part.data for section in report.sections for part in section.parts if isinstance(part, Slider)]
    return render_page("report.html", "report.js", report=report, sliders=sliders)


def report_markdown(report: Report, folder: str) -> str:
    """The Markdown text of a report, whose pictures are files of ``folder``."""
    fence = "```"  # longer than any run of backticks in the command
    while fence in report.command:
        fence += "`"
    template = _environment(markdown=True).get_template("report.md")
    text = template.render(report=report, folder=folder, fence=fence)
    return visible(re.sub(r"\n{3,}", "\n\n", text), keep="\n\t")


def report_pictures(report: Report) -> dict[str, bytes]:
    """File name → the PNG of every panel; the same bytes for the same report."""
    images = {}
    pictures = [part for section in report.sections for part in section.parts if isinstance(part, Picture)]
    for picture in pictures:
        for panel in picture.panels:
            stream = BytesIO()
            write_figure(Figure(picture.title, [Band(panel.charts, keys=panel.keys)]), stream, "png")
            images[f"{panel.key}.png"] = stream.getvalue()
    return images


def _escape_markdown(text: object) -> Markup:
    """Text on one line in which nothing is markup, neither of Markdown nor of HTML."""
    return text if isinstance(text, Markup) else Markup(" ".join(str(text).split()).translate(_ESCAPES))  # noqa: S704


def _whole(text: str) -> Markup:
    """The escaped text, in which no line ends within the name of an option."""
    return Markup(_OPTION.sub(r'<span class="whole">\g<0></span>', str(escape(text))))  # noqa: S704  # escaped


def _code_pieces(text: str) -> list[str]:
    """The parts of a text between backticks, of which every second is code; one if a backtick has no partner."""
    pieces = text.split("`")
    return pieces if len(pieces) % 2 else [text]


def _sort_key(value: object) -> str:
    """The number by which a column is sorted: for shapes and ranges their product; empty for a missing value."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, int | float) for part in values):
        return ""
    result = float(prod(values))
    return repr(result) if isfinite(result) else ""


def markdown_paths(page: Path) -> tuple[Path, Path]:
    """The paths of the Markdown file and of the folder of its pictures, which stand next to a page."""
    return page.with_suffix(".md"), page.with_name(f"{page.stem}_files")


def check_report_target(page: Path, *, with_markdown: bool, overwrite: bool) -> None:
    """Refuse a target to which the report cannot be written, before anything is measured.

    Raises
    ------
    OptionError
        A suffix other than .html; a file that exists although ``overwrite`` is false; a file where a folder must be.
    """
    if page.suffix != SUFFIX:
        raise OptionError(
            f"{page}: a report is a .html page",
            fix=f"end the name in {SUFFIX}; --markdown writes it as Markdown too, and a browser prints it as PDF",
        )
    text, folder = markdown_paths(page)
    for target in (page, *((text, folder) if with_markdown else ())):
        # lexists: a link that leads nowhere would be replaced too.
        if os.path.lexists(target) and not overwrite:
            raise target_exists(target)
        if target != folder and target.is_dir():
            raise OptionError(f"{target}: is a folder", fix="choose another target")
    # The folder is replaced as a whole, so it may hold nothing but pictures of an earlier report.
    if with_markdown and folder.exists():
        strangers = [] if folder.is_dir() else [folder.name]
        strangers += [entry.name for entry in folder.glob("*") if entry.suffix != ".png" or entry.is_dir()]
        if strangers:
            raise OptionError(
                f"{folder}: holds files that are not pictures, such as {strangers[0]}", fix="choose another target"
            )
    check_room(page)


def write_report(report: Report, page: Path, *, with_markdown: bool = False) -> list[Path]:
    """Write the page, and the Markdown and its pictures if asked for; return the paths that were written.

    Missing folders are made. The same report gives the same bytes.

    Raises
    ------
    FormatError
        The files cannot be written.
    """
    text, folder = markdown_paths(page)
    # Before anything is written, so that an error in a picture leaves no half report.
    pictures: Mapping[str, bytes] = report_pictures(report) if with_markdown else {}
    # The files are complete before the stack is left, and only then put in place: an error leaves the old report.
    with ExitStack() as stack:
        stack.enter_context(atomic_file(page)).write(report_html(report).encode("utf-8"))
        if with_markdown:
            stack.enter_context(atomic_file(text)).write(report_markdown(report, folder.name).encode("utf-8"))
            # A run that was killed may have left a part beside the folder, or moved the old folder aside.
            with disk_errors(folder):
                tidy(folder)
            with atomic_path(folder, folder=True, overwrite=True) as part:
                for name, content in pictures.items():
                    (part / name).write_bytes(content)
    return [page, *([text, folder] if with_markdown else [])]
