"""Groups of members that are alike: families by their updates, and runs by their initialisations.

Sketches decide which members belong together, in blocks of bounded memory. The cosines that are stated are exact.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import OptionError
from loralens.fleet.catalogue import Member
from loralens.fleet.fleet_index import FleetIndex
from loralens.fleet.likeness import COPY, COPY_NORM, FAMILY, RUN, SIMILAR, ChanceLevels, ExactCosine, exact_cosine
from loralens.fleet.sketches import Sketches, unit_rows
from loralens.formats.records.training import checkpoint_step
from loralens.linalg.factor import Floats, Integers
from loralens.linalg.pairwise import average_linkage_groups, join_pairs

Directions = NDArray[np.float32]

# A block of 1,024 sketches of 4,096 numbers in float32 takes 16 MiB, and a product of two blocks 4 MiB.
BLOCK = 1024
COARSE = 1024  # numbers of the shorter sketches, which find the candidates in a quarter of the time
# The difference between the cosines by sketches of 1,024 and of 4,096 numbers has a standard deviation of at most
# √(1/1024 − 1/4096) = 0.027. The margin is four times that.
MARGIN = 0.11  # how far below a level a pair of the shorter sketches counts as a candidate
LARGEST = 30_000  # members whose similarities are in one matrix, which takes 3.6 GB in float32
# The sketches of two nearly equal updates differ by their rounding to int8 alone, 1e-4 of the cosine.
SKETCHED_COPY = COPY - 0.01  # smallest cosine by sketches of a pair that may be a copy
BAND = 512  # members of nearly equal norms whose sketches are compared in one product: 8 MiB
SKETCH_ERROR = 0.06  # largest error of a cosine by sketches; docs/commands/fleet.md has what was measured
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


def base_of(members: Sequence[Member]) -> str:
    """The base of most members: the one that they name, else the one that their names and shapes show."""
    bases = Counter(base for member in members if (base := member.base or member.inferred))
    return bases.most_common(1)[0][0] if bases else ""


def find_families(
    index: FleetIndex, at: float = FAMILY, *, sketch: bool = False
) -> tuple[list[Family], list[Member], ChanceLevels]:
    """The families of a fleet, the members that are in none, and what chance gives; see `loralens.Fleet.families`."""
    # Below 0.1 the groups would depend on the error of the sketches, which is up to 0.06.
    if not SIMILAR / 2 <= at <= 1:
        what = f"at is {at:g}, and a level lies between 0.1 and 1"
        raise OptionError(what, fix=f"give {FAMILY}, or {SIMILAR} for similar adapters")
    members, sketches = distinct_files(*index.snapshot())
    alike = alike_groups(sketches, at)
    if not sketch:
        alike = [group for rows in alike for group in _at_level(index, members, sketches, rows, at)]
        alike.sort(key=lambda group: (-len(group), int(group[0])))
    groups = [middle_first(sketches, rows).tolist() for rows in alike]
    ends = [(rows[0], rows[-1]) for rows in groups]
    cosines, others, chance = _cosines_of_ends(index, members, sketches, ends, groups, sketch=sketch)
    families = [
        Family(number, [members[row] for row in rows], *cosine)
        for number, (rows, cosine) in enumerate(zip(groups, cosines, strict=True), 1)
    ]
    return families, others, chance


def find_runs(index: FleetIndex, *, sketch: bool = False) -> tuple[list[SharedStart], list[Member], ChanceLevels]:
    """The groups that began from the same A, the members in none, and what chance gives; see `loralens.Fleet.runs`."""
    members, sketches = distinct_files(*index.snapshot())
    labels = np.arange(len(members))
    for same_start in connected_rows(sketches.start_directions, len(sketches), RUN):
        labels[same_start] = same_start[0]
    norms = np.array([member.frobenius for member in members])
    # A copy with other factors has another A, and belongs to the run of its original.
    copies = np.array(list(near_pairs(sketches, norms, np.arange(len(members)), least=COPY)), dtype=np.int64)
    join_pairs(labels, *copies.reshape(-1, 2).T)
    groups = [rows.tolist() for rows in rows_by_label(labels) if len(rows) > 1]
    groups.sort(key=lambda rows: (-len(rows), rows[0]))
    step_of = {row: checkpoint_step(members[row].path) for rows in groups for row in rows}
    for rows in groups:
        rows.sort(key=lambda row: (step_of[row] is None, step_of[row] or 0, members[row].name))
    stepped = [[row for row in rows if step_of[row] is not None] for rows in groups]
    ends = [(rows[0], rows[-1]) if len(rows) > 1 else None for rows in stepped]
    cosines, others, chance = _cosines_of_ends(index, members, sketches, ends, groups, sketch=sketch)
    runs = [
        SharedStart(number, [members[row] for row in rows], [step_of[row] for row in rows], *cosine)
        for number, (rows, cosine) in enumerate(zip(groups, cosines, strict=True), 1)
    ]
    return runs, others, chance


def _cosines_of_ends(
    index: FleetIndex,
    members: Sequence[Member],
    sketches: Sketches,
    ends: Sequence[tuple[int, int] | None],
    groups: Sequence[Sequence[int]],
    sketch: bool,
) -> tuple[list[tuple[Any, bool]], list[Member], ChanceLevels]:
    """The cosine of two members of each group and whether it is exact, the members in no group, and what chance gives.

    Pairs with a file that has changed since it was indexed, and all pairs with ``sketch``, are compared by sketches.
    """

    def compare(pair: tuple[int, int]) -> ExactCosine:
        return exact_cosine(*(index.exact_of(members[row]) for row in pair))

    exact = index.in_threads([] if sketch else [pair for pair in ends if pair], compare, "not read")
    cosines: list[tuple[float | None, bool]] = []
    for pair in ends:
        first, last = sketches.directions(rows=np.array(pair or (0, 0)))
        known = exact[pair].cosine if pair in exact else float(first @ last)
        cosines.append((known if pair else None, pair in exact))
    grouped = {row for rows in groups for row in rows}
    others = [member for row, member in enumerate(members) if row not in grouped]
    return cosines, others, ChanceLevels.of([one.spread for one in exact.values()], len(members))


def _at_level(
    index: FleetIndex, members: Sequence[Member], sketches: Sketches, rows: Integers, at: float
) -> list[Integers]:
    """The rows of a group by sketches, or the groups of average linkage among them by exact cosines."""
    if len(rows) > FEW or cosines_among(sketches, rows)[np.triu_indices(len(rows), 1)].mean() >= at + SKETCH_ERROR:
        return [rows]
    exact = exact_cosines(index, [members[row] for row in rows])
    if exact is None:
        return [rows]
    labels = average_linkage_groups(exact.astype(np.float32), at)
    return [rows[group] for group in rows_by_label(labels) if len(group) > 1]


def exact_cosines(index: FleetIndex, members: Sequence[Member]) -> Floats | None:
    """The exact cosines of all pairs of members; None, and a warning, if a file has changed since it was indexed."""
    updates = index.in_threads(range(len(members)), lambda row: index.exact_of(members[row]), "compared by sketches")
    if len(updates) < len(members):
        return None
    cosines = np.eye(len(updates))
    for i, j in combinations(range(len(updates)), 2):
        cosines[i, j] = cosines[j, i] = exact_cosine(updates[i], updates[j]).cosine
    return cosines


def middle_first(sketches: Sketches, rows: Integers) -> Integers:
    """The rows of a group, those nearest to the mean of their directions first."""
    directions = sketches.directions(rows=rows)
    middle = unit_rows(directions.mean(axis=0, keepdims=True))[0]
    # The numbers are rounded, since the last bits of equal rows may differ between two products, and the order would
    # then change.
    nearness = np.round(directions @ middle, 5)
    return np.asarray(rows[np.argsort(-nearness, kind="stable")], dtype=np.int64)


# By sketches


def near_pairs(
    sketches: Sketches, norms: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], *, least: float = SKETCHED_COPY
) -> Iterator[tuple[int, int]]:
    """Pairs of rows that may be copies: their norms are within 1 %, and their sketches nearly parallel.

    The rows are sorted by their norms, so that only a narrow band of all pairs is compared.
    """
    order = np.argsort(norms, kind="stable")
    order = order[norms[order] > 0]
    sorted_norms, sorted_rows = norms[order], rows[order]
    for start in range(0, len(order), BAND):
        block = slice(start, min(start + BAND, len(order)))
        limits = sorted_norms[block] * (1 + 2 * COPY_NORM)
        directions = sketches.directions(rows=sorted_rows[block])
        end = int(np.searchsorted(sorted_norms, limits[-1], side="right"))
        # The band is divided into blocks too, since all norms of a fleet may be nearly equal.
        for first in range(start, end, BAND):
            band = slice(first, min(first + BAND, end))
            cosines = directions @ sketches.directions(rows=sorted_rows[band]).T
            later = np.arange(band.start, band.stop) > np.arange(block.start, block.stop)[:, None]
            near = later & (cosines >= least) & (sorted_norms[band] <= limits[:, None])
            for i, j in zip(*np.nonzero(near), strict=True):
                pair = int(sorted_rows[start + i]), int(sorted_rows[first + j])
                yield min(pair), max(pair)


def connected_rows(directions: Callable[[slice], Directions], count: int, at: float) -> list[Integers]:
    """The connected components of pairs with at least this cosine; members without such a partner are left out.

    Parameters
    ----------
    directions : callable
        A slice of rows → these rows as unit vectors, float32.
    count : int
        The number of rows.
    at : float
        The smallest cosine of a pair.

    Notes
    -----
    The product of every pair of blocks is formed once and not kept, so the memory is a few blocks whatever ``count``
    is.
    """
    labels = np.arange(count)
    for rows, columns in _block_pairs(count):
        first = directions(rows)
        second = first if rows == columns else directions(columns)
        near, far = np.nonzero(first @ second.T >= at)
        join_pairs(labels, near + rows.start, far + columns.start)
    return [group for group in rows_by_label(labels) if len(group) > 1]


def alike_groups(sketches: Sketches, at: float) -> list[Integers]:
    """Groups of average linkage at a level of the cosine: sorted rows, the largest group first.

    Shorter sketches find the components of pairs that may reach the level. Within a component the whole sketches
    decide. Average linkage never joins two groups without a pair at the level, so no group extends beyond a component.
    """
    groups: list[Integers] = []
    for rows in connected_rows(lambda rows: sketches.directions(COARSE, rows), len(sketches), at - MARGIN):
        if len(rows) > LARGEST:
            what = f"{len(rows):,} adapters are so alike that all of their pairs would have to be in memory"
            raise OptionError(what, fix="give a higher level (--at), or index parts of the collection")
        labels = average_linkage_groups(cosines_among(sketches, rows), at)
        groups += [rows[group] for group in rows_by_label(labels) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def cosines_among(sketches: Sketches, rows: Integers) -> Directions:
    """The cosines of all pairs of these rows by whole sketches, float32, shape (n, n)."""
    cosines = np.empty((len(rows), len(rows)), dtype=np.float32)
    for first, second in _block_pairs(len(rows)):
        tile = sketches.directions(rows=rows[first]) @ sketches.directions(rows=rows[second]).T
        cosines[first, second] = tile
        cosines[second, first] = tile.T
    return cosines


def rows_by_label(labels: Integers) -> list[Integers]:
    """The rows of each label, in order of labels."""
    order = np.argsort(labels, kind="stable")
    bounds = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, bounds) if len(labels) else []


def _block_pairs(count: int) -> Iterator[tuple[slice, slice]]:
    """Every pair of blocks of rows once, and every block with itself."""
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    return combinations_with_replacement(blocks, 2)


# Files with several paths


def distinct_files(members: Sequence[Member], sketches: Sketches) -> tuple[Sequence[Member], Sketches]:
    """The members and their sketches without further paths to a file that another member has already.

    Groups would otherwise count a file twice that is reached through a link.
    """
    files = paths_by_file(members)
    if len(files) == len(members):
        return members, sketches
    rows = np.array(sorted(paths[0] for paths in files))
    return [members[row] for row in rows], sketches.take(rows)


def paths_by_file(members: Sequence[Member]) -> list[list[int]]:
    """The rows of each file: the path without links first."""
    by_file: dict[str, list[int]] = {}
    for row, member in enumerate(members):
        by_file.setdefault(member.real, []).append(row)
    # Only files with several paths need a look at the disk.
    return [
        rows if len(rows) == 1 else sorted(rows, key=lambda row: (members[row].path.is_symlink(), members[row].name))
        for rows in by_file.values()
    ]
