"""The base models of the members of a fleet: those that they name, those that they show, and contradictions."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np

from loralens.core.base_model import BaseModel, group_models
from loralens.core.messages import progress
from loralens.fleet.catalogue import Member
from loralens.fleet.fleet_index import ChangedFile, FleetIndex
from loralens.fleet.known_bases import bare_base_name, base_name, contradicts, fitting_bases
from loralens.fleet.likeness import SIMILAR, exact_cosine
from loralens.fleet.near import propose
from loralens.fleet.sketches import Sketches
from loralens.linalg.factor import Integers

Source = Literal["named", "names and shapes", "neighbours", "unknown"]
NEIGHBOURS = 3  # members near an adapter of unknown base that are compared exactly with it


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


def find_bases(index: FleetIndex) -> tuple[list[BaseRow], list[MemberBase], list[MemberBase]]:
    """The bases with their members, the members of unknown base, and those that name a base that they do not fit.

    The base of a member is the one that it names, else the one that its modules or its neighbours show.
    """
    members, sketches = index.snapshot()
    member_bases = _told_apart([_own_base(index, member) for member in members])
    unknown = [row for row, one in enumerate(member_bases) if not one.base and members[row].frobenius > 0]
    known_rows = np.array(
        [row for row, one in enumerate(member_bases) if one.base and members[row].frobenius > 0], dtype=np.int64
    )
    with progress("reading", len(unknown)) as step:
        for row in unknown if known_rows.size else ():
            base = _neighbour_base(index, member_bases, sketches, row, known_rows)
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
    return rows, by_base.get("", []), contradictions


def _own_base(index: FleetIndex, member: Member) -> MemberBase:
    """The base that a member names or shows."""
    signature = index.signature(member)
    reason = contradicts(member.base, signature) if member.base else ""
    if member.base and not reason:
        return MemberBase(member, base_name(member.base), "named")
    if member.inferred:
        return MemberBase(member, member.inferred, "names and shapes", reason)
    return MemberBase(member, "", "unknown", reason, fitting_bases(signature)[1])


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
    index: FleetIndex, member_bases: Sequence[MemberBase], sketches: Sketches, row: int, known_rows: Integers
) -> str:
    """The base of the nearest members, if one of them is similar; empty if none is, or if they have several bases."""
    bases = set()
    try:
        update = index.exact_of(member_bases[row].member)
        for other in propose(sketches, sketches.at(row), known_rows, NEIGHBOURS).tolist():
            if exact_cosine(update, index.exact_of(member_bases[other].member)).cosine >= SIMILAR:
                bases.add(member_bases[other].base)
    except ChangedFile:  # which shows nothing
        return ""
    return bases.pop() if len(bases) == 1 else ""
