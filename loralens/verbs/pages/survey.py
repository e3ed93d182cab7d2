"""The verb ``survey``: lists the adapters under a folder, and names duplicates; a view of the index of a fleet."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loralens.analysis.equality import differences
from loralens.core.adapter import Adapter, Finding
from loralens.errors import LoraLensError, OptionError
from loralens.fleet.catalogue import CATALOGUE, NON_FINITE, OF_INDEX, UNREACHABLE, Member, reading_setting
from loralens.fleet.likeness import Sameness
from loralens.formats import load
from loralens.formats.records.collection import FolderEntry, folder_labels
from loralens.tables.numbers import UNDEFINED, count, fixed, number, size, span
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.fleets.fleet_verbs import Fleet
from loralens.verbs.fleets.group_answers import CopiesResult
from loralens.verbs.shared.adapters import note_of_bases

OTHERS_NAMED = 3  # files without LoRA pairs that a sentence names; --json lists all of them
SPOILT_EXTRA = Finding(
    "error",
    NON_FINITE,
    "a head or another tensor that belongs to no pair holds NaN or Inf",
    "training diverged: go back to an earlier checkpoint",
)


@dataclass(frozen=True, slots=True)
class SurveyedAdapter:
    """One row: an adapter with its summary, or a file that should be an adapter and cannot be read.

    Attributes
    ----------
    path : Path
        The file, or a folder that has a configuration without weights.
    label : str
        The name in the table, relative to the folder of the survey: the folder of the adapter if it holds no other one.
    bytes : int
        Bytes on disk.
    member : Member or None
        What the index has of it; None if it cannot be read.
    duplicate : Sameness or None
        In which way it is a copy of an adapter that comes before it, as `Fleet.copies` finds it.
    original : SurveyedAdapter or None
        The adapter of which it is a copy.
    same_file_as : SurveyedAdapter or None
        Another adapter whose file this path leads to, through a link; such a path is not a copy.
    reason, fix : str
        Why it cannot be read, and what the user can do.
    """

    path: Path
    label: str
    bytes: int
    member: Member | None = None
    duplicate: Sameness | None = None
    original: "SurveyedAdapter | None" = None
    same_file_as: "SurveyedAdapter | None" = None
    reason: str = ""
    fix: str = ""
    reading: Callable[[Path], Adapter] | None = None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, whose numbers are read on demand; None if it cannot be read."""
        # The path of the index, which stays right if the current folder changes.
        return self.reading(self.member.path) if self.reading and self.member else None

    @property
    def findings(self) -> Sequence[Finding]:
        """The findings of the reader, and NaN in tensors that belong to no pair."""
        codes = set(self.member.findings) if self.member else set()
        # The index has the codes. Only files with a finding are opened again.
        of_reader = self.adapter.findings if codes - OF_INDEX and self.adapter else ()
        return [*([SPOILT_EXTRA] if NON_FINITE in codes else []), *of_reader]

    @property
    def note(self) -> str:
        """The original of a copy; of other adapters the findings of level error."""
        if self.duplicate and self.original:
            # The signs that docs and people know: the same numbers, or the same ΔW up to rounding.
            if self.duplicate.kind == "tensors":
                return f"= {self.original.label}"
            difference = f" (ΔW differs by {self.duplicate.difference:.1g})" if self.duplicate.difference else ""
            return f"≈ {self.original.label}{difference}"
        if self.same_file_as:
            return f"same file as {self.same_file_as.label}"
        # Warnings and notes would fill the column; inspect shows them.
        wrong = [finding.code for finding in self.findings if finding.level == "error"]
        return f"wrong: {', '.join(wrong)}" if wrong else ""


