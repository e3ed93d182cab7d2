"""A report as Markdown, and its pictures as PNG files."""

from collections.abc import Iterator, Sequence
from io import BytesIO

from loralens.charts.figure import write_figure
from loralens.charts.spec import Band, Figure
from loralens.errors import visible
from loralens.reporting.document import (
    Notice,
    Notices,
    PageTable,
    Paragraph,
    Part,
    Picture,
    PictureRow,
    Report,
    SideBySide,
    code_pieces,
)
from loralens.version import __version__

# Letters that mean something to Markdown or HTML anywhere in a line: each is escaped. Those that mean something only at
# the beginning of a line, such as + and 1., need no escape, as no line begins with a text of the report.
ESCAPES = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_{}[]<>#|~&"})


def report_markdown(report: Report, folder: str) -> str:
    """The Markdown text of a report, whose pictures are files of ``folder``."""
    lines = [f"# {escape_markdown(report.title)}", ""]
    if report.command:
        lines += [*_code_block(report.command), ""]
    lines += [f"**{escape_markdown(report.headline)}**", ""] if report.headline else []
    lines += _table(report.verdicts) if report.verdicts else []
    lines += [*(f"- {escape_markdown(sentence)}" for sentence in report.remarks), ""]
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
    for section in report.sections:
        for picture in _pictures(section.parts):
            stream = BytesIO()
            write_figure(Figure(picture.title, [Band(picture.charts, keys=picture.keys)]), stream, "png")
            images[f"{picture.key}.png"] = stream.getvalue()
    return images


def _pictures(parts: Sequence[Part]) -> Iterator[Picture]:
    """The pictures among some parts, with those that stand side by side."""
    for part in parts:
        if isinstance(part, Picture):
            yield part
        elif isinstance(part, PictureRow):
            yield from (picture for _, picture in part.pictures)
        elif isinstance(part, SideBySide):
            for _, inner in part.columns:
                yield from _pictures(inner)


def _part(part: Part, folder: str) -> list[str]:
    if isinstance(part, Paragraph):
        return [f"**{escape_markdown(part.text)}**" if part.warning else escape_markdown(part.text), ""]
    if isinstance(part, Notices):
        return _notices(part)
    if isinstance(part, PageTable):
        return _table(part)
    if isinstance(part, Picture):
        return [*_image(part, folder), *_caption(part, part.chance, part.remark)]
    if isinstance(part, PictureRow):
        lines = []
        for label, picture in part.pictures:
            own = picture.remark if part.chance else f"{picture.remark} Chance: {picture.chance}."
            lines += [f"{escape_markdown(label)}{': ' if own else ''}{escape_markdown(own)}", ""]
            lines += _image(picture, folder)
        return [*lines, *_caption(part.first, part.chance, "")]
    if isinstance(part, SideBySide):
        lines = []
        for label, inner in part.columns:
            lines += [f"### {escape_markdown(label)}", ""] if label else []
            for inner_part in inner:
                lines += _part(inner_part, folder)
        return lines
    return []  # a slider does not move in Markdown; the table of ranks has its numbers


def _image(picture: Picture, folder: str) -> list[str]:
    return [f"![{escape_markdown(picture.alt)}]({folder}/{picture.key}.png)", ""]


def _caption(picture: Picture, chance: str, remark: str) -> list[str]:
    by_chance = f"Chance: {chance}." if chance else ""
    caption = " ".join(filter(None, [picture.caption, remark, by_chance, f"Source: {picture.source}."]))
    return [f"*{escape_markdown(picture.title)}.* {escape_markdown(caption)}", ""]


def _notices(part: Notices) -> list[str]:
    lines = [] if part.notices else [escape_markdown(part.good)]
    for notice in part.notices:
        place = f" {escape_markdown(notice.place)}" if notice.place else ""
        lines.append(f"- **{notice.level}: {escape_markdown(notice.code)}**{place}")
        lines += _evidence(notice)
        for own in notice.each:
            lines += [f"  - {escape_markdown(own.place)}", *(f"  {line}" for line in _evidence(own))]
    return [*lines, ""]


def _evidence(notice: Notice) -> list[str]:
    lines = [f"  - {escape_markdown(evidence)}" for evidence in notice.evidence]
    if notice.fix:
        # Commands stay code: an escaped backslash or underscore would be copied with them.
        pieces = enumerate(code_pieces(" ".join(notice.fix.split())))
        fix = "".join(f"`{piece}`" if i % 2 else piece.translate(ESCAPES) for i, piece in pieces)
        lines.append(f"  - fix: {fix}")
    return lines


def _table(part: PageTable) -> list[str]:
    if not part.table.rows:
        return []
    columns = part.table.shown
    heads = [escape_markdown(column.title) or " " for column in columns]
    rules = [":--" if column.align == "left" else "--:" for column in columns]
    rows = [[escape_markdown(column.cell(row)) for column in columns] for row in part.table.rows]
    title = [f"**{escape_markdown(part.table.title)}**", ""] if part.table.title else []
    return [*title, *(f"| {' | '.join(cells)} |" for cells in (heads, rules, *rows)), ""]


def escape_markdown(text: str) -> str:
    """Text on one line in which nothing is markup, neither of Markdown nor of HTML."""
    return " ".join(text.split()).translate(ESCAPES)


def _code_block(text: str) -> list[str]:
    """A block of code, whose fence is longer than any run of backticks in it."""
    fence = "```"  # a command may itself hold backticks
    while fence in text:
        fence += "`"
    return [f"{fence}console", "$ " + " ".join(text.splitlines()), fence]
