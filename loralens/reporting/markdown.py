"""A report as Markdown, and its pictures as PNG files."""

from collections.abc import Iterator, Sequence
from io import BytesIO

from loralens.charts.figure import write_figure
from loralens.charts.spec import Band, Figure
from loralens.errors import visible
from loralens.reporting.document import Notices, PageTable, Paragraph, Part, Picture, Report, SideBySide
from loralens.version import __version__

# Letters that mean something to Markdown or HTML anywhere in a line: each is escaped.
SPECIAL = "\\`*_{}[]<>#|~&"


def report_markdown(report: Report, folder: str) -> str:
    """The Markdown text of a report, whose pictures are files of ``folder``."""
    lines = [f"# {escape_markdown(report.title)}", ""]
    if report.command:
        lines += [*_code_block(report.command), ""]
    lines += [*(f"- {escape_markdown(said)}" for said in report.summary), ""]
    for section in report.sections:
        lines += [f"## {escape_markdown(section.title)}", ""]
        lines += [escape_markdown(section.lead), ""] if section.lead else []
        for part in section.parts:
            lines += _part(part, folder)
    text = "\n".join([*lines, f"Made by loralens {__version__}.", ""])
    return visible(text, keep="\n\t")  # names come from files of other people and may hold control characters


def report_pictures(report: Report) -> dict[str, bytes]:
    """File name → the PNG of every picture; the same bytes for the same report."""
    images = {}
    for part in _all_parts(report):
        if isinstance(part, Picture) and part.charts:
            stream = BytesIO()
            write_figure(Figure(part.title, [Band(part.charts, keys=part.keys)]), stream, "png")
            images[f"{part.key}.png"] = stream.getvalue()
    return images


def _all_parts(report: Report) -> Iterator[Part]:
    def walk(parts: Sequence[Part]) -> Iterator[Part]:
        for part in parts:
            yield part
            if isinstance(part, SideBySide):
                for _, inner in part.columns:
                    yield from walk(inner)

    for section in report.sections:
        yield from walk(section.parts)


def _part(part: Part, folder: str) -> list[str]:
    if isinstance(part, Paragraph):
        return [f"**{escape_markdown(part.text)}**" if part.warning else escape_markdown(part.text), ""]
    if isinstance(part, Notices):
        return _notices(part)
    if isinstance(part, PageTable):
        return _table(part)
    if isinstance(part, Picture):
        return _picture(part, folder)
    if isinstance(part, SideBySide):
        lines = []
        for label, inner in part.columns:
            lines += [f"### {escape_markdown(label)}", ""] if label else []
            for inner_part in inner:
                lines += _part(inner_part, folder)
        return lines
    return []  # a slider does not move in Markdown; the table of ranks has its numbers


def _notices(part: Notices) -> list[str]:
    lines = [] if part.notices else [escape_markdown(part.good)]
    for notice in part.notices:
        place = f" {escape_markdown(notice.where)}" if notice.where else ""
        lines.append(f"- **{notice.level}: {escape_markdown(notice.code)}**{place}")
        lines += [f"  - {escape_markdown(evidence)}" for evidence in notice.evidence]
        lines += [f"  - fix: {_keep_code(notice.fix)}"] if notice.fix else []
    return [*lines, ""]


def _picture(part: Picture, folder: str) -> list[str]:
    if not part.charts:
        return []
    caption = f"{part.caption} Chance: {part.chance}. Source: {part.source}."
    return [
        f"![{escape_markdown(part.alt)}]({folder}/{part.key}.png)",
        "",
        f"*{escape_markdown(part.title)}.* {escape_markdown(caption)}",
        "",
    ]


def _table(part: PageTable) -> list[str]:
    if not part.table.rows:
        return []
    heads = [escape_markdown(column.title) or " " for column in part.columns]
    rules = [":--" if column.align == "left" else "--:" for column in part.columns]
    rows = [[escape_markdown(column.cell(row)) for column in part.columns] for row in part.table.rows]
    title = [f"**{escape_markdown(part.title)}**", ""] if part.title else []
    return [*title, *(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows)), ""]


def escape_markdown(text: str) -> str:
    """Text on one line in which nothing is markup, neither of Markdown nor of HTML."""
    return _escape_letters(" ".join(text.split()))


def _escape_letters(line: str) -> str:
    return "".join(f"\\{letter}" if letter in SPECIAL else letter for letter in line)


def _keep_code(text: str) -> str:
    """Text, escaped except for the parts between backticks, which stay code."""
    pieces = " ".join(text.split()).split("`")
    if len(pieces) % 2 == 0:  # an odd number of backticks: one has no partner
        return escape_markdown(text)
    return "".join(f"`{piece}`" if i % 2 else _escape_letters(piece) for i, piece in enumerate(pieces))


def _code_block(text: str) -> list[str]:
    """A block of code, whose fence is longer than any run of backticks in it."""
    fence = "```"  # a command may itself hold backticks
    while fence in text:
        fence += "`"
    return [f"{fence}console", "$ " + " ".join(text.splitlines()), fence]