@dataclass(frozen=True, slots=True, repr=False)
class SurveyResult(ResultSequence[SurveyedAdapter]):
    """The adapters under a folder, in order of paths; the result is a sequence of them.

    Attributes
    ----------
    unreadable : sequence of SurveyedAdapter
        Files that should be adapters and cannot be read, each with the reason.
    without_pairs : sequence of FolderEntry
        Files that hold tensors and no LoRA pairs: models, for example.
    """

    contents = "adapters"

    folder: Path
    adapters: Sequence[SurveyedAdapter]
    unreadable: Sequence[SurveyedAdapter]
    without_pairs: Sequence[FolderEntry]

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
        links = sum(row.same_file_as is not None for row in self.adapters)
        wrong = sum(row.note.startswith("wrong") for row in self.adapters)
        parts = [count(len(self.adapters), "adapter")]
        # A count of 0 is left out, except that of copies, because this command is asked about copies.
        if len(self.adapters) > 1:
            parts.append(f"{copies} of them the same as another" if copies else "all of them different")
        parts += [f"{count(links, 'that is a link', 'that are links')} to another"] if links else []
        parts += [f"{wrong} with wrong numbers"] if wrong else []
        parts += [f"{count(len(self.unreadable), 'file')} that cannot be read"] if self.unreadable else []
        return [f"{self.folder}: {', '.join(parts)}."]

    def listing(self) -> list[Table[SurveyedAdapter]]:
        """The adapters and then the files that cannot be read, one file a row."""
        return [Table("adapters", COLUMNS, [*self.adapters, *self.unreadable])]

    def sentences(self) -> list[str]:
        """What reads the files of torch, if it is missing, and which other tensor files lie under the folder."""
        sentences = []
        # One sentence instead of the same remedy in every row.
        if fixes := [row.fix for row in self.unreadable if "needs torch" in row.reason]:
            need = "needs" if len(fixes) == 1 else "need"
            sentences += [f"{len(fixes)} of them {need} torch: {fixes[0]}", ""]
        if self.without_pairs:
            total = size(sum(file.size for file in self.without_pairs))
            # These files are counted and not listed, as the files of models would hide the adapters.
            hold = "holds" if len(self.without_pairs) == 1 else "hold"
            names = ", ".join(str(file.path.relative_to(self.folder)) for file in self.without_pairs[:OTHERS_NAMED])
            ellipsis = " …" if len(self.without_pairs) > OTHERS_NAMED else ""
            files = f"{count(len(self.without_pairs), 'file')} of {total}"
            sentences.append(f"no adapters: {files} {hold} tensors and no LoRA pairs: {names}{ellipsis}")
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "folder",
            rows_key("adapters", COLUMNS),
            rows_key("unreadable", (Column("path"), Column("reason"), Column("fix"))),
            rows_key(
                "no_adapters", (Column("path"), Column("bytes", "size"), Column("reason")), source="without_pairs"
            ),
        )


def _index_column(key: str, title: str = "", **options: Any) -> Column[SurveyedAdapter]:
    """A column of a field of the index; empty for a file that cannot be read."""
    return Column(key, f"member.{key}", title, **options)


def _modules_text(row: SurveyedAdapter) -> str | None:
    member = row.member
    return member and f"{member.modules}" + (f" ({member.zero_modules} zero)" if member.zero_modules else "")


def _base_name(name: str | None) -> str:
    """The last part of a base model's name or path; paths of Windows are recognised on any system."""
    return (name or UNDEFINED).replace("\\", "/").rstrip("/").rpartition("/")[2]


LABEL: Column[SurveyedAdapter] = label_column("label", "path")
REASON: Column[SurveyedAdapter] = label_column("reason", "reason", sentence=True)
NOTE: Column[SurveyedAdapter] = Column("note", "note", "note", align="left", priority=8)
# On a narrow terminal the fingerprint and the scale are left out first: size, ranks, norm and notes tell most adapters
# apart.
COLUMNS: Columns[SurveyedAdapter] = (
    Column("path"),
    Column("format", "member.format", "format", align="left", priority=3),
    Column("base_model", "member.base", "base", _base_name, align="left", priority=4),
    _index_column("modules"),
    # One column for people instead of two, as modules with ΔW = 0 are rare.
    Column("modules_and_zeros", _modules_text, "modules", priority=4, json=False, csv=False),
    _index_column("zero_modules"),
    Column("ranks", "member.ranks", "r", span, priority=8),
    Column(
        "scales",
        "member.scales",
        "scale",
        partial(span, text=number),
        priority=2,
        about="the number before B·A",
    ),
    _index_column("parameters", "parameters", text="{:,}".format, priority=5),
    Column("bytes", lambda row: row.bytes if row.member else None, "size", size, priority=6),
    _index_column("frobenius", "‖ΔW‖F", text=number, priority=ALWAYS, about="length of ΔW"),
    _index_column(
        "effective_rank", "effective", text=fixed(".2f"), priority=7, about="effective rank, mean over modules"
    ),
    # Twelve hexadecimal digits are 48 bits, enough to tell the adapters of a folder apart by eye.
    _index_column(
        "fingerprint", "fingerprint", text=lambda text: text[:12], align="left", priority=1, about="hash of the content"
    ),
    Column("duplicate_of", "original.path"),
    Column("duplicate_kind", "duplicate.kind"),
    Column("duplicate_difference", "duplicate.difference"),
    Column("same_file_as", "same_file_as.path"),
    # JSON has the whole findings; a cell of CSV holds their codes.
    Column("findings", "findings", csv=False),
    Column("findings", lambda row: " ".join(finding.code for finding in row.findings), json=False),
    Column("reason", "reason", json=False),
)


