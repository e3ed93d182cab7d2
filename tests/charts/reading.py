"""Reading charts back out of both renderers: limits, ticks, labels, colours and values, in one form."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log10
from xml.etree import ElementTree as ET

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from loralens.charts.palette import colours

COLOURS = colours("light")
SERIES = re.compile(r"^(?:c\d+|b\d+|quiet)$")
STEP = re.compile(r"^[sv]\d+$")


@dataclass
class Read:
    """What can be seen of a chart: places in numbers of its axes, or of cells in a map; colours as ``#rrggbb``."""

    title: str = ""
    labels: tuple[str, str] = ("", "")
    limits: list[float] = field(default_factory=list)
    log: bool = False
    x: list[tuple[float, str]] = field(default_factory=list)
    y: list[tuple[float, str]] = field(default_factory=list)
    lines: dict[str, tuple[str, list[tuple[float, float]]]] = field(default_factory=dict)
    levels: list[float] = field(default_factory=list)
    legend: list[str] = field(default_factory=list)
    cells: dict[tuple[int, int], str] = field(default_factory=dict)
    numbers: list[str] = field(default_factory=list)
    zeros: int = 0
    edges: int = 0
    bar: list[tuple[float, str]] = field(default_factory=list)
    bar_label: str = ""
    chance: list[float] = field(default_factory=list)


# ---------------------------------------------------------------- the page


def read_svg(text: str) -> Read:
    """A chart of lines, a map or φ(i, j) as the page has it."""
    root = ET.fromstring(text)
    kind = root.get("class")
    return {"lines": _svg_lines, "heat": _svg_heat, "phi": _svg_phi}[str(kind)](root)


def _texts(root: ET.Element, kind: str) -> list[ET.Element]:
    return [one for one in root.iter("text") if kind in str(one.get("class")).split()]


def _place(text: ET.Element) -> tuple[float, float]:
    if text.get("transform"):
        x, y = re.findall(r"translate\((\S+) (\S+?)\)", str(text.get("transform")))[0]
        return float(x), float(y)
    return float(str(text.get("x"))), float(str(text.get("y")))


def _paths(root: ET.Element, kind: str) -> list[list[float]]:
    paths = [str(one.get("d")) for one in root.iter("path") if one.get("class") == kind]
    return [[float(x) for x in re.findall(r"-?[\d.]+", d)] for d in paths]


def _svg_lines(root: ET.Element) -> Read:
    left, top, width, height, x0, x1, y0, y1 = map(float, str(root.get("data-frame")).split())
    log = "data-log" in root.attrib

    def x_of(place: float) -> float:
        return x0 + (place - left) / width * (x1 - x0)

    def y_of(place: float) -> float:
        share = 1 - (place - top) / height
        return 10 ** (log10(y0) + share * (log10(y1) - log10(y0))) if log else y0 + share * (y1 - y0)

    read = Read(limits=[x0, x1, y0, y1], log=log)
    read.title = "".join(str(one.text) for one in _texts(root, "head"))
    x_label, y_label = (str(one.text) for one in _texts(root, "mid") if "label" in str(one.get("class")))
    read.labels = x_label, y_label
    ticks = [x_of(path[0]) for path in _paths(root, "tick")]
    under = [
        one for one in root.iter("text") if _below(one, top + height) and one.get("class") in ("num mid", "small end")
    ]
    read.x = [(tick, str(text.text)) for tick, text in zip(ticks, under, strict=True)]
    beside = [one for one in _texts(root, "end") if one.get("x") and float(str(one.get("x"))) == left - 5]
    read.y = [(y_of(path[1]), str(text.text)) for path, text in zip(_paths(root, "grid"), beside, strict=True)]
    read.levels = [y_of(path[1]) for path in _paths(root, "level")]
    for group in root.iter("g"):
        name = group.get("data-n")
        if name is not None:
            read.lines[name] = _ink(group), _points(group)
    read.legend = [str(one.text) for one in _texts(root, "label") if one.get("x") == "80"]
    return read


def _below(text: ET.Element, bottom: float) -> bool:
    return bottom + 10 <= _place(text)[1] <= bottom + 16


