"""The verb ``survey``: lists the adapters under a folder, and names duplicates."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.analysis.survey import Duplicate, Summary, duplicates, summarise_adapter
from loralens.core.adapter import Adapter
from loralens.core.progress import progress
from loralens.core.threads import processor_count
from loralens.errors import LoraLensError
from loralens.formats.records.collection import (
    FolderEntry,
    candidates,
    examine_file,
    folder_labels,
    note_repeated_links,
)
from loralens.tables.numbers import UNDEFINED, count, fixed, number, size, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.bases import note_of_bases

OTHERS_NAMED = 3  # files without LoRA pairs that a sentence names; --json lists all of them


@dataclass(frozen=True, slots=True)
class SurveyedAdapter:
    """One row: an adapter with its summary, or a file that should be an adapter and cannot be read.

    Attributes
    ----------
    path : Path
        The file, or a folder that has a configuration without weights.
    label : str
        The name in the table, relative to the folder of the survey: the folder of the adapter if it holds no other one.
    size : int
        Bytes on disk.
    adapter : Adapter or None
        None if it cannot be read.
    duplicate : Duplicate or None
        In which way it equals an adapter that comes before it.
    original : SurveyedAdapter or None
        The adapter that it equals.
    reason, fix : str
        Why it cannot be read, and what the user can do.
    """

    path: Path
    label: str
    size: int
    adapter: Adapter | None = None
    summary: Summary | None = None
    duplicate: Duplicate | None = None
    original: "SurveyedAdapter | None" = None
    reason: str = ""
    fix: str = ""

    @property
    def note(self) -> str:
        """The original of a copy; of other adapters the findings of level error."""
        if self.duplicate and self.original:
            # The signs that docs and people know: the same numbers, or the same ΔW up to rounding.
            if self.duplicate.kind == "tensors":
                return f"= {self.original.label}"
            difference = f" (ΔW differs by {self.duplicate.difference:.1g})" if self.duplicate.difference else ""
            return f"≈ {self.original.label}{difference}"
        findings = self.adapter.findings if self.adapter else ()
        # Warnings and notes would fill the column; inspect shows them.
        wrong = [finding.code for finding in findings if finding.level == "error"]
        return f"wrong: {', '.join(wrong)}" if wrong else ""


@dataclass(frozen=True, slots=True)
class SurveyResult(Tabular):
    """The adapters under a folder, in order of paths; the result is a sequence of them.

    Attributes
    ----------
    unreadable : sequence of SurveyedAdapter
        Files that should be adapters and cannot be read, each with the reason.
    without_pairs : sequence of FolderEntry
        Files that hold tensors and no LoRA pairs: models, for example.
    """

    folder: Path
    adapters: Sequence[SurveyedAdapter]
    unreadable: Sequence[SurveyedAdapter]
    without_pairs: Sequence[FolderEntry]

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, index: int) -> SurveyedAdapter:
        return self.adapters[index]

    def __repr__(self) -> str:
        return f"SurveyResult({str(self.folder)!r}, {count(len(self.adapters), 'adapter')})"

    def tables(self) -> list[Table[SurveyedAdapter]]:
        """The adapters, and the files that cannot be read."""
        # In a folder without copies and faults the column would be empty.
        notes = (NOTE,) if any(row.note for row in self.adapters) else ()
        return [
            Table(str(self.folder), (LABEL, *COLUMNS, *notes), self.adapters),
            Table("cannot be read", (LABEL, REASON), self.unreadable),
        ]

    def conclusion(self) -> list[str]:
        """How many adapters there are, how many of them are copies or have faults, and how many cannot be read."""
        # Without a table an empty answer would look like a failure.
        if not (self.adapters or self.unreadable or self.without_pairs):
            return [f"{self.folder}: no adapter in this folder, nor in any under it."]
        copies = sum(row.original is not None for row in self.adapters)
        wrong = sum(row.note.startswith("wrong") for row in self.adapters)
        parts = [count(len(self.adapters), "adapter")]
        # A count of 0 is left out, except that of copies, because this command is asked about copies.
        if len(self.adapters) > 1:
            parts.append(f"{copies} of them the same as another" if copies else "all of them different")
        parts += [f"{wrong} with wrong numbers"] if wrong else []
        parts += [f"{count(len(self.unreadable), 'file')} that cannot be read"] if self.unreadable else []
        return [f"{self.folder}: {', '.join(parts)}."]

    def listing(self) -> list[Table[SurveyedAdapter]]:
        """The adapters and then the files that cannot be read, one file a row."""
        return [Table("adapters", COLUMNS, [*self.adapters, *self.unreadable])]

    def sentences(self) -> list[str]:
        """How to read the pickles, and which other tensor files lie under the folder."""
        sentences = []
        # One sentence instead of the same remedy in every row.
        pickles = sum("--allow-pickle" in row.fix for row in self.unreadable)
        if pickles:
            are = "is a pickle" if pickles == 1 else "are pickles"
            sentences += [f"{pickles} of them {are}: give --allow-pickle", ""]
        if self.without_pairs:
            total = size(sum(file.size for file in self.without_pairs))
            # Counted and not listed, as the files of models would hide the adapters.
            hold = "holds" if len(self.without_pairs) == 1 else "hold"
            names = ", ".join(str(file.path.relative_to(self.folder)) for file in self.without_pairs[:OTHERS_NAMED])
            ellipsis = " …" if len(self.without_pairs) > OTHERS_NAMED else ""
            files = f"{count(len(self.without_pairs), 'file')} of {total}"
            sentences.append(f"no adapters: {files} {hold} tensors and no LoRA pairs: {names}{ellipsis}")
        return sentences

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "folder": str(self.folder),
            "adapters": Table("adapters", COLUMNS, self.adapters).records(),
            "unreadable": [{"path": str(row.path), "reason": row.reason, "fix": row.fix} for row in self.unreadable],
            "no_adapters": [
                {"path": str(file.path), "bytes": file.size, "reason": file.reason} for file in self.without_pairs
            ],
        }


def _summary_column(key: str, title: str = "", *, name: str = "", **options: Any) -> Column[SurveyedAdapter]:
    """A column of a field of the summary; empty for a file that has none."""
    return Column(key, lambda row: getattr(row.summary, name or key, None), title, **options)


def _modules_text(row: SurveyedAdapter) -> str | None:
    summary = row.summary
    return summary and f"{summary.modules}" + (f" ({summary.zero} zero)" if summary.zero else "")


def _scales_text(scales: Sequence[float]) -> str:
    """The smallest and the largest of increasing scales: ``2``, or ``0.5–2``."""
    return "–".join(number(scale) for scale in dict.fromkeys((*scales[:1], *scales[-1:]))) or UNDEFINED


def _base_name(name: str | None) -> str:
    """The last part of a base model's name or path; paths of Windows are recognised on any system."""
    return (name or UNDEFINED).replace("\\", "/").rstrip("/").rpartition("/")[2]


