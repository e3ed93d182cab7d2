"""Copies in a fleet: which adapters are the same update, and which files can be deleted without a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.fleet.catalogue.members import Member
from loralens.fleet.grouping.judging import Judge, near_pairs
from loralens.fleet.grouping.links import link_targets, paths_by_file
from loralens.fleet.search.sameness import Kind, Sameness
from loralens.tables.numbers import count, fixed, number, size
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet


@final
@dataclass(frozen=True, slots=True)
class Copy:
    """One adapter that is the same as another, or nearly.

    Attributes
    ----------
    kept : Member
        The adapter that stays.
    member : Member
        The other one.
    sameness : Sameness
    protected : str
        Why it must not be deleted although it is a copy; empty if it can be.
    """

    kept: Member
    member: Member
    sameness: Sameness
    protected: str = ""

    @property
    def safe(self) -> bool:
        """Whether the file of this copy can be deleted without a loss."""
        return self.sameness.is_copy and not self.protected


@final
@dataclass(frozen=True, slots=True)
class CopyGroup:
    """Adapters that are the same update, the one that stays first."""

    members: Sequence[Member]


@final
@dataclass(frozen=True, slots=True)
class LinkedPath:
    """A path that leads to the file of a member through a link, and is therefore not a copy."""

    member: Member
    file: Member


@final
@dataclass(frozen=True, slots=True)
class CopiesResult(Tabular):
    """The copies in a fleet; the result is a sequence of them.

    Attributes
    ----------
    members : int
        The number of adapters.
    copies : sequence of Copy
        Adapters that are the same as a kept one, in order of the kept ones.
    close : sequence of Copy
        Adapters that are nearly the same as another, and are not copies.
    links : sequence of LinkedPath
    """

    members: int
    copies: Sequence[Copy]
    close: Sequence[Copy]
    links: Sequence[LinkedPath] = field(default=())

    def __len__(self) -> int:
        return len(self.copies)

    def __getitem__(self, index: int) -> Copy:
        return self.copies[index]

    def __repr__(self) -> str:
        return f"CopiesResult({count(len(self.copies), 'copy').replace('copys', 'copies')})"

    @property
    def groups(self) -> list[CopyGroup]:
        """The adapters that are the same update, together."""
        by_kept: dict[int, list[Member]] = {}
        for copy in self.copies:
            by_kept.setdefault(copy.kept.number, [copy.kept]).append(copy.member)
        return [CopyGroup(members) for members in by_kept.values()]

    @property
    def safe_to_delete(self) -> list[Path]:
        """The files that can be deleted: each is a copy of one that stays."""
        return [copy.member.path for copy in self.copies if copy.safe]

    def conclusion(self) -> list[str]:
        """How many copies there are, and what their deletion frees."""
        among = f"{count(self.members, 'adapter')}"
        if not self.copies:
            return [f"{among}: none is a copy of another."]
        kept = len(self.groups)
        are = "is a copy" if len(self.copies) == 1 else "are copies"
        sentences = [f"{among}: {len(self.copies)} {are} of {kept} other{'' if kept == 1 else 's'}."]
        safe = [copy for copy in self.copies if copy.safe]
        freed = size(sum(copy.member.size for copy in safe))
        if safe:
            files = count(len(safe), "file")
            sentences.append(f"{files} can be deleted, which frees {freed}: loralens fleet copies --paths lists them.")
        return sentences

    def tables(self) -> list[Table[Copy]]:
        """The copies, and the adapters that are nearly the same."""
        return [
            Table("copies", COPY_COLUMNS, self.copies),
            Table("nearly the same, but not copies", CLOSE_COLUMNS, self.close),
        ]

    def listing(self) -> list[Table[Copy]]:
        """The copies and then the adapters that are nearly the same, one a row."""
        return [Table("copies", RECORD_COLUMNS, [*self.copies, *self.close])]

    def sentences(self) -> list[str]:
        """Which paths are links."""
        if not self.links:
            return []
        first = self.links[0]
        several = len(self.links) > 1
        leads = "paths lead" if several else "path leads"
        example = f"{first.member.name} → {first.file.name}" + (" …" if several else "")
        counted = "" if several else ", and is not counted as a copy"
        text = f"{len(self.links)} {leads} to the file of another adapter through a link{counted}"
        return [text + (", and are not counted as copies" if several else "") + f": {example}"]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "members": self.members,
            "copies": Table("copies", RECORD_COLUMNS, self.copies).records(),
            "close": Table("close", RECORD_COLUMNS, self.close).records(),
            "links": [{"path": str(link.member.path), "file": str(link.file.path)} for link in self.links],
            "safe_to_delete": [str(path) for path in self.safe_to_delete],
        }


KINDS: Mapping[Kind, str] = {"tensors": "same numbers", "update": "same ΔW", "close": "nearly the same", "": ""}
NAME: Column[Copy] = Column("name", lambda row: row.member.name, "copy", align="left", priority=ALWAYS)
KEPT: Column[Copy] = Column("kept", lambda row: row.kept.name, "of", align="left", priority=ALWAYS)
KIND: Column[Copy] = Column("kind", lambda row: row.sameness.kind, "kind", lambda kind: KINDS[kind], "left", 8)
DIFFERENCE: Column[Copy] = Column(
    "difference",
    lambda row: row.sameness.difference,
    "difference",
    lambda value: number(value, 2),
    priority=6,
    about="‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module",
)
SIZE: Column[Copy] = Column("bytes", lambda row: row.member.size, "size", size, priority=7)
COPY_COLUMNS: tuple[Column[Copy], ...] = (
    NAME,
    KEPT,
    KIND,
    DIFFERENCE,
    SIZE,
    Column(
        "delete",
        lambda row: row.protected or "safe",
        "to delete",
        align="left",
        priority=8,
        about="whether the file can be deleted without a loss",
    ),
)
CLOSE_COLUMNS: tuple[Column[Copy], ...] = (
    Column("name", lambda row: row.member.name, "adapter", align="left", priority=ALWAYS),
    Column("kept", lambda row: row.kept.name, "and", align="left", priority=ALWAYS),
    Column("cosine", lambda row: row.sameness.cosine, "cosine", fixed("+.4f"), priority=7),
    DIFFERENCE,
    Column("reason", lambda row: row.sameness.reason, "why not a copy", align="left", priority=8),
)
RECORD_COLUMNS: tuple[Column[Copy], ...] = (
    NAME,
    Column("path", lambda row: str(row.member.path)),
    Column("kept", lambda row: row.kept.name),
    Column("kept_path", lambda row: str(row.kept.path)),
    KIND,
    Column("cosine", lambda row: row.sameness.cosine),
    DIFFERENCE,
    Column("reason", lambda row: row.sameness.reason or row.protected),
    Column("safe_to_delete", lambda row: row.safe),
    SIZE,
)


def find_copies(fleet: "Fleet") -> CopiesResult:
    """The adapters that are the same update as another one, and those that are nearly so.

    Equal fingerprints are copies. Of the others, those whose sketches have a cosine of at least 0.985 and whose norms
    are within 1 % are compared exactly. Of each group the file stays that others link to, else the one with the most
    bits for each number, else the oldest. Paths to one file, through links or Hub caches, are one file.
    """
    members, sketches = fleet.snapshot()
    by_file = paths_by_file(members)
    files = sorted(rows[0] for rows in by_file)
    judge = Judge(fleet, members)
    first_of = _first_by_fingerprint(members, files)
    firsts = sorted(set(first_of.values()))
    proposed = list(near_pairs(sketches, np.array([members[row].frobenius for row in firsts]), np.array(firsts)))
    judge.compare_all(proposed)
    copies: list[Copy] = []
    close: list[Copy] = []
    groups = _groups_of_files(files, first_of, _linked_groups(firsts, judge.same_pairs()))
    targets = link_targets(fleet.root, [members[row].path for rows in groups if len(rows) > 1 for row in rows])
    for rows in groups:
        copies += _copies_of_group(rows, members, judge, targets)
    replaced = {copy.member.number for copy in copies}
    for (first, second), sameness in sorted(judge.judged.items()):
        pair = members[first], members[second]
        if sameness.kind == "close" and not any(one.number in replaced for one in pair):
            close.append(Copy(*pair, sameness))
    judge.tell_failed()
    return CopiesResult(len(files), copies, close, _further_paths(members, by_file))


def _further_paths(members: Sequence[Member], files: Sequence[Sequence[int]]) -> list[LinkedPath]:
    """The paths that lead to the file of another member."""
    links = [LinkedPath(members[row], members[own]) for own, *others in files for row in others]
    return sorted(links, key=lambda link: link.member.name)


def _first_by_fingerprint(members: Sequence[Member], rows: Sequence[int]) -> dict[int, int]:
    """Each row → the first row with its fingerprint."""
    first: dict[str, int] = {}
    return {row: first.setdefault(members[row].fingerprint, row) for row in rows}


def _groups_of_files(files: Sequence[int], first_of: Mapping[int, int], groups: Sequence[set[int]]) -> list[list[int]]:
    """The rows of each group: all files whose fingerprint is that of a row in it."""
    number = {row: i for i, group in enumerate(groups) for row in group}
    members: list[list[int]] = [[] for _ in groups]
    for row in files:
        members[number[first_of[row]]].append(row)
    return members


def _linked_groups(rows: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[set[int]]:
    """Sets of rows that pairs connect; a row without a pair is a set of its own."""
    group = {row: {row} for row in rows}
    for first, second in pairs:
        if group[first] is not group[second]:
            joined = group[first] | group[second]
            for row in joined:
                group[row] = joined
    return [group[row] for row in rows if row == min(group[row])]


def _copies_of_group(
    rows: Sequence[int], members: Sequence[Member], judge: Judge, targets: Mapping[Path, str]
) -> list[Copy]:
    """The copies among rows that may be the same: each is confirmed to be the same as the one that stays."""
    copies = []
    # Between files with the same numbers their width decides nothing.
    same = len({members[row].fingerprint for row in rows}) == 1
    waiting = list(rows)
    if len(rows) > 1:
        waiting.sort(key=lambda row: _reasons_to_keep(members[row], 0 if same else judge.width(row), targets))
    while len(waiting) > 1:
        kept, *others = waiting
        waiting = []
        for row in others:
            sameness = judge(kept, row)
            if sameness.is_copy:
                reason = targets.get(members[row].path, "")
                copies.append(Copy(members[kept], members[row], sameness, reason))
            else:
                # The same as one that is the same as the kept one, but not the same as that: rounding has added up.
                waiting.append(row)
    return copies


def _reasons_to_keep(member: Member, width: int, targets: Mapping[Path, str]) -> tuple[Any, ...]:
    """A key that sorts the file first that should stay: the target of a link, the widest numbers, the oldest file."""
    try:
        written = member.path.stat().st_mtime_ns
    except OSError:
        written = 0
    return member.path not in targets, -width, written, len(member.name), member.name
