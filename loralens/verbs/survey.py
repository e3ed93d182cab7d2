"""The verb ``survey``: lists the adapters under a folder, and names duplicates."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike, cpu_count
from pathlib import Path
from typing import Any

from loralens.analysis.survey import Duplicate, Summary, duplicates, summarise_adapter
from loralens.core.adapter import Adapter
from loralens.core.progress import progress
from loralens.errors import LoraLensError
from loralens.formats.records.collection import FolderEntry, candidates, examine_file
from loralens.tables.numbers import count, fixed, number, size
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.bases import note_of_bases

OTHERS_NAMED = 3  # files without LoRA pairs that a sentence names before it counts the others


@dataclass(frozen=True, slots=True)
class SurveyedAdapter:
    """One row: an adapter in a line, or what should be one and cannot be read.

    Attributes
    ----------
    path : Path
        The file, or the folder whose configuration has no weights beside it.
    label : str
        What the table calls it: the folder where it is alone in it, relative to the folder of the survey.
    size : int
        Bytes on disk.
    adapter : Adapter or None
        None where it cannot be read.
    duplicate : Duplicate or None
        How it equals an adapter that comes before it.
    original : SurveyedAdapter or None
        That adapter.
    reason, fix : str
        Why it cannot be read.
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
        """Whose copy it is, else what its reader found wrong."""
        if self.duplicate and self.original:
            if self.duplicate.kind == "tensors":
                return f"= {self.original.label}"
            return f"≈ {self.original.label} (ΔW differs by {self.duplicate.difference:.1g})"
        findings = self.adapter.findings if self.adapter else ()
        wrong = [finding.code for finding in findings if finding.level == "error"]
        return f"wrong: {', '.join(wrong)}" if wrong else ""


@dataclass(frozen=True, slots=True)
class SurveyResult(Tabular):
    """The adapters under a folder.

    Iteration is over the adapters.

    Attributes
    ----------
    adapters : sequence of SurveyedAdapter
        In order of paths.
    unreadable : sequence of SurveyedAdapter
        What should be an adapter and cannot be read, with the reason.
    without_pairs : sequence of Found
        Files that hold tensors and no LoRA pairs.
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
        """The adapters, and what cannot be read."""
        distinct = sum(row.original is None for row in self.adapters)
        title = f"{self.folder}: {count(len(self.adapters), 'adapter')}, {distinct} of them different"
        notes = (NOTE,) if any(row.note for row in self.adapters) else ()
        return [
            Table(title, (LABEL, *COLUMNS, *notes), self.adapters),
            Table(f"{len(self.unreadable)} cannot be read", (LABEL, REASON), self.unreadable),
        ]

    def listing(self) -> list[Table[SurveyedAdapter]]:
        """The adapters, then what cannot be read, one a row."""
        return [Table("adapters", COLUMNS, [*self.adapters, *self.unreadable])]

    def sentences(self) -> list[str]:
        """What is to be done with pickles, and what else lies there."""
        sentences = []
        pickles = sum("--allow-pickle" in row.fix for row in self.unreadable)
        if pickles:
            sentences += [
                f"{pickles} of them {'is a pickle' if pickles == 1 else 'are pickles'}: give --allow-pickle",
                "",
            ]
        if self.without_pairs:
            names = [str(other.path.relative_to(self.folder)) for other in self.without_pairs[:OTHERS_NAMED]]
            ellipsis = " …" if len(self.without_pairs) > OTHERS_NAMED else ""
            files = (
                f"{count(len(self.without_pairs), 'file')} of {size(sum(other.size for other in self.without_pairs))}"
            )
            hold = "holds" if len(self.without_pairs) == 1 else "hold"
            sentences.append(f"no adapters: {files} {hold} tensors and no LoRA pairs: {', '.join(names)}{ellipsis}")
        if not (self.adapters or self.unreadable or self.without_pairs):
            sentences.append(f"{self.folder}: no adapter in this folder, nor in any under it")
        return sentences

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "folder": str(self.folder),
            "adapters": Table("adapters", COLUMNS, self.adapters).records(),
            "unreadable": [{"path": str(row.path), "reason": row.reason, "fix": row.fix} for row in self.unreadable],
            "no_adapters": [
                {"path": str(other.path), "bytes": other.size, "reason": other.reason} for other in self.without_pairs
            ],
        }


def _summary_column(key: str, title: str = "", *, name: str = "", **options: Any) -> Column[SurveyedAdapter]:
    """A column of a field of the summary."""
    return Column(key, lambda row: getattr(row.summary, name or key, None), title, **options)


def _modules_text(summary: Summary) -> str:
    return f"{summary.modules}" + (f" ({summary.zero} zero)" if summary.zero else "")


def _span(text: Callable[[float], str]) -> Callable[[Sequence[float] | None], str]:
    """A function that writes the ends of rising values."""

    def write(values: Sequence[float] | None) -> str:
        if not values:
            return "–"
        return text(values[0]) if len(values) == 1 else f"{text(values[0])}–{text(values[-1])}"

    return write


def _base_name(name: str | None) -> str:
    """The last part of a base model's name or path, those of Windows included."""
    return (name or "–").replace("\\", "/").rstrip("/").rpartition("/")[2]


