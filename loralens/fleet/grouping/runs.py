"""Runs in a fleet: groups of adapters that began from the same random A."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.fleet.catalogue.members import Member
from loralens.fleet.grouping.components import connected_rows, rows_by_label
from loralens.fleet.grouping.families import base_of, exact_ends
from loralens.fleet.grouping.judging import near_pairs
from loralens.fleet.grouping.links import distinct_files
from loralens.fleet.levels import COPY, RUN, ChanceLevels
from loralens.fleet.sketching.sketches import Sketches
from loralens.formats.records.training import checkpoint_step
from loralens.linalg.pairwise import join_pairs
from loralens.tables.numbers import count, number, signed, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet


@final
@dataclass(frozen=True, slots=True)
class SharedStart:
    """A group of adapters that began from the same random A.

    Attributes
    ----------
    number : int
        From 1, the largest group first.
    members : sequence of Member
        In order of their steps; those without a known step last, in order of names.
    steps : sequence of int or None
        The training step of each, as its folder or the state of its trainer says.
    cosine : float or None
        Of the updates of the first and the last step; None if fewer than two steps are known.
    exact : bool
        Whether it is exact, or by sketches.
    """

    number: int
    members: Sequence[Member]
    steps: Sequence[int | None]
    cosine: float | None
    exact: bool

    @property
    def known_steps(self) -> list[int]:
        """The steps that are known, increasing."""
        return [step for step in self.steps if step is not None]


@final
@dataclass(frozen=True, slots=True)
class RunMember:
    """One adapter, the number of its run, and its step."""

    run: int
    member: Member
    step: int | None


@final
@dataclass(frozen=True, slots=True)
class RunsResult(Tabular):
    """The groups of a fleet that began from the same random A, the largest first.

    Attributes
    ----------
    runs : sequence of SharedStart
    alone : sequence of Member
        The adapters that share their start with no other.
    chance : ChanceLevels
    command : str
        The command that lists the adapters of each group.
    """

    runs: Sequence[SharedStart]
    alone: Sequence[Member]
    chance: ChanceLevels
    command: str = "loralens fleet runs --csv"

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> SharedStart:
        return self.runs[index]

    def __repr__(self) -> str:
        return f"RunsResult({count(len(self.runs), 'run')})"

    @property
    def members(self) -> int:
        """The number of adapters."""
        return sum(len(run.members) for run in self.runs) + len(self.alone)

    def conclusion(self) -> list[str]:
        """How many groups there are, and how many adapters are in none."""
        among = count(self.members, "adapter")
        if not self.runs:
            return [f"{among}: no two began from the same random A."]
        grouped = self.members - len(self.alone)
        return [
            f"{among}: {grouped} began from the same random A as another, in {count(len(self.runs), 'group')}; "
            f"{len(self.alone)} did not."
        ]

    def tables(self) -> list[Table[SharedStart]]:
        """The groups, the largest first."""
        return [Table("began from the same A", COLUMNS, self.runs)]

    def listing(self) -> list[Table[RunMember]]:
        """Every adapter with the number of its group, 0 if it is in none."""
        rows = [
            RunMember(run.number, member, step)
            for run in self.runs
            for member, step in zip(run.members, run.steps, strict=True)
        ]
        return [Table("members", MEMBER_COLUMNS, [*rows, *(RunMember(0, member, None) for member in self.alone)])]

    def sentences(self) -> list[str]:
        """What a group is, what chance gives, and how the adapters of the groups are listed."""
        if not self.runs:
            return []
        return [
            "A group has the checkpoints of a run, and runs with the same seed.",
            f"chance: two independent A have a cosine of 0 ± {number(self.chance.start, 2)} by sketches; "
            f"a group has at least {RUN:g}",
            f"to list the adapters of each group: {self.command}",
        ]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "members": self.members,
            "runs": [
                {
                    **Table("", COLUMNS, [run]).records()[0],
                    "members": [
                        {"path": str(member.path), "step": step}
                        for member, step in zip(run.members, run.steps, strict=True)
                    ],
                }
                for run in self.runs
            ],
            "alone": [str(member.path) for member in self.alone],
            "chance": self.chance.record(),
        }


def _steps_text(steps: Sequence[int]) -> str:
    """The first and the last step; empty if none is known."""
    return span(steps) if steps else ""


COLUMNS: tuple[Column[SharedStart], ...] = (
    Column("run", lambda row: row.number, "#", priority=ALWAYS),
    Column("adapters", lambda row: len(row.members), "adapters", priority=ALWAYS),
    Column("steps", lambda row: row.known_steps, "steps", _steps_text, priority=7),
    Column(
        "cosine",
        lambda row: row.cosine,
        "first to last",
        signed,
        priority=7,
        about="cosine of the updates of the first and the last step",
    ),
    Column("exact", lambda row: row.exact),
    Column("base", lambda row: base_of(row.members) or None, "base", align="left", priority=5),
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
MEMBER_COLUMNS: tuple[Column[RunMember], ...] = (
    Column("run", lambda row: row.run, "run"),
    Column("step", lambda row: row.step, "step"),
    Column("name", lambda row: row.member.name, "adapter", align="left"),
    Column("path", lambda row: str(row.member.path)),
)


def find_runs(fleet: "Fleet", *, sketch: bool = False) -> RunsResult:
    """Group the members of a fleet that began from the same random A.

    Two members began from the same A if the cosine of their start sketches is at least 0.5. Groups are the connected
    components of such pairs: training moves A, so the first and the last checkpoint of a long run may have less. A copy
    with other factors has another A, and belongs to the run of its original: updates with a cosine of at least 0.995 by
    sketches and norms within 1 % are in one group too.

    Parameters
    ----------
    fleet : Fleet
    sketch : bool
        State the cosine of every group by sketches, and read no file.
    """
    members, sketches = distinct_files(*fleet.snapshot())
    labels = np.arange(len(members))
    for same_start in connected_rows(sketches.start_directions, len(sketches), RUN):
        labels[same_start] = same_start[0]
    norms = np.array([member.frobenius for member in members])
    copies = np.array(list(near_pairs(sketches, norms, np.arange(len(members)), least=COPY)), dtype=np.int64)
    join_pairs(labels, *copies.reshape(-1, 2).T)
    groups = [rows for rows in rows_by_label(labels) if len(rows) > 1]
    groups.sort(key=lambda rows: (-len(rows), int(rows[0])))
    ordered = [_in_order_of_steps(members, rows.tolist()) for rows in groups]
    stepped = [[row for row, step in rows if step is not None] for rows in ordered]
    ends = [(rows[0], rows[-1]) for rows in stepped if len(rows) > 1]
    exact, spreads = ({}, []) if sketch else exact_ends(fleet, members, ends)
    runs = []
    for index, (rows, stepped_rows) in enumerate(zip(ordered, stepped, strict=True), 1):
        pair = (stepped_rows[0], stepped_rows[-1]) if len(stepped_rows) > 1 else None
        cosine = None if pair is None else exact.get(pair, _sketched_cosine(sketches, pair))
        steps = [step for _, step in rows]
        runs.append(SharedStart(index, [members[row] for row, _ in rows], steps, cosine, pair in exact))
    grouped = {row for rows in ordered for row, _ in rows}
    alone = [member for row, member in enumerate(members) if row not in grouped]
    spread = float(np.sqrt(np.mean(np.square(spreads)))) if spreads else None
    return RunsResult(runs, alone, ChanceLevels(spread, len(members)), fleet.command("runs", "--csv"))


def _sketched_cosine(sketches: Sketches, pair: tuple[int, int]) -> float:
    first, last = sketches.directions(rows=np.array(pair))
    return float(first @ last)


def _in_order_of_steps(members: Sequence[Member], rows: Sequence[int]) -> list[tuple[int, int | None]]:
    """The rows with their steps, in order of steps; those without a known step last."""
    stepped = [(row, checkpoint_step(members[row].path)) for row in rows]
    return sorted(stepped, key=lambda pair: (pair[1] is None, pair[1] or 0, members[pair[0]].name))
