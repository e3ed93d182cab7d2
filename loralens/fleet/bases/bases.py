"""The base models of a fleet: those that adapters name, those that names and shapes show, and contradictions."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from loralens.core.base_model import BaseModel, group_models
from loralens.core.messages import progress
from loralens.errors import LoraLensError
from loralens.fleet.bases.architectures import bare_base_name
from loralens.fleet.bases.inference import base_name, contradicts, identify_base
from loralens.fleet.catalogue.members import Member
from loralens.fleet.levels import KIN
from loralens.fleet.search.inner import ExactUpdate, exact_cosine
from loralens.fleet.search.near import propose
from loralens.fleet.sketching.sketches import Sketches
from loralens.tables.numbers import UNDEFINED, count
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet

Source = Literal["named", "names and shapes", "neighbours", "unknown"]
NEIGHBOURS = 3  # members near an adapter of unknown base that are compared exactly with it
SHOWN = 3  # bases that a cell lists


@final
@dataclass(frozen=True, slots=True)
class MemberBase:
    """The base of one adapter.

    Attributes
    ----------
    base : str
        The base as the table of known bases calls it; the plain name of any other, and of each model of one row of the
        table if the fleet has adapters of several (cased and uncased); empty if it is unknown.
    source : str
        ``named``: the file or its configuration names it. ``names and shapes``: of the modules. ``neighbours``: of a
        member with a cosine of at least 0.2, which adapters of unrelated bases never have.
    contradiction : str
        Why the base that it names cannot be its base; empty if it can.
    candidates : sequence of str
        For an unknown base: the bases whose weights have such names and shapes.
    """

    member: Member
    base: str
    source: Source
    contradiction: str = ""
    candidates: Sequence[str] = ()


@final
@dataclass(frozen=True, slots=True)
class BaseRow:
    """The adapters of one base."""

    base: str
    adapters: Sequence[MemberBase]

    def from_source(self, source: Source) -> int:
        """How many adapters have their base from this source."""
        return sum(adapter.source == source for adapter in self.adapters)

    @property
    def names(self) -> list[str]:
        """The names under which the adapters call this base, the most frequent first."""
        # A name that contradicts the shapes is not a name of this base.
        named = Counter(adapter.member.base for adapter in self.adapters if adapter.source == "named")
        return [name for name, _ in named.most_common() if name]


@final
@dataclass(frozen=True, slots=True)
class BasesResult(Tabular):
    """The bases of a fleet, the most frequent first; the result is a sequence of them.

    Attributes
    ----------
    bases : sequence of BaseRow
    unknown : sequence of MemberBase
    contradictions : sequence of MemberBase
        Adapters that name a base whose weights they do not fit. They are counted under what their shapes show.
    command : str
        The command that lists the base of each adapter.
    """

    bases: Sequence[BaseRow]
    unknown: Sequence[MemberBase]
    contradictions: Sequence[MemberBase]
    command: str = "loralens fleet bases --csv"

    def __len__(self) -> int:
        return len(self.bases)

    def __getitem__(self, index: int) -> BaseRow:
        return self.bases[index]

    def __repr__(self) -> str:
        return f"BasesResult({count(len(self.bases), 'base')})"

    @property
    def members(self) -> int:
        """The number of adapters."""
        return sum(len(row.adapters) for row in self.bases) + len(self.unknown)

    def conclusion(self) -> list[str]:
        """How many bases there are, how many adapters have an unknown one, and how many contradict themselves."""
        text = f"{count(self.members, 'adapter')} for {count(len(self.bases), 'base model')}"
        if self.unknown:
            text += f"; the base of {len(self.unknown)} is unknown"
        sentences = [f"{text}."]
        if self.contradictions:
            names = "names a base that it does" if len(self.contradictions) == 1 else "name a base that they do"
            sentences.append(f"{count(len(self.contradictions), 'adapter')} {names} not fit.")
        return sentences

    def tables(self) -> list[Table[Any]]:
        """The bases, the adapters of unknown base, and the contradictions."""
        return [
            Table("bases", COLUMNS, self.bases),
            Table("unknown base", UNKNOWN_COLUMNS, self.unknown),
            Table("names a base that it does not fit", CONTRADICTION_COLUMNS, self.contradictions),
        ]

    def sentences(self) -> list[str]:
        """How the base of each adapter is listed."""
        return [f"to list the base of each adapter: {self.command}"] if self.bases else []

    def listing(self) -> list[Table[MemberBase]]:
        """Every adapter with its base."""
        rows = [adapter for row in self.bases for adapter in row.adapters]
        return [Table("adapters", MEMBER_COLUMNS, [*rows, *self.unknown])]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "bases": Table("bases", COLUMNS, self.bases).records(),
            "adapters": self.listing()[0].records(),
            "unknown": [str(adapter.member.path) for adapter in self.unknown],
            "contradictions": [
                {"path": str(adapter.member.path), "named": adapter.member.base, "reason": adapter.contradiction}
                for adapter in self.contradictions
            ],
        }


def _count_column(key: str, source: Source, title: str, about: str, priority: int) -> Column[BaseRow]:
    return Column(key, lambda row: row.from_source(source), title, priority=priority, about=about)


def _some_names(names: Sequence[str]) -> str:
    if not names:
        return UNDEFINED
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


COLUMNS: tuple[Column[BaseRow], ...] = (
    Column("base", lambda row: row.base, "base", align="left", priority=ALWAYS),
    Column("adapters", lambda row: len(row.adapters), "adapters", priority=ALWAYS),
    _count_column("named", "named", "named", "adapters whose file or configuration names the base", 6),
    _count_column("shown", "names and shapes", "by shapes", "adapters whose names and shapes show it", 6),
    _count_column("by_neighbours", "neighbours", "by neighbours", "adapters that are like others of this base", 4),
    Column("names", lambda row: row.names, "called", _some_names, align="left", priority=3),
)
NAME: Column[MemberBase] = Column(
    "name", lambda row: row.member.name, "adapter", align="left", priority=ALWAYS, distinct=True
)
MEMBER_COLUMNS: tuple[Column[MemberBase], ...] = (
    NAME,
    Column("path", lambda row: str(row.member.path)),
    Column("base", lambda row: row.base or None),
    Column("source", lambda row: row.source),
    Column("named", lambda row: row.member.base),
    Column("contradiction", lambda row: row.contradiction or None),
    Column("candidates", lambda row: list(row.candidates), csv=False),
)
UNKNOWN_COLUMNS: tuple[Column[MemberBase], ...] = (
    NAME,
    Column("candidates", lambda row: row.candidates, "could be", _some_names, align="left", priority=8),
)
CONTRADICTION_COLUMNS: tuple[Column[MemberBase], ...] = (
    NAME,
    Column("named", lambda row: row.member.base, "names", align="left", priority=7),
    Column("contradiction", lambda row: row.contradiction, "but", align="left", priority=8),
)


def find_bases(fleet: "Fleet") -> BasesResult:
    """The base of every member: the one that it names, else the one that its modules or its neighbours show."""
    members, sketches = fleet.snapshot()
    member_bases = _told_apart([_own_base(fleet, member) for member in members])
    unknown = [row for row, one in enumerate(member_bases) if not one.base and members[row].frobenius > 0]
    known_rows = np.array(
        [row for row, one in enumerate(member_bases) if one.base and members[row].frobenius > 0], dtype=np.int64
    )
    with progress("reading", len(unknown)) as step:
        for row in unknown if known_rows.size else ():
            base = _neighbour_base(fleet, member_bases, sketches, row, known_rows)
            if base:
                member_bases[row] = MemberBase(members[row], base, "neighbours")
            if step:
                step(1)
    by_base: dict[str, list[MemberBase]] = {}
    for member_base in member_bases:
        by_base.setdefault(member_base.base, []).append(member_base)
    rows = [BaseRow(base, adapters) for base, adapters in by_base.items() if base]
    rows.sort(key=lambda row: (-len(row.adapters), row.base))
    contradictions = [one for one in member_bases if one.contradiction]
    return BasesResult(rows, by_base.get("", []), contradictions, fleet.command("bases", "--csv"))


def _own_base(fleet: "Fleet", member: Member) -> MemberBase:
    """The base that a member names or shows."""
    signature = fleet.signature(member)
    reason = contradicts(member.base, signature) if member.base else ""
    if member.base and not reason:
        return MemberBase(member, base_name(member.base), "named")
    if member.inferred:
        return MemberBase(member, member.inferred, "names and shapes", reason)
    return MemberBase(member, "", "unknown", reason, identify_base(signature).candidates)


def _told_apart(member_bases: Sequence[MemberBase]) -> list[MemberBase]:
    """The same with plain names in place of a row of the table if the names that adapters give are of several models.

    Models whose weights have the same names and shapes are one row of the table, but not one base.
    """
    named: dict[str, Counter[str]] = defaultdict(Counter)
    for one in member_bases:
        if one.source == "named":
            named[one.base][one.member.base or ""] += 1
    plain: dict[str, str] = {}
    for names in named.values():
        spelled = [name for name, _ in names.most_common()]
        groups = group_models([BaseModel.of(name) for name in spelled])
        if len(groups) > 1:
            plain |= {spelled[i]: bare_base_name(spelled[group[0]]) for group in groups for i in group}
    return [
        replace(one, base=plain.get(one.member.base or "", one.base)) if one.source == "named" else one
        for one in member_bases
    ]


def _neighbour_base(
    fleet: "Fleet", member_bases: Sequence[MemberBase], sketches: Sketches, row: int, known_rows: "np.ndarray[Any, Any]"
) -> str:
    """The base of the nearest members, if one of them is kin; empty if none is, or if they have several bases."""
    own = sketches.at(row)
    bases = set()
    try:
        update = _read(fleet, member_bases[row].member)
        for other in propose(sketches, own, known_rows, NEIGHBOURS).tolist():
            if exact_cosine(update, _read(fleet, member_bases[other].member)).cosine >= KIN:
                bases.add(member_bases[other].base)
    except LoraLensError:  # a file that has changed since it was indexed shows nothing
        return ""
    return bases.pop() if len(bases) == 1 else ""


def _read(fleet: "Fleet", member: Member) -> ExactUpdate:
    adapter = fleet.adapter(member)
    return ExactUpdate.of(adapter, fleet.modules(adapter))
