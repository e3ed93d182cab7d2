"""Families in a fleet: groups of adapters whose updates are alike."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.messages import progress, warn
from loralens.core.threads import in_threads, processor_count
from loralens.errors import LoraLensError, OptionError
from loralens.fleet.catalogue.members import Member
from loralens.fleet.grouping.components import alike_groups, cosines_among, rows_by_label
from loralens.fleet.grouping.links import distinct_files
from loralens.fleet.levels import FAMILY, KIN, ChanceLevels
from loralens.fleet.search.inner import ExactUpdate, exact_cosine
from loralens.fleet.sketching.sketches import Sketches, unit_rows
from loralens.linalg.factor import Floats, Integers
from loralens.linalg.pairwise import average_linkage_groups
from loralens.tables.numbers import count, signed, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet

SKETCH_ERROR = 0.06  # largest error of a cosine by sketches; docs/fleet.md has what was measured
# The errors of many pairs cancel in their mean, and the number of pairs grows with the square of that of members.
FEW = 32  # members up to which the mean cosine of a family near the level is exact


@final
@dataclass(frozen=True, slots=True)
class Family:
    """A group of adapters whose updates are alike.

    Attributes
    ----------
    number : int
        From 1, the largest family first.
    members : sequence of Member
        Those nearest to the middle first.
    middle_to_furthest : float
        The cosine of the first member, which is nearest to the middle, with the last one, which is furthest from it.
        Two others may have a smaller one.
    exact : bool
        Whether it is exact, or by sketches.
    """

    number: int
    members: Sequence[Member]
    middle_to_furthest: float
    exact: bool

    @property
    def base(self) -> str:
        """The base that most members name, or that their names and shapes show; empty if there is none."""
        return base_of(self.members)

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, increasing."""
        return sorted({rank for member in self.members for rank in member.ranks})


@final
@dataclass(frozen=True, slots=True)
class FamilyMember:
    """One adapter and the number of its family."""

    family: int
    member: Member


@final
@dataclass(frozen=True, slots=True)
class FamiliesResult(Tabular):
    """The families of a fleet, the largest first; the result is a sequence of them.

    Attributes
    ----------
    at : float
        The smallest mean cosine within a family.
    families : sequence of Family
    alone : sequence of Member
        The adapters that are in none.
    chance : ChanceLevels
    command : str
        The command that lists the adapters of each family.
    """

    at: float
    families: Sequence[Family]
    alone: Sequence[Member]
    chance: ChanceLevels
    command: str = "loralens fleet families --csv"

    def __len__(self) -> int:
        return len(self.families)

    def __getitem__(self, index: int) -> Family:
        return self.families[index]

    def __repr__(self) -> str:
        return f"FamiliesResult({count(len(self.families), 'family', 'families')} at {self.at})"

    @property
    def members(self) -> int:
        """The number of adapters."""
        return sum(len(family.members) for family in self.families) + len(self.alone)

    def conclusion(self) -> list[str]:
        """How many families there are, how large the largest is, and how many adapters are in none."""
        among = count(self.members, "adapter")
        if not self.families:
            return [f"{among}: no two have a cosine of {self.at:g} or more, so there is no family."]
        largest = self.families[0]
        families = count(len(self.families), "family", "families")
        how = "" if all(family.exact for family in self.families) else " by sketches"
        return [
            f"{among}: {families} of adapters that are alike (mean cosine{how} at least {self.at:g}), and "
            f"{len(self.alone)} in none. The largest has {count(len(largest.members), 'adapter')}."
        ]

    def tables(self) -> list[Table[Family]]:
        """The families, the largest first."""
        return [Table(f"families at {self.at:g}", COLUMNS, self.families)]

    def listing(self) -> list[Table[FamilyMember]]:
        """Every adapter with the number of its family, 0 if it is in none."""
        rows = [FamilyMember(family.number, member) for family in self.families for member in family.members]
        return [Table("members", MEMBER_COLUMNS, [*rows, *(FamilyMember(0, member) for member in self.alone)])]

    def sentences(self) -> list[str]:
        """What chance gives, and how the members are listed."""
        if not self.families:
            return []
        chance = self.chance.sentence(sketched=not any(one.exact for one in self.families))
        return [chance, f"to list the adapters of each family: {self.command}"]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "at": self.at,
            "members": self.members,
            "families": [
                {**Table("", COLUMNS, [family]).records()[0], "members": [str(one.path) for one in family.members]}
                for family in self.families
            ],
            "alone": [str(member.path) for member in self.alone],
            "chance": self.chance.record(),
        }


def base_of(members: Sequence[Member]) -> str:
    """The base of most members: the one that they name, else the one that their names and shapes show."""
    bases = Counter(base for member in members if (base := member.base or member.inferred))
    return bases.most_common(1)[0][0] if bases else ""


COLUMNS: tuple[Column[Family], ...] = (
    Column("family", lambda row: row.number, "#", priority=ALWAYS),
    Column("adapters", lambda row: len(row.members), "adapters", priority=ALWAYS),
    Column(
        "middle_to_furthest",
        lambda row: row.middle_to_furthest,
        "to furthest",
        signed,
        priority=7,
        about="cosine of the adapter nearest to the middle of the family with the one furthest from it",
    ),
    Column("exact", lambda row: row.exact),
    Column("base", lambda row: row.base or None, "base", align="left", priority=5),
    Column("ranks", lambda row: row.ranks, "r", span, priority=4),
    Column(
        "names",
        lambda row: row.members[0].name,
        "such as",
        align="left",
        priority=ALWAYS,
        json=False,
        distinct=True,
    ),
)
MEMBER_COLUMNS: tuple[Column[FamilyMember], ...] = (
    Column("family", lambda row: row.family, "family"),
    Column("name", lambda row: row.member.name, "adapter", align="left"),
    Column("path", lambda row: str(row.member.path)),
    Column("base", lambda row: row.member.base or row.member.inferred),
)