def survey(
    folder: str | PathLike[str],
    *,
    once: bool = False,
) -> SurveyResult:
    """List the adapters under a folder: format, base, ranks, norms, effective rank, fingerprint, duplicates.

    A file that should be an adapter and cannot be read is listed with the reason. Whole models are recognised by their
    headers, and only counted. The exit code is 0 whatever is there.

    Parameters
    ----------
    folder : path
        The folder; its subfolders are searched too.
    once : bool
        Add the update of the out_proj of an nn.MultiheadAttention once; PEFT adds it twice.

    Raises
    ------
    OptionError
        ``folder`` is not a folder.

    Notes
    -----
    If the folder has an index (`loralens.Fleet`) and no file has changed since it was made, the index answers;
    otherwise all files are read.

    Examples
    --------
    $ loralens survey folder
    """
    root = Path(folder)
    if not root.is_dir():
        raise OptionError(f"{root}: is not a folder", fix="give the folder to look through")
    reading = partial(load, once=once, strict=False)
    with _index_of(root, once=once) as fleet:
        result = _view(root, fleet, reading)
    # Several bases are not a fault of a collection, but only adapters of one base can be compared.
    note_of_bases(row.member.base for row in result.adapters if row.member)
    return result


@contextmanager
def _index_of(root: Path, *, once: bool) -> Iterator[Fleet]:
    """The index in a folder if it is up to date, otherwise a fresh one that is removed afterwards."""
    stored = Fleet.open(root)
    if _is_current(stored, root, once=once):
        yield stored
        return
    # The index is not in the folder itself, since a survey writes nothing there.
    with TemporaryDirectory(prefix="loralens-survey-") as home:
        fresh = Fleet.open(home)
        fresh.update(root, once=once)
        yield fresh


def _is_current(fleet: Fleet, root: Path, *, once: bool) -> bool:
    """Whether there is an index of this folder, whose files were read in the same way and have not changed since."""
    if not (fleet.home / CATALOGUE).exists():
        return False
    try:
        same = fleet.state.reading == reading_setting(once=once) and fleet.root.samefile(root)
        # A fresh index says why something cannot be reached, and does not keep what could be reached before.
        reached = not any(row.stamp == UNREACHABLE for row in fleet.state.files.values())
        return same and reached and not fleet.changes()
    except (LoraLensError, OSError):  # an index that cannot be read is no obstacle, as a fresh one is made
        return False


def _duplicates(copies: CopiesResult, reading: Callable[[Path], Adapter]) -> dict[int, tuple[int, Sameness]]:
    """Number of a copy → number of the first adapter of its group in order of paths, and how much both are the same."""
    to_kept = {copy.member.number: copy for copy in copies.copies}
    duplicates = {}
    for group in copies.groups:
        first, *others = sorted(group, key=lambda member: member.path.parts)
        for member in others:
            copy = to_kept.get(member.number) or to_kept[first.number]
            sameness = copy.sameness
            # The other pairs of the group were not compared.
            if {copy.kept.number, copy.member.number} != {first.number, member.number}:
                pair = reading(first.path), reading(member.path)
                off = max((one.relative for one in differences(*pair)), default=0.0)
                same = first.fingerprint == member.fingerprint
                sameness = replace(sameness, kind="tensors" if same else "update", difference=off)
            duplicates[member.number] = first.number, sameness
    return duplicates


def _view(root: Path, fleet: Fleet, reading: Callable[[Path], Adapter]) -> SurveyResult:
    """The rows of the survey in order of paths, with the duplicates among them."""

    def shown(path: Path) -> Path:
        # The folder as the user wrote it; the index has its real path.
        return root / path.relative_to(fleet.root)

    members = sorted(fleet.members(), key=lambda member: member.path.parts)
    unreadable = sorted(fleet.unreadable(), key=lambda file: file.path.parts)
    copies = fleet.copies()
    duplicates = _duplicates(copies, reading)
    links = {link.member.number: link.file.number for link in copies.links}
    label = folder_labels(
        root, [shown(path) for path in (*(member.path for member in members), *(file.path for file in unreadable))]
    )
    rows: dict[int, SurveyedAdapter] = {}
    # Links last, since the path without links may come later. An original comes before its copies.
    for member in sorted(members, key=lambda member: member.number in links):
        path = shown(member.path)
        original, sameness = duplicates.get(member.number, (None, None))
        rows[member.number] = SurveyedAdapter(
            path,
            label[path],
            member.bytes,
            member,
            sameness,
            None if original is None else rows[original],
            rows.get(links.get(member.number, -1)),
            reading=reading,
        )
    failed = [
        SurveyedAdapter(shown(file.path), label[shown(file.path)], file.bytes, reason=file.reason, fix=file.fix)
        for file in unreadable
    ]
    others = [
        FolderEntry(shown(file.path), None, file.bytes, "other", file.reason)
        for file in sorted(fleet.state.others, key=lambda file: file.path.parts)
    ]
    return SurveyResult(root, [rows[member.number] for member in members], failed, others)