def _ink(group: ET.Element) -> str:
    return next(COLOURS[one] for one in str(group.get("class")).split() if SERIES.match(one))


def _points(group: ET.Element) -> list[tuple[float, float]]:
    ys = [float(y) for y in str(group.get("data-y")).split()]
    xs = [float(x) for x in str(group.get("data-x")).split()] if group.get("data-x") else range(1, len(ys) + 1)
    return [(float(x), y) for x, y in zip(xs, ys, strict=True)]


def _svg_heat(root: ET.Element) -> Read:
    read = Read(title="".join(str(one.text) for one in _texts(root, "head")))
    rects = [one for one in root.iter("rect") if one.get("data-t") is not None or one.get("class") == "hole"]
    columns = sorted({float(str(one.get("x"))) for one in rects})
    rows = sorted({float(str(one.get("y"))) for one in rects})
    for one in rects:
        if one.get("data-t") is not None:
            place = rows.index(float(str(one.get("y")))), columns.index(float(str(one.get("x"))))
            read.cells[place] = COLOURS[str(one.get("class"))]
    read.numbers = [str(one.text) for one in _texts(root, "cell")]
    read.zeros, read.edges = len(_paths(root, "zero")), len(_paths(root, "edge"))
    wide, high = (_side(values) for values in (columns, rows))
    bottom = rows[-1] + high
    ends = [one for one in root.iter("text") if "end" in str(one.get("class")).split()]
    beside = [one for one in ends if not one.get("transform") and _place(one)[0] == round(columns[0] - 6, 1)]
    read.y = [(round((_place(one)[1] - 4 - rows[0]) / high - 0.5), str(one.text)) for one in beside]
    under = [
        one
        for one in root.iter("text")
        if one.get("class") in ("num mid", "num end") and bottom + 4 <= _place(one)[1] <= bottom + 14
    ]
    read.x = [(int((_place(one)[0] - columns[0]) / wide), str(one.text)) for one in under]
    _svg_bar(root, read)
    return read


def _side(values: Sequence[float]) -> float:
    return (values[-1] - values[0]) / (len(values) - 1) if len(values) > 1 else 18.0


def _svg_bar(root: ET.Element, read: Read) -> None:
    bar = next(one for one in root.iter("g") if one.get("class") == "bar")
    rects = list(bar)
    left, top = float(str(rects[0].get("x"))), float(str(rects[0].get("y")))
    width = float(str(rects[-1].get("x"))) + float(str(rects[-1].get("width"))) - left
    numbers = [one for one in root.iter("text") if abs(_place(one)[1] - top - 21) < 0.2]
    read.bar = [((_place(one)[0] - left) / width, str(one.text)) for one in numbers]
    read.bar_label = next(str(one.text) for one in root.iter("text") if abs(_place(one)[1] - top + 6) < 0.2)
    read.chance = [(path[0] - left) / width for path in _paths(root, "chance")]


def read_key(root: ET.Element) -> list[float]:
    """Places of the numbers and of chance on the colours that several charts share, in [0, 1]."""
    read = Read()
    _svg_bar(root, read)
    return [place for place, _ in read.bar] + read.chance


def _svg_phi(root: ET.Element) -> Read:
    read = Read(title="".join(str(one.text) for one in _texts(root, "head")))
    group = next(one for one in root.iter("g") if one.get("data-phi"))
    for path in group:
        for j, i, length in re.findall(r"M(\d+) (\d+)h(\d+)", str(path.get("d"))):
            for step in range(int(length)):
                read.cells[int(i), int(j) + step] = COLOURS[str(path.get("class"))]
    read.labels = "", "\n".join(str(one.text) for one in root.iter("text") if one.get("class") == "num")
    left, top, wide, high = map(float, re.findall(r"[\d.]+", str(group.get("transform"))))
    read.y = [(round((_place(one)[1] - 3.5 - top) / high + 0.5, 1), str(one.text)) for one in _texts(root, "end")]
    read.x = [(round((_place(one)[0] - left) / wide + 0.5, 1), str(one.text)) for one in _texts(root, "mid")]
    return read