LABEL: Column[SurveyedAdapter] = Column("label", lambda row: row.label, "path", align="left", priority=ALWAYS)
REASON: Column[SurveyedAdapter] = Column("reason", lambda row: row.reason, "reason", align="left", priority=ALWAYS)
NOTE: Column[SurveyedAdapter] = Column("note", lambda row: row.note, "note", align="left", priority=8)
COLUMNS: tuple[Column[SurveyedAdapter], ...] = (
    Column("path", lambda row: str(row.path)),
    Column("format", lambda row: row.adapter and row.adapter.format, "format", align="left", priority=3),
    Column(
        "base_model", lambda row: row.adapter and row.adapter.base_model, "base", _base_name, align="left", priority=4
    ),
    _summary_column("modules"),
    Column(
        "modules_and_zeros",
        lambda row: (
            row.summary and f"{row.summary.modules}" + (f" ({row.summary.zero} zero)" if row.summary.zero else "")
        ),
        "modules",
        priority=4,
        json=False,
        csv=False,
    ),
    _summary_column("zero_modules", name="zero"),
    Column("ranks", lambda row: row.summary and list(row.summary.ranks), "r", _span(str), priority=8),
    Column("scales", lambda row: row.summary and list(row.summary.scales), "scale", _span(number), priority=2),
    _summary_column("parameters", "parameters", text="{:,}".format, priority=5),
    Column("bytes", lambda row: row.size if row.adapter else None, "size", size, priority=6),
    _summary_column("frobenius", "‖ΔW‖F", text=number, priority=ALWAYS),
    _summary_column("effective_rank", "effective", text=fixed(".2f"), priority=7),
    _summary_column("fingerprint", "fingerprint", text=lambda text: text[:12], align="left", priority=1),
    Column("duplicate_of", lambda row: str(row.original.path) if row.original else None),
    Column("duplicate_kind", lambda row: row.duplicate and row.duplicate.kind),
    Column("duplicate_difference", lambda row: row.duplicate and row.duplicate.difference),
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
    allow_pickle : bool
        Read ``.bin`` and ``.pt`` files, with an unpickler that builds nothing but tensors.
    once : bool
        Add the update of the ``out_proj`` of an `nn.MultiheadAttention` once; PEFT adds it twice.

    Raises
    ------
    OptionError
        It is no folder.
    """
    root = Path(folder)

    def measure(path: Path) -> tuple[FolderEntry, Summary | None]:
        file = examine_file(path, allow_pickle=allow_pickle, once=once)
        if file.adapter is None:
            return file, None
        try:
            return file, summarise_adapter(file.adapter)
        except LoraLensError as error:
            return FolderEntry(
                path, None, file.size, "unreadable", ": ".join((*error.where, error.what)), error.fix
            ), None

    paths = candidates(root)
    measured = []
    with progress("reading", len(paths)) as step, ThreadPoolExecutor(cpu_count() or 1) as pool:
        try:
            for pair in pool.map(measure, paths):
                measured.append(pair)
                if step:
                    step(1)
        finally:  # after Ctrl-C what has not begun never begins
            pool.shutdown(cancel_futures=True)
    result = _read_all(root, measured)
    note_of_bases([row.adapter for row in result.adapters if row.adapter])
    return result


def _read_all(root: Path, measured: Sequence[tuple[FolderEntry, Summary | None]]) -> SurveyResult:
    """What was measured as rows, the copies among them found."""
    readable = [(file, adapter, line) for file, line in measured if line and (adapter := file.adapter)]
    unreadable = [file for file, line in measured if line is None and file.status == "unreadable"]
    without_pairs = [file for file, line in measured if line is None and file.status == "other"]
    copies = duplicates([adapter for _, adapter, _ in readable], [line for _, _, line in readable])
    by_index = {copy.index: copy for copy in copies}
    label = _labels(root, [*(file.path for file, _, _ in readable), *(file.path for file in unreadable)])
    rows: list[SurveyedAdapter] = []
    for i, (file, adapter, line) in enumerate(readable):  # an original comes before its copies
        copy = by_index.get(i)
        original = rows[copy.original] if copy else None
        rows.append(SurveyedAdapter(file.path, label[file.path], file.size, adapter, line, copy, original))
    failed = [
        SurveyedAdapter(file.path, label[file.path], file.size, reason=file.reason, fix=file.fix) for file in unreadable
    ]
    return SurveyResult(root, rows, failed, without_pairs)


def _labels(root: Path, paths: Sequence[Path]) -> Mapping[Path, str]:
    """What files are called: by their folder where they are alone in it, both relative to ``root``."""
    alone = {parent for parent, files in Counter(path.parent for path in paths).items() if files == 1}
    return {
        path: str((path.parent if path.parent in alone and path.parent != root else path).relative_to(root))
        for path in paths
    }