def find_families(fleet: "Fleet", at: float = FAMILY, *, sketch: bool = False) -> FamiliesResult:
    """Group the members of a fleet by average linkage of the cosines of their updates, by sketches.

    Where the error of sketches could carry the mean cosine of a family of up to 32 members below the level, the family
    is grouped again by exact cosines.

    Parameters
    ----------
    fleet : Fleet
    at : float
        The smallest mean cosine within a family: 0.5 by default; 0.2 finds kin.
    sketch : bool
        Decide and state everything by sketches, and read no file.

    Raises
    ------
    OptionError
        ``at`` is not between 0.1 and 1.
    """
    # Below 0.1 the groups would depend on the error of the sketches, which is up to 0.06.
    if not KIN / 2 <= at <= 1:
        raise OptionError(f"at is {at:g}, and a level lies between 0.1 and 1", fix=f"give {FAMILY}, or {KIN} for kin")
    members, sketches = distinct_files(*fleet.snapshot())
    alike = alike_groups(sketches, at)
    if not sketch:
        alike = [group for rows in alike for group in _at_level(fleet, members, sketches, rows, at)]
        alike.sort(key=lambda group: (-len(group), int(group[0])))
    groups = [middle_first(sketches, rows) for rows in alike]
    ends = [(int(rows[0]), int(rows[-1])) for rows in groups]
    exact, spreads = ({}, []) if sketch else exact_ends(fleet, members, ends)
    families = []
    for number, (rows, pair) in enumerate(zip(groups, ends, strict=True), 1):
        sketched = float(sketches.directions(rows=np.array(pair))[0] @ sketches.directions(rows=np.array(pair))[1])
        cosine = exact.get(pair, sketched)
        families.append(Family(number, [members[row] for row in rows], cosine, pair in exact))
    grouped = {int(row) for rows in groups for row in rows}
    alone = [member for row, member in enumerate(members) if row not in grouped]
    spread = float(np.sqrt(np.mean(np.square(spreads)))) if spreads else None
    level = [] if at == FAMILY else ["--at", f"{at:g}"]
    command = fleet.command("families", *level, "--csv")
    return FamiliesResult(at, families, alone, ChanceLevels(spread, len(members)), command)


def _at_level(
    fleet: "Fleet", members: Sequence[Member], sketches: Sketches, rows: Integers, at: float
) -> list[Integers]:
    """The rows of a group by sketches, or the groups of average linkage among them by exact cosines."""
    if len(rows) > FEW:
        return [rows]
    sketched = cosines_among(sketches, rows)
    if sketched[np.triu_indices(len(rows), 1)].mean() >= at + SKETCH_ERROR:
        return [rows]
    exact = exact_cosines(fleet, [members[row] for row in rows])
    if exact is None:
        return [rows]
    return [
        rows[group] for group in rows_by_label(average_linkage_groups(exact.astype(np.float32), at)) if len(group) > 1
    ]


def exact_cosines(fleet: "Fleet", members: Sequence[Member]) -> Floats | None:
    """The exact cosines of all pairs of members; None, and a warning, if a file has changed since it was indexed."""
    updates = []
    with progress("reading", len(members)) as step:
        for member in members:
            try:
                adapter = fleet.adapter(member)
                updates.append(ExactUpdate.of(adapter, fleet.modules(adapter)))
            except LoraLensError:  # it has changed, and may be anything now
                warn(
                    f"{member.name} has changed since it was indexed: cosines with it are by sketches",
                    fix=f"index the fleet again: {fleet.index_command}",
                )
                return None
            if step:
                step(1)
    cosines = np.eye(len(updates))
    for i, first in enumerate(updates):
        for j in range(i):
            cosines[i, j] = cosines[j, i] = exact_cosine(first, updates[j]).cosine
    return cosines


def middle_first(sketches: Sketches, rows: Integers) -> Integers:
    """The rows of a group, those nearest to the mean of their directions first."""
    directions = sketches.directions(rows=rows)
    middle = unit_rows(directions.mean(axis=0, keepdims=True))[0]
    # The numbers are rounded, since the last bits of equal rows may differ between two products, and the order would
    # then change.
    nearness = np.round(directions @ middle, 5)
    return np.asarray(rows[np.argsort(-nearness, kind="stable")], dtype=np.int64)


def exact_ends(
    fleet: "Fleet", members: Sequence[Member], pairs: Sequence[tuple[int, int]]
) -> tuple[dict[tuple[int, int], float], list[float]]:
    """Pair of rows → the exact cosine of their whole updates; and the spreads that chance would give.

    Pairs with a file that has changed since it was indexed are left out, and the file is named in a warning.
    """
    failed: list[str] = []
    spreads: list[float] = []
    with progress("reading", len(pairs)) as step:

        def compare(index: str) -> float | None:
            updates = []
            for row in pairs[int(index)]:
                try:
                    adapter = fleet.adapter(members[row])
                    updates.append(ExactUpdate.of(adapter, fleet.modules(adapter)))
                except LoraLensError:  # it has changed, and may be anything now
                    failed.append(members[row].name)
                    return None
            comparison = exact_cosine(*updates)
            spreads.append(comparison.spread)
            return comparison.cosine

        compared = in_threads(compare, [str(i) for i in range(len(pairs))], processor_count(), step)
    if failed:
        warn(
            f"{count(len(failed), 'file')} not read, as they have changed since they were indexed: {min(failed)}",
            fix=f"index the fleet again: {fleet.index_command}",
        )
    return {pairs[int(i)]: cosine for i, cosine in compared.items() if cosine is not None}, spreads