# ---------------------------------------------------------------- matplotlib


def panels(figure: Figure) -> list[Axes]:
    """The axes of charts, without those of trees and keys."""
    return [axes for axes in figure.axes if not str(axes.get_label()).startswith("<")]


def read_axes(axes: Axes, bar: Axes | None = None) -> Read:
    """The same of axes of matplotlib; ``bar`` are those of their colours."""
    read = Read(title=axes.get_title(loc="left"))
    if (axes.collections and not axes.lines and not axes.images) or bar is not None:
        _mpl_heat(axes, read)
    elif axes.images:
        _mpl_phi(axes, read)
    else:
        _mpl_lines(axes, read)
    if bar is not None:
        low, high = bar.get_xlim()
        labels = [one.get_text() for one in bar.get_xticklabels()]
        read.bar = [((x - low) / (high - low), text) for x, text in zip(bar.get_xticks(), labels, strict=True)]
        read.bar_label = bar.get_title(loc="left")
        read.chance = [(one.get_xdata()[0] - low) / (high - low) for one in bar.lines]  # type: ignore[index, operator]
    return read


def read_bar(bar: Axes) -> list[float]:
    """The same of the axes of a colour bar."""
    low, high = bar.get_xlim()
    marks = [*bar.get_xticks(), *(line.get_xdata()[0] for line in bar.lines)]  # type: ignore[index]
    return [(x - low) / (high - low) for x in marks]


def _ticks(places: Sequence[float], labels: Sequence[object]) -> list[tuple[float, str]]:
    return [(float(x), one.get_text()) for x, one in zip(places, labels, strict=True)]  # type: ignore[attr-defined]


def _mpl_lines(axes: Axes, read: Read) -> None:
    read.labels = axes.get_xlabel(), axes.get_ylabel()
    read.limits, read.log = [*axes.get_xlim(), *axes.get_ylim()], axes.get_yscale() == "log"
    read.x = _ticks(axes.get_xticks(), axes.get_xticklabels())
    read.y = _ticks(axes.get_yticks(), axes.get_yticklabels())
    for line in axes.lines:
        points = [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        name = str(line.get_label())
        if name.startswith("_child"):
            read.levels.append(points[0][1])
        elif points:
            read.lines[name] = to_hex(line.get_color()), points
    legend = axes.get_legend()
    read.legend = [one.get_text() for one in legend.get_texts()] if legend else []


def _mpl_heat(axes: Axes, read: Read) -> None:
    mesh = axes.collections[0]
    values = np.ma.masked_invalid(mesh.get_array())  # type: ignore[no-untyped-call]
    for place in np.argwhere(~np.ma.getmaskarray(values)):
        read.cells[int(place[0]), int(place[1])] = to_hex(mesh.to_rgba(values[tuple(place)]))  # type: ignore[arg-type]
    read.numbers = [one.get_text() for one in axes.texts]
    crosses = [line for line in axes.lines if line.get_label() == "ΔW = 0"]
    read.zeros = sum(len(np.asarray(line.get_xydata())) for line in crosses)
    read.edges = len(axes.lines) - len(crosses)
    read.x = [(x - 0.5, text) for x, text in _ticks(axes.get_xticks(), axes.get_xticklabels())]
    read.y = [(y - 0.5, text) for y, text in _ticks(axes.get_yticks(), axes.get_yticklabels())]


def _mpl_phi(axes: Axes, read: Read) -> None:
    image = axes.images[0]
    values = np.asarray(image.get_array())
    for (i, j), value in np.ndenumerate(values):
        read.cells[i, j] = to_hex(image.to_rgba(value))  # type: ignore[arg-type]
    x0, x1, y1, y0 = image.get_extent()
    down, across = (count / (end - start) for count, start, end in zip(values.shape, (y0, x0), (y1, x1), strict=True))
    read.x = [((x - x0) * across + 0.5, text) for x, text in _ticks(axes.get_xticks(), axes.get_xticklabels())]
    read.y = [((y - y0) * down + 0.5, text) for y, text in _ticks(axes.get_yticks(), axes.get_yticklabels())]
