"""The adapters of a fleet that do nothing, as a whole or in some of their modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralens.fleet.catalogue.members import Member
from loralens.tables.numbers import count, size
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table


@dataclass(frozen=True, slots=True)
class EmptyResult(Tabular):
    """The adapters with modules whose ΔW is 0, those first that have no other module; a sequence of `Member`.

    Attributes
    ----------
    adapters : int
        How many adapters the fleet has.
    """

    root: Path
    members: Sequence[Member]
    adapters: int

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Member:
        return self.members[index]

    @property
    def without_effect(self) -> list[Member]:
        """The adapters whose ΔW is 0 everywhere."""
        return [member for member in self.members if is_empty(member)]

    def conclusion(self) -> list[str]:
        """How many adapters change no weight, and how many of these have other trained tensors."""
        without_effect = self.without_effect
        if not without_effect:
            return [f"{self.root}: none of {count(self.adapters, 'adapter')} is empty: each has a ΔW that is not 0."]
        with_extras = sum(member.extras > 0 for member in without_effect)
        also = f" {with_extras} of them have other tensors, such as a head, that do something." if with_extras else ""
        change = "changes" if len(without_effect) == 1 else "change"
        return [
            f"{self.root}: {len(without_effect)} of {count(self.adapters, 'adapter')} {change} no weight: ΔW = 0.{also}"
        ]

    def tables(self) -> list[Table[Member]]:
        """The adapters; those that are empty only in some modules are counted."""
        return [
            Table(
                "adapters with ΔW = 0",
                COLUMNS,
                self.members,
                uneventful=lambda member: not is_empty(member),
                sum_up=self._sum_up,
            )
        ]

    def _sum_up(self, number: int) -> str:
        more = "more " if self.without_effect else ""
        has = f"{more}adapter has" if number == 1 else f"{more}adapters have"
        # Below a table the terminal says how all rows are shown.
        how = "" if self.without_effect else f" (--verbose names {'it' if number == 1 else 'them'})"
        return f"{number:,} {has} ΔW = 0 in some of the modules{how}"

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {"root": str(self.root), "adapters": self.adapters, "empty": self.tables()[0].records()}


def is_empty(member: Member) -> bool:
    """Whether ΔW is 0 in every module."""
    return member.zero_modules == member.modules


def empty_members(root: Path, members: Sequence[Member]) -> EmptyResult:
    """The members with modules whose ΔW is 0."""
    with_zeros = [member for member in members if member.zero_modules]
    ordered = sorted(with_zeros, key=lambda member: not is_empty(member))
    return EmptyResult(root, ordered, len(members))


COLUMNS: tuple[Column[Member], ...] = (
    Column("name", lambda row: row.name, "adapter", align="left", priority=ALWAYS, distinct=True),
    Column("path", lambda row: str(row.path)),
    Column("zero_modules", lambda row: row.zero_modules, "zero", priority=8, about="modules with ΔW = 0"),
    Column("modules", lambda row: row.modules, "modules", priority=7),
    Column("extras", lambda row: row.extras, "others", priority=6, about="trained tensors that belong to no pair"),
    Column("bytes", lambda row: row.bytes, "size", size, priority=5),
    Column("findings", lambda row: " ".join(row.findings), json=False),
    Column("findings", lambda row: list(row.findings), csv=False),
)
