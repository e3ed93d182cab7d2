"""Search by example: the members of a fleet whose updates are most like a given one."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.adapter import Adapter
from loralens.core.messages import progress, warn
from loralens.core.threads import in_threads, processor_count
from loralens.errors import LoraLensError, OptionError, place
from loralens.fleet.catalogue.members import Member
from loralens.fleet.levels import COPY, MEANINGS, ChanceLevels, Level, level_of
from loralens.fleet.search.inner import ExactCosine, ExactUpdate, ModuleKey, exact_cosine
from loralens.fleet.search.lookup import MemberLookup
from loralens.fleet.search.sameness import judge_sameness, known_steps
from loralens.fleet.sketching.sketches import Sketch, Sketches, fold, unit_rows
from loralens.formats import load
from loralens.linalg.factor import Integers
from loralens.tables.numbers import count, number, signed, size, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet

COARSE = 512  # numbers of the shorter sketches, which are compared with all members
# A cosine by sketches of 512 numbers is off by 0.044 on average and rarely by four times that. The best ten of 10,000
# members are among these in all of 100 searches that were tried.
COARSE_KEPT = 200  # members that are then compared by whole sketches
RERANKED = 30  # members whose files are read for exact cosines, unless three times k is more


@final
@dataclass(frozen=True, slots=True)
class Neighbour:
    """A member near the example.

    Attributes
    ----------
    sketch : float
        The cosine of the whole updates by sketches.
    start : float
        The cosine of the starts by sketches; 0 if one of them has no A.
    comparison : ExactCosine or None
        None if only sketches were compared.
    level : str
        See `loralens.fleet.levels`.
    """

    member: Member
    sketch: float
    start: float
    comparison: ExactCosine | None
    level: Level

    @property
    def exact(self) -> bool:
        """Whether `cosine` is exact."""
        return self.comparison is not None

    @property
    def cosine(self) -> float:
        """The cosine of the whole updates: exact, or by sketches if no other is known."""
        return self.comparison.cosine if self.comparison else self.sketch

    @property
    def common_cosine(self) -> float | None:
        """The exact cosine over the modules that both have."""
        return self.comparison.common_cosine if self.comparison else None

    @property
    def common_modules(self) -> int | None:
        """The number of these modules."""
        return self.comparison.common_modules if self.comparison else None

    @property
    def base_model(self) -> str | None:
        """The base model that the member names, or else shows."""
        return self.member.base or self.member.inferred


@final
@dataclass(frozen=True, slots=True)
class NearResult(Tabular):
    """The members near an example, the nearest first; the result is a sequence of them.

    Attributes
    ----------
    example : str
        The name of the example.
    modules : int
        The number of modules of the example.
    neighbours : sequence of Neighbour
    compared : int
        How many members have a module of the example, and were compared by sketches.
    read : int
        How many of them were compared exactly.
    chance : ChanceLevels
    reason : str
        Why there is no neighbour, in words; empty if there is one.
    """

    example: str
    modules: int
    neighbours: Sequence[Neighbour]
    compared: int
    read: int
    chance: ChanceLevels
    reason: str = ""

    def __len__(self) -> int:
        return len(self.neighbours)

    def __getitem__(self, index: int) -> Neighbour:
        return self.neighbours[index]

    def __repr__(self) -> str:
        return f"NearResult({self.example!r}, {count(len(self.neighbours), 'neighbour')})"

    def conclusion(self) -> list[str]:
        """Which member is nearest, and what that means."""
        if not self.neighbours:
            return [f"{self.example}: {self.reason}."]
        nearest = self.neighbours[0]
        cosine = f"cosine {signed(nearest.cosine)}"
        if not nearest.level:
            return [f"Nothing in the fleet is like {self.example}: the largest cosine is {signed(nearest.cosine)}."]
        words = {"copy": "a copy", "run": "from the same start", "family": "in one family with it", "kin": "kin"}
        name = f"{nearest.member.name}, {words[nearest.level]} ({cosine})"
        if self.compared == 1:
            return [f"The only other adapter with common modules is {name}."]
        return [f"Of {count(self.compared, 'adapter')} with common modules the nearest to {self.example} is {name}."]

    def tables(self) -> list[Table[Neighbour]]:
        """The neighbours, the nearest first."""
        return [Table(f"near {self.example}", COLUMNS, self.neighbours)]

    def sentences(self) -> list[str]:
        """What chance gives, and what the levels mean."""
        if not self.neighbours:
            return []
        levels = dict.fromkeys(row.level for row in self.neighbours)
        meanings = [f"{level or 'no level'}: {MEANINGS[level]}" for level in MEANINGS if level in levels]
        return [self.chance.sentence(sketched=not self.read), *meanings]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "example": self.example,
            "modules": self.modules,
            "compared": self.compared,
            "read": self.read,
            "chance": self.chance.record(),
            "reason": self.reason,
            "neighbours": Table("near", COLUMNS, self.neighbours).records(),
        }


COLUMNS: tuple[Column[Neighbour], ...] = (
    Column("name", lambda row: row.member.name, "adapter", align="left", priority=ALWAYS, distinct=True),
    Column("path", lambda row: str(row.member.path)),
    Column("level", lambda row: row.level or None, "level", align="left", priority=8),
    Column("cosine", lambda row: row.cosine, "cosine", signed, priority=ALWAYS, about="of the whole updates"),
    Column(
        "common_cosine",
        lambda row: row.common_cosine,
        "common",
        signed,
        priority=7,
        about="cosine over the modules that both have",
    ),
    Column("common_modules", lambda row: row.common_modules, "modules", priority=5, about="modules that both have"),
    Column("exact", lambda row: row.exact),
    Column("sketch", lambda row: row.sketch, "sketch", signed, priority=2, about="cosine by sketches"),
    Column("start", lambda row: row.start, "start", signed, priority=4, about="cosine of the first A, by sketches"),
    Column("base_model", lambda row: row.base_model, "base", align="left", priority=3),
    Column("ranks", lambda row: list(row.member.ranks), "r", span, priority=6),
    Column("frobenius", lambda row: row.member.frobenius, "‖ΔW‖F", number, priority=4),
    Column("bytes", lambda row: row.member.bytes, "size", size, priority=1),
)


@dataclass(frozen=True, slots=True)
class _Example:
    """What is searched for: its modules, its sketch, the member that it is, if it is one, and how to read it."""

    label: str
    modules: frozenset[ModuleKey]
    sketch: Sketch
    read: Callable[[], Adapter]
    row: int | None = None
    member: Member | None = None


def find_near(
    fleet: "Fleet", adapter: "Adapter | str | PathLike[str]", k: int = 10, *, sketch: bool = False, exact: bool = False
) -> NearResult:
    """The members whose updates have the largest cosines with that of an example.

    Parameters
    ----------
    fleet : Fleet
    adapter : Adapter, path or str
        An adapter, a path, or the name of a member. A member is not compared with itself.
    k : int
        How many neighbours to return.
    sketch : bool
        Compare sketches only, and read no file of the fleet.
    exact : bool
        Compare every member exactly that has a module of the example, instead of those that sketches propose.

    Raises
    ------
    OptionError
        Both ``sketch`` and ``exact``; or ``k`` is below 1.
    FormatError
        The example cannot be read, or is a member whose file has changed since it was indexed.
    """
    if sketch and exact:
        raise OptionError(
            "sketch and exact exclude each other", fix="give one of them, or none to read only the nearest"
        )
    if k < 1:
        raise OptionError(f"k is {k}, and there is nothing to show below 1", fix="give 1 or more")
    members, sketches = fleet.snapshot()
    lookup = fleet.lookup(members)
    example = _example(fleet, adapter, lookup, sketches)
    # An update of 0 has no direction to compare.
    comparable = sketches.steps > 0
    if example.row is not None:
        comparable &= ~lookup.of_file(example.row)
    # The noise of sketches without a common module would crowd out neighbours with a small cosine.
    comparable_rows = np.flatnonzero(comparable & lookup.sharing(fleet, example.modules))
    compared = len(comparable_rows)
    if not compared or not example.sketch.step:
        reason = "no other adapter of the fleet has an update of the same modules"
        if not example.sketch.step:
            reason = "its ΔW is 0, so it has no direction that could be compared"
        return NearResult(example.label, len(example.modules), [], compared, 0, ChanceLevels(None, compared), reason)
    own = None if sketch else example.read()
    if exact:
        rows = comparable_rows
    else:
        rows = propose(sketches, example.sketch, comparable_rows, k if sketch else max(RERANKED, 3 * k))
    cosines = _exact_cosines(fleet, members, rows, own) if own else {}
    scores = sketches.directions(rows=rows) @ _direction(example.sketch.codes)
    starts = sketches.start_directions(rows) @ _direction(example.sketch.start)
    neighbours = [
        _Pair(row, score, start, cosines.get(row)).neighbour(fleet, members, example, own)
        for row, score, start in zip(rows.tolist(), scores.tolist(), starts.tolist(), strict=True)
        # A file that has changed since it was indexed has no exact cosine, and its sketch is out of date.
        if own is None or row in cosines
    ]
    # Cosines are rounded, since the last bits of equal ones differ between machines, and the order would then too.
    neighbours.sort(key=lambda neighbour: (-round(neighbour.cosine, 9), neighbour.member.name))
    spreads = [one.spread for one in cosines.values() if one.common_modules]
    chance = ChanceLevels(sqrt(sum(x * x for x in spreads) / len(spreads)) if spreads else None, compared)
    reason = "" if neighbours else "others have the same modules, but none of their files is as it was indexed"
    return NearResult(example.label, len(example.modules), neighbours[:k], compared, len(cosines), chance, reason)


def propose(sketches: Sketches, example: Sketch, rows: Integers, most: int) -> Integers:
    """The rows with the largest cosines by sketches, the largest first: by shorter ones, and the best by whole ones."""
    short = sketches.shorter(COARSE) @ unit_rows(fold(example.codes[None], COARSE))[0]
    candidates = rows[_largest(short[rows], max(COARSE_KEPT, 4 * most))]
    cosines = sketches.directions(rows=candidates) @ _direction(example.codes)
    return candidates[_largest(cosines, most)]


def _direction(codes: NDArray[np.int8]) -> NDArray[np.float32]:
    """One sketch divided by its length."""
    return np.asarray(unit_rows(codes[None].astype(np.float32))[0], dtype=np.float32)


def _largest(values: Any, most: int) -> Integers:
    """The indices of the largest values, the largest first."""
    few = np.argpartition(-values, most)[:most] if most < len(values) else np.arange(len(values))
    return np.asarray(few[np.argsort(-values[few], kind="stable")], dtype=np.int64)


def _example(
    fleet: "Fleet", source: "Adapter | str | PathLike[str]", lookup: MemberLookup, sketches: Sketches
) -> _Example:
    """The example: an object, a member by its name or path, or any other file."""
    if isinstance(source, Adapter):
        return _Example("the adapter", _module_keys(fleet, source), fleet.sketch(source), lambda: source)
    row = lookup.row_of(source)
    if row is not None:
        member = lookup.members[row]
        # This is checked even if only sketches are compared: the index has the sketch of what the file was.
        fleet.check_unchanged(member)
        signature = fleet.signature(member)
        keys = frozenset(zip(signature.keys, signature.shapes, strict=True))
        sketch = sketches.at(row)
        return _Example(member.name, keys, sketch, lambda: fleet.adapter(member), row, member)
    try:
        adapter = load(Path(source))
    except OptionError as error:
        # A text that is no path may be the misspelt name of a member.
        if os.path.lexists(source):
            raise
        name = os.fspath(source)
        for file in fleet.unreadable():
            if file.name == name.rstrip("/"):
                what = f"{name}: this file of the fleet cannot be read: {file.reason}"
                raise OptionError(what, fix=file.fix) from error
        raise _without_name(name, lookup, error.fix) from error
    # The errors of measurements name modules.
    with place(str(source)):
        sketch = fleet.sketch(adapter)
    return _Example(str(source), _module_keys(fleet, adapter), sketch, lambda: adapter)


def _without_name(name: str, lookup: MemberLookup, fix: str) -> OptionError:
    """The error for an example that is no member and no file; ``fix`` is the advice if no name is similar."""
    names = lookup.nearest_names(name)
    nearest = f"the nearest names in the fleet are {', '.join(names)}" if len(names) > 1 else ""
    nearest = nearest or (f"the nearest name in the fleet is {names[0]}" if names else fix)
    return OptionError(f"{name}: no adapter of the fleet has this name, and there is no such file", fix=nearest)


def _module_keys(fleet: "Fleet", adapter: Adapter) -> frozenset[ModuleKey]:
    return frozenset((key, adapter[name].shape) for key, name in fleet.modules(adapter).items())


def _exact_cosines(
    fleet: "Fleet", members: Sequence[Member], rows: Integers, adapter: Adapter
) -> dict[int, ExactCosine]:
    """Row → exact cosine with an adapter; files that have changed since they were indexed are left out and named."""
    own = ExactUpdate.of(adapter, fleet.modules(adapter))
    failed: list[str] = []
    with progress("reading", len(rows)) as step:

        def compare(row: str) -> ExactCosine | None:
            try:
                other = fleet.adapter(members[int(row)])
                return exact_cosine(own, ExactUpdate.of(other, fleet.modules(other)))
            except LoraLensError:  # it has changed, and may be anything now
                failed.append(members[int(row)].name)
                return None

        compared = in_threads(compare, [str(row) for row in rows.tolist()], processor_count(), step)
    if failed:
        warn(
            f"{count(len(failed), 'file')} left out, as they have changed since they were indexed: {min(failed)}",
            fix=f"index the fleet again: {fleet.index_command}",
        )
    return {int(row): cosine for row, cosine in compared.items() if cosine}


class _Pair(NamedTuple):
    """A row that is compared with the example."""

    row: int
    sketch: float
    start: float
    exact: ExactCosine | None

    def neighbour(self, fleet: "Fleet", members: Sequence[Member], example: _Example, own: Adapter | None) -> Neighbour:
        """The member as a neighbour of the example, with its level; ``own`` is None if no file is read."""
        member = members[self.row]
        copy = False
        if example.member and example.member.fingerprint == member.fingerprint:
            copy = True
        elif own and self.exact and self.exact.cosine >= COPY:
            # A copy is confirmed by reading both once more, module by module.
            adapters = own, fleet.adapter(member)
            first, second = (ExactUpdate.of(adapter, fleet.modules(adapter)) for adapter in adapters)
            own_steps = known_steps(members, example.member.fingerprint) if example.member else set()
            steps = own_steps, known_steps(members, member.fingerprint)
            copy = judge_sameness(*adapters, (first, second), steps=steps).is_copy
        level = level_of(self.exact.cosine if self.exact else self.sketch, start=self.start, copy=copy)
        return Neighbour(member, self.sketch, self.start, self.exact, level)
