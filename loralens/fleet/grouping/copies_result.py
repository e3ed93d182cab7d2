"""`CopiesResult`: the copies in a fleet, and the files that can be deleted without a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

from loralens.fleet.catalogue.members import Member
from loralens.fleet.search.sameness import Kind, Sameness
from loralens.tables.numbers import count, fixed, number, size
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table


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
    files : sequence of Path
        What can be deleted: its weights, and its configuration if no other weights in the folder need it.
    freed : int
        The bytes of these files.
    """

    kept: Member
    member: Member
    sameness: Sameness
    protected: str = ""
    files: Sequence[Path] = ()
    freed: int = 0

    @property
    def safe_to_delete(self) -> bool:
        """Whether the files of this copy can be deleted without a loss."""
        return self.sameness.is_copy and not self.protected


@final
@dataclass(frozen=True, slots=True)
class CopyGroup:
    """Adapters that are the same update, the one that stays first."""

    members: Sequence[Member]


class GroupRow(NamedTuple):
    """An adapter in the table of a group: the one that stays, or a copy of it."""

    group: int
    member: Member
    copy: Copy | None


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
    command : str
        The command that lists the files that can be deleted.
    """

    members: int
    copies: Sequence[Copy]
    close: Sequence[Copy]
    links: Sequence[LinkedPath] = field(default=())
    command: str = "loralens fleet copies --paths"

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
        """The files that can be deleted: the weights of copies, and configurations that only these need."""
        return list(dict.fromkeys(path for copy in self.copies for path in copy.files))

    def conclusion(self) -> list[str]:
        """How many copies there are, and what their deletion frees."""
        among = f"{count(self.members, 'adapter')}"
        if not self.copies:
            return [f"{among}: none is a copy of another."]
        kept = len(self.groups)
        are = "is a copy" if len(self.copies) == 1 else "are copies"
        sentences = [f"{among}: {len(self.copies)} {are} of {kept} other{'' if kept == 1 else 's'}."]
        if safe := [copy for copy in self.copies if copy.safe_to_delete]:
            copies = count(len(safe), "copy", "copies")
            sentences.append(f"{copies} can be deleted, which frees {size(sum(copy.freed for copy in safe))}.")
        return sentences

    def tables(self) -> list[Table[GroupRow]]:
        """The copies below the adapter that stays, and the pairs that are nearly the same."""
        # One name in a row, since two names of the length that paths have do not fit into a terminal.
        of = {copy.member.number: copy for copy in self.copies}
        grouped = [
            GroupRow(i, member, of.get(member.number))
            for i, group in enumerate(self.groups, 1)
            for member in group.members
        ]
        pairs = [
            row
            for i, pair in enumerate(self.close, 1)
            for row in (GroupRow(i, pair.kept, None), GroupRow(i, pair.member, pair))
        ]
        return [Table("copies", COPY_COLUMNS, grouped), Table("nearly the same, but not copies", CLOSE_COLUMNS, pairs)]

    def listing(self) -> list[Table[Copy]]:
        """The copies and then the adapters that are nearly the same, one a row."""
        return [Table("copies", RECORD_COLUMNS, [*self.copies, *self.close])]

    def sentences(self) -> list[str]:
        """How the files are listed that can be deleted, and which paths are links."""
        return [*([f"to list their files: {self.command}"] if self.safe_to_delete else []), *self._links_sentence()]

    def _links_sentence(self) -> list[str]:
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
DIFFERENCE: Column[Copy] = Column(
    "difference",
    lambda row: row.sameness.difference,
    "difference",
    lambda value: "" if value is None else number(value, 2),
    priority=6,
    about="‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module",
)
KIND: Column[Copy] = Column("kind", lambda row: row.sameness.kind, "kind", lambda kind: KINDS[kind or ""], "left", 8)
NAMES: tuple[Column[GroupRow], ...] = (
    Column("group", lambda row: row.group, "#", priority=ALWAYS),
    Column("name", lambda row: row.member.name, "adapter", align="left", priority=ALWAYS, distinct=True),
)
COPY_COLUMNS: tuple[Column[GroupRow], ...] = (
    *NAMES,
    KIND.of(lambda row: row.copy),
    DIFFERENCE.of(lambda row: row.copy),
    Column("bytes", lambda row: row.member.bytes, "size", size, priority=5),
    Column(
        "delete",
        lambda row: (row.copy.protected or "safe") if row.copy else "stays",
        "to delete",
        align="left",
        priority=8,
        about="whether the files can be deleted without a loss",
    ),
)
CLOSE_COLUMNS: tuple[Column[GroupRow], ...] = (
    *NAMES,
    Column(
        "cosine",
        lambda row: row.copy and row.copy.sameness.cosine,
        "cosine",
        lambda value: "" if value is None else fixed("+.4f")(value),
        priority=7,
    ),
    DIFFERENCE.of(lambda row: row.copy),
    Column("reason", lambda row: row.copy and row.copy.sameness.reason, "why not a copy", align="left", priority=8),
)
RECORD_COLUMNS: tuple[Column[Copy], ...] = (
    Column("name", lambda row: row.member.name),
    Column("path", lambda row: str(row.member.path)),
    Column("kept", lambda row: row.kept.name),
    Column("kept_path", lambda row: str(row.kept.path)),
    KIND,
    Column("cosine", lambda row: row.sameness.cosine),
    DIFFERENCE,
    Column("reason", lambda row: row.sameness.reason or row.protected),
    Column("safe_to_delete", lambda row: row.safe_to_delete),
    # A cell of CSV would hold the repr of a list of paths.
    Column("files", lambda row: [str(path) for path in row.files], csv=False),
    Column("bytes", lambda row: row.member.bytes),
)
