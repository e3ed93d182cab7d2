"""Search by example: the members of a fleet whose updates are most like a given one."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.adapter import Adapter
from loralens.errors import OptionError, place
from loralens.fleet.catalogue import Member
from loralens.fleet.fleet_index import FleetIndex, MemberLookup
from loralens.fleet.likeness import (
    COPY,
    ChanceLevels,
    ExactCosine,
    Level,
    ModuleKey,
    exact_cosine,
    judge_sameness,
    known_steps,
    level_of,
)
from loralens.fleet.sketches import Sketch, Sketches, fold, unit_rows
from loralens.formats import load
from loralens.linalg.factor import Integers

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
        See `loralens.fleet.likeness`.
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
    index: FleetIndex, adapter: Adapter | str | PathLike[str], k: int = 10, *, sketch: bool = False, exact: bool = False
) -> tuple[str, int, list[Neighbour], int, int, ChanceLevels, str]:
    """The members whose updates have the largest cosines with that of an example; see `loralens.Fleet.near`.

    Returns the attributes of its result: the name of the example, the number of its modules, the neighbours, how many
    members were compared and how many of them read, what chance gives, and why there is no neighbour.
    """
    if sketch and exact:
        raise OptionError(
            "sketch and exact exclude each other", fix="give one of them, or none to read only the nearest"
        )
    if k < 1:
        raise OptionError(f"k is {k}, and there is nothing to show below 1", fix="give 1 or more")
    members, sketches = index.snapshot()
    lookup = index.lookup(members)
    example = _example(index, adapter, lookup, sketches)
    # An update of 0 has no direction to compare.
    comparable = sketches.steps > 0
    if example.row is not None:
        comparable &= ~lookup.of_file(example.row)
    # The noise of sketches without a common module would crowd out neighbours with a small cosine.
    rows = np.flatnonzero(comparable & lookup.sharing(index, example.modules))
    compared = len(rows)
    if not compared or not example.sketch.step:
        reason = "no other adapter of the fleet has an update of the same modules"
        if not example.sketch.step:
            reason = "its ΔW is 0, so it has no direction that could be compared"
        return example.label, len(example.modules), [], compared, 0, ChanceLevels(None, compared), reason
    if not exact:
        rows = propose(sketches, example.sketch, rows, k if sketch else max(RERANKED, 3 * k))
    own = None if sketch else example.read()
    cosines: dict[int, ExactCosine] = {}
    if own:
        update = index.exact(own)
        cosines = index.in_threads(
            rows.tolist(), lambda row: exact_cosine(update, index.exact_of(members[row])), "left out"
        )
    scores = sketches.directions(rows=rows) @ _direction(example.sketch.codes)
    starts = sketches.start_directions(rows) @ _direction(example.sketch.start)
    neighbours = []
    for row, score, start in zip(rows.tolist(), scores.tolist(), starts.tolist(), strict=True):
        # A file that has changed since it was indexed has no exact cosine, and its sketch is out of date.
        if own and row not in cosines:
            continue
        found = cosines.get(row)
        copy = _is_copy(index, example, own, members[row], found)
        level = level_of(found.cosine if found else score, start=start, copy=copy)
        neighbours.append(Neighbour(members[row], score, start, found, level))
    # Cosines are rounded, since the last bits of equal ones differ between machines, and the order would then too.
    neighbours.sort(key=lambda neighbour: (-round(neighbour.cosine, 9), neighbour.member.name))
    spreads = [one.spread for one in cosines.values() if one.common_modules]
    chance = ChanceLevels(sqrt(sum(x * x for x in spreads) / len(spreads)) if spreads else None, compared)
    reason = "" if neighbours else "others have the same modules, but none of their files is as it was indexed"
    return example.label, len(example.modules), neighbours[:k], compared, len(cosines), chance, reason


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
    index: FleetIndex, source: Adapter | str | PathLike[str], lookup: MemberLookup, sketches: Sketches
) -> _Example:
    """The example: an object, a member by its name or path, or any other file."""
    if isinstance(source, Adapter):
        return _Example("the adapter", _module_keys(index, source), index.sketch(source), lambda: source)
    row = lookup.row_of(source)
    if row is not None:
        member = lookup.members[row]
        # This is checked even if only sketches are compared: the index has the sketch of what the file was.
        index.check_unchanged(member)
        signature = index.signature(member)
        keys = frozenset(zip(signature.keys, signature.shapes, strict=True))
        return _Example(member.name, keys, sketches.at(row), lambda: index.adapter(member), row, member)
    try:
        adapter = load(Path(source))
    except OptionError as error:
        # A text that is no path may be the misspelt name of a member.
        if os.path.lexists(source):
            raise
        name = os.fspath(source)
        for file in index.unreadable():
            if file.name == name.rstrip("/"):
                what = f"{name}: this file of the fleet cannot be read: {file.reason}"
                raise OptionError(what, fix=file.fix) from error
        names = lookup.nearest_names(name)
        nearest = f"the nearest names in the fleet are {', '.join(names)}" if len(names) > 1 else ""
        nearest = nearest or (f"the nearest name in the fleet is {names[0]}" if names else error.fix)
        what = f"{name}: no adapter of the fleet has this name, and there is no such file"
        raise OptionError(what, fix=nearest) from error
    # The errors of measurements name modules.
    with place(str(source)):
        sketch = index.sketch(adapter)
    return _Example(str(source), _module_keys(index, adapter), sketch, lambda: adapter)


def _module_keys(index: FleetIndex, adapter: Adapter) -> frozenset[ModuleKey]:
    return frozenset((key, adapter[name].shape) for key, name in index.modules(adapter).items())


def _is_copy(
    index: FleetIndex, example: _Example, own: Adapter | None, member: Member, found: ExactCosine | None
) -> bool:
    """Whether a member is a copy of the example; ``own`` and ``found`` are None if no file is read."""
    fingerprint = example.member.fingerprint if example.member else None
    if fingerprint == member.fingerprint:
        return True
    if not (own and found and found.cosine >= COPY):
        return False
    # A copy is confirmed by reading both once more, module by module.
    other = index.adapter(member)
    first, second = (
        known_steps(one for one in index.members() if one.fingerprint == numbers)
        for numbers in (fingerprint, member.fingerprint)
    )
    return judge_sameness(own, other, (index.exact(own), index.exact(other)), steps=(first, second)).is_copy