LABEL: Column[SurveyedAdapter] = Column("label", lambda row: row.label, "path", align="left", priority=ALWAYS)
REASON: Column[SurveyedAdapter] = Column("reason", lambda row: row.reason, "reason", align="left", priority=ALWAYS)
NOTE: Column[SurveyedAdapter] = Column("note", lambda row: row.note, "note", align="left", priority=8)
# On a narrow terminal the fingerprint and the scale are left out first: size, ranks, norm and notes tell most adapters
# apart.
COLUMNS: tuple[Column[SurveyedAdapter], ...] = (
    Column("path", lambda row: str(row.path)),
    Column("format", lambda row: row.adapter and row.adapter.format, "format", align="left", priority=3),
    Column(
        "base_model", lambda row: row.adapter and row.adapter.base_model, "base", _base_name, align="left", priority=4
    ),
    _summary_column("modules"),
    # One column for people instead of two, as modules with ΔW = 0 are rare.
    Column("modules_and_zeros", _modules_text, "modules", priority=4, json=False, csv=False),
    _summary_column("zero_modules", name="zero"),
    Column("ranks", lambda row: row.summary and list(row.summary.ranks), "r", span, priority=8),
    Column(
        "scales",
        lambda row: row.summary and list(row.summary.scales),
        "scale",
        _scales_text,
        priority=2,
        about="the number before B·A",
    ),
    _summary_column("parameters", "parameters", text="{:,}".format, priority=5),
    Column("bytes", lambda row: row.size if row.adapter else None, "size", size, priority=6),
    _summary_column("frobenius", "‖ΔW‖F", text=number, priority=ALWAYS, about="length of ΔW"),
    _summary_column(
        "effective_rank", "effective", text=fixed(".2f"), priority=7, about="effective rank, mean over modules"
    ),
    # Twelve hexadecimal digits are 48 bits, enough to tell the adapters of a folder apart by eye.
    _summary_column(
        "fingerprint", "fingerprint", text=lambda text: text[:12], align="left", priority=1, about="hash of the content"
    ),
    Column("duplicate_of", lambda row: str(row.original.path) if row.original else None),
    Column("duplicate_kind", lambda row: row.duplicate and row.duplicate.kind),
    Column("duplicate_difference", lambda row: row.duplicate and row.duplicate.difference),
    # JSON has the whole findings; a cell of CSV holds their codes.
    Column("findings", lambda row: [f.record() for f in row.adapter.findings] if row.adapter else [], csv=False),
    Column("findings", lambda row: " ".join(f.code for f in row.adapter.findings) if row.adapter else "", json=False),
    Column("reason", lambda row: row.reason, json=False),
)


