"""Search by example: the members of a fleet whose updates are most like a given one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.adapter import Adapter
from loralens.errors import LoraLensError, MissingFileError, OptionError, place
from loralens.fleet.catalogue import Member
from loralens.fleet.fleet_index import FleetIndex
from loralens.fleet.likeness import (
    COPY,
    ChanceLevels,
    ExactCosine,
    ExactUpdate,
    Level,
    ModuleKey,
    exact_cosine,
    judge_sameness,
    known_steps,
    level_of,
)
from loralens.fleet.sketches import Sketch, Sketches, fold, unit_rows
from loralens.fleet.updating import real_of
from loralens.formats import load
from loralens.formats.files.location import find_adapter
from loralens.linalg.factor import Integers

COARSE = 512  # numbers of the shorter sketches, which are compared with all members
# A cosine by sketches of 512 numbers is off by 0.044 on average and rarely by four times that. The best ten of 10,000
# members are among these in all of 100 searches that were tried.
COARSE_KEPT = 200  # members that are then compared by whole sketches
RERANKED = 30  # members whose files are read for exact cosines, unless three times k is more
SIMILAR = 3  # names that are shown if no member has a name
LOOKED_AT = 10_000  # most names that are compared with a misspelt one; they take a second


@final
@dataclass(frozen=True, slots=True)
class Neighbour:
    """A member near the example.

    Attributes
    ----------
    sketch : float
        The cosine of the whole updates by sketches.
    start : float
        The cosine of the initialisations by sketches; 0 if one of them has no A.
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
        return self.comparison and self.comparison.common_cosine

    @property
    def common_modules(self) -> int | None:
        """The number of these modules."""
        return self.comparison and self.comparison.common_modules

    @property
    def base_model(self) -> str | None:
        """The base model that the member names, or else shows."""
        return self.member.base or self.member.inferred


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
    row = _row_of(members, adapter)
    example = None if row is None else members[row]
    # An update of 0 has no direction to compare.
    comparable = sketches.steps > 0
    if row is None or example is None:
        given = adapter if isinstance(adapter, Adapter) else _load(members, adapter)
        own: Adapter | None = given
        label = "the adapter" if isinstance(adapter, Adapter) else str(adapter)
        # The errors of measurements name modules.
        with place("" if isinstance(adapter, Adapter) else label):
            sketch_of_own = index.sketch(given)
        modules = {(key, given[name].shape) for key, name in index.modules(given).items()}
    else:
        # This is checked even if only sketches are compared: the index has the sketch of what the file was.
        index.check_unchanged(example)
        own = None if sketch else index.adapter(example)
        label, sketch_of_own, modules = example.name, sketches.at(row), _modules_of(index, example)
        comparable &= [member.real != example.real for member in members]
    # The noise of sketches without a common module would crowd out neighbours with a small cosine.
    shares = {
        digest: not modules.isdisjoint(_modules_of(index, member))
        for digest, member in {member.signature: member for member in members}.items()
    }
    comparable &= [shares[member.signature] for member in members]
    rows = np.flatnonzero(comparable)
    compared = len(rows)
    if not compared or not sketch_of_own.step:
        reason = "no other adapter of the fleet has an update of the same modules"
        if not sketch_of_own.step:
            reason = "its ΔW is 0, so it has no direction that could be compared"
        return label, len(modules), [], compared, 0, ChanceLevels(None, compared), reason
    if not exact:
        rows = propose(sketches, sketch_of_own, rows, k if sketch else max(RERANKED, 3 * k))
    cosines: dict[int, ExactCosine] = {}
    if own and not sketch:
        update = ExactUpdate.of(own)
        cosines = index.in_threads(
            rows.tolist(), lambda row: exact_cosine(update, index.exact_of(members[row])), "left out"
        )
    scores = sketches.directions(rows=rows) @ _direction(sketch_of_own.codes)
    starts = sketches.start_directions(rows) @ _direction(sketch_of_own.start)
    neighbours = []
    for row, score, start in zip(rows.tolist(), scores.tolist(), starts.tolist(), strict=True):
        # A file that has changed since it was indexed has no exact cosine, and its sketch is out of date.
        found = cosines.get(row)
        if not sketch and not found:
            continue
        copy = example is not None and example.fingerprint == members[row].fingerprint
        if not copy and own and found and found.cosine >= COPY:
            copy = _is_copy(index, example, own, members[row])
        level = level_of(found.cosine if found else score, start=start, copy=copy)
        neighbours.append(Neighbour(members[row], score, start, found, level))
    # Cosines are rounded, since the last bits of equal ones differ between machines, and the order would then too.
    neighbours.sort(key=lambda neighbour: (-round(neighbour.cosine, 9), neighbour.member.name))
    chance = ChanceLevels.of([one.spread for one in cosines.values() if one.common_modules], compared)
    reason = "" if neighbours else "others have the same modules, but none of their files is as it was indexed"
    return label, len(modules), neighbours[:k], compared, len(cosines), chance, reason


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


def _row_of(members: Sequence[Member], source: Adapter | str | PathLike[str]) -> int | None:
    """The row of a member by its file, its folder if that holds no other one, or its name; None if it is none."""
    if isinstance(source, Adapter):
        return None
    # A path that exists is meant as a path.
    if not os.path.lexists(source):
        name = os.fspath(source).rstrip("/")
        return next((row for row, member in enumerate(members) if member.name == name), None)
    path = Path(source)
    try:
        real = real_of(find_adapter(path).file if path.is_dir() else path)
    except LoraLensError:  # several adapters, or none: `load` says so
        return None
    return next((row for row, member in enumerate(members) if real and member.real == real), None)


def _load(members: Sequence[Member], source: str | PathLike[str]) -> Adapter:
    """The adapter of a file outside of the fleet."""
    try:
        return load(Path(source))
    except OptionError as error:
        # A text that is no path may be the misspelt name of a member.
        if os.path.lexists(source):
            raise
        from difflib import get_close_matches  # only when something is wrong

        name, known = os.fspath(source), [member.name for member in members]
        names = [one for one in known if name.lower() in one.lower()][:SIMILAR]
        names = names or get_close_matches(name, known[:LOOKED_AT], SIMILAR)
        what = f"{name}: no adapter of the fleet has this name, and there is no such file"
        words = "names in the fleet are" if len(names) > 1 else "name in the fleet is"
        raise MissingFileError(what, fix=f"the nearest {words} {', '.join(names)}" if names else error.fix) from error


def _modules_of(index: FleetIndex, member: Member) -> set[ModuleKey]:
    signature = index.signature(member)
    return set(zip(signature.keys, signature.shapes, strict=True))


def _is_copy(index: FleetIndex, example: Member | None, own: Adapter, member: Member) -> bool:
    """Whether a member is a copy of the example, which is confirmed by reading both once more, module by module."""
    steps = [
        known_steps(one for one in index.members() if same and one.fingerprint == same.fingerprint)
        for same in (example, member)
    ]
    return judge_sameness(own, index.adapter(member), steps=steps).is_copy
