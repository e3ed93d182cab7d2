"""Sections, paragraphs, findings, pictures and sliders as HTML."""

from collections.abc import Iterator

from markupsafe import Markup

from loralens.charts.spec import Chart, HeatMap, LineChart
from loralens.charts.svg import heat_svg, key_svg, lines_svg, overlaps_svg
from loralens.reporting.document import (
    Notice,
    Notices,
    PageTable,
    Paragraph,
    Part,
    Picture,
    PictureRow,
    Section,
    SideBySide,
    Slider,
    code_pieces,
)
from loralens.reporting.page.patterns import fill, join_units
from loralens.reporting.page.tables import table_html

# The class of a slider, its title, and the word before its value.
SLIDERS = (
    ("rank", "One rank for all modules", "rank"),
    ("budget", "A budget for all modules, with the ranks of least error", ""),
)


def section_html(section: Section) -> Iterator[str]:
    """A section in pieces."""
    yield fill('\n<section id="{section.key}"><h2>{section.title}</h2>', section=section)
    if section.lead:
        yield fill('<p class="lead">{lead}</p>', lead=join_units(section.lead))
    for part in section.parts:
        yield from part_html(part)
    yield "</section>"


def part_html(part: Part) -> Iterator[str]:
    """A part of a section in pieces."""
    match part:
        case Paragraph():
            kind = "text warned" if part.warning else "text"
            yield fill('<p class="{kind}">{text}</p>', kind=kind, text=join_units(part.text))
        case PageTable():
            yield from table_html(part)
        case Picture():
            yield from _picture(part)
        case PictureRow():
            yield from _picture_row(part)
        case Notices():
            yield from _notices(part)
        case Slider():
            yield from _slider(part)
        case SideBySide():
            yield f'<div class="beside{" stacked" if part.stacked else ""}">'
            for label, inner in part.columns:
                yield "<div>"
                if label:
                    yield fill('<p class="tag">{label}</p>', label=label)
                for inner_part in inner:
                    yield from part_html(inner_part)
                yield "</div>"
            yield "</div>"


def _notices(part: Notices) -> Iterator[str]:
    if not part.notices:
        yield fill('<p class="good">{text}</p>', text=part.good)
    yield '\n<div class="notices">'
    for notice in part.notices:
        yield fill('\n<div class="notice {it.level}"><p><span class="level">{it.level}</span> ', it=notice)
        yield fill("<code>{code}</code>", code=notice.code)
        if notice.place:
            yield fill(' <span class="place">{place}</span>', place=notice.place)
        yield "</p>"
        yield from _evidence(notice)
        for own in notice.each:
            yield fill('<div class="own"><p class="place">{place}</p>', place=own.place)
            yield from _evidence(own)
            yield "</div>"
        yield "</div>"
    yield "\n</div>"


def _evidence(notice: Notice) -> Iterator[str]:
    for evidence in notice.evidence:
        yield fill("<p>{evidence}</p>", evidence=evidence)
    if notice.fix:
        # The pieces between two backticks are commands.
        pieces = enumerate(code_pieces(notice.fix))
        texts = (fill("<code>{text}</code>" if i % 2 else "{text}", text=text) for i, text in pieces)
        yield fill('<p class="fix">Fix: {fix}</p>', fix=Markup("").join(texts))


def _slider(slider: Slider) -> Iterator[str]:
    yield fill('\n<div class="slider" data-adapter="{adapter}" hidden>', adapter=slider.adapter)
    for name, title, unit in SLIDERS:
        yield fill(
            '\n<div class="{name}"><label>{title}: {unit} <span class="value"></span>'
            '<input class="{name}" type="range" min="0" step="1" aria-label="{title}, {label}"></label>\n',
            name=name,
            title=title,
            unit=unit,
            label=slider.label,
        )
        facts = (
            ("error", "error"),
            (slider.share, "kept"),
            ("file", "bytes"),
            ("of its present size", "now"),
            ("with", "ranks"),
        )
        yield "<dl>"
        for term, kind in facts:
            yield fill('<div><dt>{term}</dt><dd class="{kind}"></dd></div>', term=term, kind=kind)
        yield "</dl></div>"
    yield '\n<code class="command"></code></div>'


def _picture(picture: Picture) -> Iterator[str]:
    if picture.folded:
        yield fill("<details><summary>{title}</summary>", title=picture.title)
    yield fill('\n<figure id="{picture.key}"><h3>{picture.title}</h3>', picture=picture)
    yield from _charts(picture)
    yield _caption(picture, picture.chance, picture.remark)
    yield "</figure>"
    if picture.folded:
        yield "</details>"


def _picture_row(row: PictureRow) -> Iterator[str]:
    kind = "row stacked" if row.stacked else "row"
    yield fill('<figure class="{kind}"><h3>{title}</h3><div class="beside">', kind=kind, title=row.first.title)
    for label, own in row.pictures:
        yield fill('<div id="{key}" class="panel"><p class="tag">{label}</p>', key=own.key, label=label)
        yield from _charts(own)
        if own.remark or not row.chance:
            yield fill('<p class="remark">{remark}', remark=join_units(own.remark))
            if not row.chance:
                yield fill(" <b>Chance:</b> {chance}.", chance=join_units(own.chance))
            yield "</p>"
        yield "</div>"
    yield "</div>\n"
    yield _caption(row.first, row.chance, "")
    yield "</figure>"


def _caption(picture: Picture, chance: str, remark: str) -> str:
    pieces = [fill("<figcaption>{caption}", caption=join_units(picture.caption))]
    if remark:
        pieces.append(fill(" {remark}", remark=join_units(remark)))
    if chance:
        pieces.append(fill(" <b>Chance:</b> {chance}.", chance=join_units(chance)))
    pieces.append(fill(" <b>Source:</b> {source}.</figcaption>", source=picture.source))
    return "".join(pieces)


def _charts(picture: Picture) -> Iterator[str]:
    charts = picture.charts
    yield f'<div class="charts{" many" if charts and isinstance(charts[0], LineChart) else ""}">'
    for chart in charts:
        yield from _draw(chart, picture.alt, len(charts))
    yield "</div>"
    if picture.keys:
        yield '<div class="keys">'
        for key in picture.keys:
            yield from key_svg(key)
        yield "</div>"


def _draw(chart: Chart, alt: str, count: int) -> Iterator[str]:
    """A chart in pieces, because a map of many modules with long names is larger than the adapter.

    Texts are escaped where the pieces are made.
    """
    if isinstance(chart, LineChart):
        # A chart that is alone in its picture has the width of the page, and room for long names in its legend.
        return lines_svg(chart, f"{chart.title}. {alt}" if chart.title else alt, alone=count == 1)
    if isinstance(chart, HeatMap):
        return heat_svg(chart, f"{chart.title}. {alt}" if chart.title else alt)
    # There are many maps of φ in one picture, so each is described by its own numbers and not by the caption.
    return overlaps_svg(chart, f"{chart.title}: {', '.join(chart.notes)}")