def survey(folder: str | PathLike[str], *, allow_pickle: bool = False, once: bool = False) -> SurveyResult:
    """List the adapters under a folder: format, base, ranks, norms, effective rank, fingerprint, duplicates.

    A file that should be an adapter and cannot be read is listed with the reason. Whole models are recognised by their
    headers, and only counted.

    Parameters
    ----------
    folder : path
        The folder; its subfolders are searched too.
    allow_pickle : bool
        Read ``.bin`` and ``.pt`` files, with an unpickler that builds nothing but tensors.
    once : bool
        Add the update of the ``out_proj`` of an `nn.MultiheadAttention` once; PEFT adds it twice.

    Raises
    ------
    OptionError
        ``folder`` is not a folder.
    """
    root = Path(folder)

    def measure(path: Path) -> tuple[FolderEntry, Summary | None]:
        file = examine_file(path, allow_pickle=allow_pickle, once=once)
        if file.adapter is None:
            return file, None
        try:
            return file, summarise_adapter(file.adapter)
        except LoraLensError as error:
            # A header that can be read promises nothing about the numbers behind it.
            reason = ": ".join((*error.where, error.what))
            return replace(file, adapter=None, status="unreadable", reason=reason, fix=error.fix), None

    paths = candidates(root)
    note_repeated_links(root, paths)
    measured = []
    # One file a thread: most adapters are small, and reading overlaps with the arithmetic of others.
    with progress("reading", len(paths)) as step, ThreadPoolExecutor(processor_count()) as pool:
        try:
            for pair in pool.map(measure, paths):
                measured.append(pair)
                if step:
                    step(1)
        finally:  # after Ctrl-C, files that are not being read yet are not read at all
            pool.shutdown(cancel_futures=True)
    result = _summarise(root, measured)
    # Several bases are not a fault of a collection, but only adapters of one base can be compared.
    note_of_bases([row.adapter for row in result.adapters if row.adapter])
    return result


def _summarise(root: Path, measured: Sequence[tuple[FolderEntry, Summary | None]]) -> SurveyResult:
    """The rows of the survey, with the duplicates among them."""
    readable = [(file, adapter, summary) for file, summary in measured if summary and (adapter := file.adapter)]
    unreadable = [file for file, _ in measured if file.status == "unreadable"]
    copies = duplicates([adapter for _, adapter, _ in readable], [summary for _, _, summary in readable])
    by_index = {copy.index: copy for copy in copies}
    label = folder_labels(root, [*(file.path for file, _, _ in readable), *(file.path for file in unreadable)])
    rows: list[SurveyedAdapter] = []
    for i, (file, adapter, summary) in enumerate(readable):
        copy = by_index.get(i)
        original = rows[copy.original] if copy else None  # which comes before its copies, so its row is there
        rows.append(SurveyedAdapter(file.path, label[file.path], file.size, adapter, summary, copy, original))
    failed = [
        SurveyedAdapter(file.path, label[file.path], file.size, reason=file.reason, fix=file.fix) for file in unreadable
    ]
    return SurveyResult(root, rows, failed, [file for file, _ in measured if file.status == "other"])
