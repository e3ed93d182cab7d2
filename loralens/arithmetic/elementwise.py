"""What elementwise rules share: the entries of several updates, the spaces in which they act, and whole cutoffs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from math import pow as power
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
from numpy.typing import DTypeLike

from loralens.arithmetic.subspace_methods import output_basis
from loralens.choices import Space
from loralens.core.joint import COMBINED, Joint
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.threads import Step, in_threads
from loralens.linalg.exact import ExactProduct, exact_product
from loralens.linalg.factor import Floats, Integers, aligned
from loralens.linalg.order_statistics import Selection, kth_largest
from loralens.linalg.product import truncating_maps
from loralens.linalg.randomized import low_rank_approximation

BLOCK = 1 << 18  # entries of one update in a block: 64 rows of 4096, of which products are computed fastest
SAMPLED = 1 / 4  # times size^(2/3): the number of entries that are sampled for an order statistic of one update
FEWEST = 8  # rows of a block at least: BLAS is slow on products of fewer rows

Fuse = Callable[[slice, Array], Array]


class Fused(NamedTuple):
    """The result of an elementwise rule.

    Attributes
    ----------
    update : LowRank
        Balanced float64 factors, scale 1.
    truncation : float
        ‖F − ΔW‖_F / ‖F‖_F, where F is the result of the rule and ΔW the part of it that fits into the rank. Only the
        full space loses anything.
    """

    update: LowRank
    truncation: float


@final
@dataclass(frozen=True)
class Product:
    """w·ΔW as `loralens.linalg.exact` defines it: float32, with the same bits on every machine and in every block."""

    product: ExactProduct

    @classmethod
    def of(cls, update: LowRank, strength: float) -> "Product":
        """Multiply an update by its weight."""
        return cls(exact_product([(strength * update.scale, update.B, update.A)]))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.product.shape

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Write the rows ``start`` to ``stop`` into ``out``."""
        self.product.rows(start, stop, out)

    def at(self, i: Integers, j: Integers) -> Array:
        """Single entries, by their inner products."""
        return self.product.at(i, j)

    def magnitudes(self) -> Iterator[Array]:
        """All |entries|, some rows at a time."""
        m, n = self.shape
        step = max(FEWEST, BLOCK // n)
        for start in range(0, m, step):
            rows = self.product.rows(start, min(start + step, m))
            yield np.abs(rows, out=rows)


@final
@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A small float64 matrix in memory."""

    array: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.array.shape[0], self.array.shape[1]

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Write the rows ``start`` to ``stop`` into ``out``."""
        out[:] = self.array[start:stop]

    def at(self, i: Integers, j: Integers) -> Array:
        """Single entries."""
        return self.array[i, j]

    def magnitudes(self) -> Iterator[Array]:
        """All |entries| at once."""
        yield np.abs(self.array)


Matrix = Product | DenseMatrix  # one weighted update in some space


@final
@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of the weighted updates of one module.

    Attributes
    ----------
    matrices : tuple of Matrix
        All of one shape. Updates that are 0 or missing are left out.
    places : tuple of int
        The index of the adapter that each matrix belongs to.
    adapters : int
        The number T of adapters, those without a matrix included.
    dtype : dtype
        The dtype of the blocks.
    """

    matrices: tuple[Matrix, ...]
    places: tuple[int, ...]
    adapters: int
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrices[0].shape

    @property
    def size(self) -> int:
        """m·n."""
        return self.shape[0] * self.shape[1]

    @property
    def sampled(self) -> int:
        """The number of entries to sample for an order statistic of one update.

        A larger sample brackets the statistic more closely, and fewer entries have to be looked at singly.
        """
        return max(1, round(SAMPLED * power(self.size, 2 / 3)))

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of rows of all updates with their slice, shape (updates, rows, n), in a range of rows.

        The caller may write into a block. Its memory is used again for the next one.
        """
        m, n = self.shape
        # Rows are never divided, as DELLA ranks the entries of a row.
        step = min(m, max(FEWEST, BLOCK // n))
        last = m if last is None else last
        # One buffer for all blocks: a new one each time would be fresh memory pages (see `Workspace`).
        buffer = aligned(len(self.matrices) * step * n, self.dtype).reshape(len(self.matrices), step, n)
        for start in range(first, last, step):
            stop = min(start + step, last)
            block = buffer[:, : stop - start]
            for matrix, part in zip(self.matrices, block, strict=True):
                matrix.fill(start, stop, part)
            yield slice(start, stop), block

    def count(self, share: float) -> int:
        """Return the number of entries that is this share of all: rounded down, at least 1."""
        return max(1, int(share * self.size))

    def cutoffs(self, *ks: int) -> list[tuple[float, ...]]:
        """Return for every update its k-th largest |entry| for every k in ``ks``; exact for the numbers of `blocks`."""
        samples = [random_sizes(matrix, self.sampled) for matrix in self.matrices]
        return [
            kth_largest(matrix.magnitudes, ks, size=self.size, sample=sample)
            for matrix, sample in zip(self.matrices, samples, strict=True)
        ]

    def cutoff_of(self, measure: Callable[[Array], Array], k: int) -> float:
        """Return the k-th largest value of ``measure``, which maps entries of all updates, (updates, …), to (…)."""
        # The same places in every update.
        places = _random_places(self.shape, self.sampled)
        sample = measure(np.array([matrix.at(*places) for matrix in self.matrices]))
        return kth_largest(lambda: (measure(x) for _, x in self.blocks()), [k], size=self.size, sample=sample)[0]


def _random_places(shape: tuple[int, int], count: int) -> tuple[Integers, Integers]:
    """So many places in a matrix, the same ones each time."""
    # A fixed seed, so that the same passes are made each time. The result is exact whatever the sample is.
    rng = np.random.default_rng(0)
    return rng.integers(shape[0], size=count), rng.integers(shape[1], size=count)


def random_sizes(matrix: Matrix, count: int) -> Array:
    """The |entries| of a matrix at so many random places."""
    return np.abs(matrix.at(*_random_places(matrix.shape, count)))


class Workspace:
    """Arrays for intermediate results, which are used again: fresh memory pages cost ten times the arithmetic."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, np.dtype[Any]], Array] = {}
        self.views: dict[tuple[str, tuple[int, ...], DTypeLike], Array] = {}

    def of(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return the array of this name, with undefined contents."""
        # Most calls ask for what an earlier one has made.
        view = self.views.get((name, shape, dtype))
        if view is not None:
            return view
        size, key = prod(shape), (name, np.dtype(dtype))
        # The last block of a matrix may have fewer rows, and takes the beginning of the same memory.
        if key not in self.arrays or self.arrays[key].size < size:
            self.arrays[key] = aligned(size, dtype)
        view = self.views[name, shape, dtype] = self.arrays[key][:size].reshape(shape)
        return view


MOST_SAMPLED = 1 << 20  # entries of an adapter that are sampled at most: 4 MiB

T = TypeVar("T")


class SpaceEntries(NamedTuple):
    """The entries of one module in a space, and a function that applies a rule to them and returns the update."""

    entries: Entries
    back: Callable[[Fuse], Fused]


def entries_in_space(joint: Joint, space: Space) -> SpaceEntries | None:
    """Return the entries of the weighted updates w_t ΔW_t of a module in a space; None if all are 0 to rounding.

    full
        ΔW_t itself, float32, computed a block of rows at a time. The result of a rule has full rank. It is cut to the
        rank Σ r_t, which the exact sum needs, or to the joint's ``width`` if that is larger, and the error is stated.
    knots
        S V_tᵀ (k, in) of [w_1 ΔW_1 … w_T ΔW_T] = U S [V_1ᵀ … V_Tᵀ] (Stoica et al. 2025); the result is multiplied by U.
        Directions below the rounding of the sum are left out; the paper's code leaves out σ ≤ 1e-5, whatever the size
        of the others.
    core
        U_Bᵀ (w_t ΔW_t) V_A, where U_B holds the left singular vectors of [B_1 … B_T] and V_A the right ones of
        [A_1; …; A_T] (Panariello et al. 2025). B_t and A_t are the balanced factors of w_t ΔW_t, P√S and √S Rᵀ. With
        the factors of the file, the same update in another gauge would give another result.

    The signs of singular vectors are arbitrary, but make no difference to any rule here. Vectors of equal singular
    values are not determined, and neither is the result then. The bits of ``full`` do not depend on LAPACK.
    """
    # Updates of 0 are left out: they have no entries to look at. Rules that need them count them by `Entries.adapters`.
    places = np.flatnonzero((joint.strengths != 0) & np.any(joint.cores != 0, axis=(1, 2)))
    if not places.size:
        return None
    return {"full": _full, "knots": _knots, "core": _core}[space](joint, places)


def _full(joint: Joint, places: Integers) -> SpaceEntries:
    weighted = [(joint.updates[t], float(joint.strengths[t])) for t in places]
    # For the type checker: an update at one of these places is never None.
    updates = [(update, strength) for update, strength in weighted if update is not None]
    matrices = tuple(Product.of(update, strength) for update, strength in updates)
    entries = Entries(matrices, tuple(places.tolist()), len(joint.updates), np.dtype(np.float32))
    # The rank of the exact sum, so that a method that changes little loses little; a weight cannot have more directions
    # than its shorter side.
    rank = min(max(joint.width, sum(update.rank for update, _ in updates)), *joint.shape)

    def back(fuse: Fuse) -> Fused:
        # The rule is applied again in each pass, as its result of full rank is never formed as a whole.
        def fill(start: int, stop: int, out: Array) -> None:
            for rows, stack in entries.blocks(start, stop):
                out[rows.start - start : rows.stop - start] = fuse(rows, stack)

        factors = low_rank_approximation(fill, joint.shape, rank=rank, start=joint.right)
        return Fused(_update(joint, factors.B, factors.A), factors.error)

    return SpaceEntries(entries, back)


def _knots(joint: Joint, places: Integers) -> SpaceEntries | None:
    # The basis is that of all updates, and the parts of those that are not 0 are taken from it.
    U, parts = output_basis(joint)
    if not U.shape[1]:
        return None
    right = joint.right.columns()
    entries = _dense(joint, places, [part @ right.T for part in parts[places]])

    def back(fuse: Fuse) -> Fused:
        return Fused(_balanced(joint, joint.left.columns() @ U, _whole(entries, fuse)), 0.0)

    return SpaceEntries(entries, back)


def _core(joint: Joint, places: Integers) -> SpaceEntries | None:
    cores = joint.weighted[places]
    triplets = [joint.decompose(M) for M in cores]
    if not any(triplet.s.size for triplet in triplets):
        return None
    # √S on both sides: these are the balanced factors, which belong to the update and not to the factors in the file.
    U = _directions([triplet.U * np.sqrt(triplet.s) for triplet in triplets])
    V = _directions([triplet.Vh.T * np.sqrt(triplet.s) for triplet in triplets])
    entries = _dense(joint, places, [U.T @ M @ V for M in cores])

    def back(fuse: Fuse) -> Fused:
        U_B, V_A = joint.left.columns() @ U, joint.right.columns() @ V
        return Fused(_balanced(joint, U_B @ _whole(entries, fuse), V_A.T), 0.0)

    return SpaceEntries(entries, back)


def _directions(parts: list[Floats]) -> Floats:
    """The left singular vectors of matrices placed side by side; as many as their numerical rank."""
    U, s, _ = np.linalg.svd(np.hstack(parts), full_matrices=False)
    # The usual threshold of a numerical rank: ε of float64 times the larger side.
    return U[:, s > s[0] * max(U.shape) * 2.0**-52]


def _dense(joint: Joint, places: Integers, matrices: list[Floats]) -> Entries:
    # float64 where the full space takes float32: these matrices are small, and float32 would add its rounding.
    dense = tuple(DenseMatrix(matrix) for matrix in matrices)
    return Entries(dense, tuple(places.tolist()), len(joint.updates), np.dtype(np.float64))


def _whole(entries: Entries, fuse: Fuse) -> Floats:
    """The result of a rule on all entries of a small space."""
    result = np.empty(entries.shape)
    for rows, stack in entries.blocks():
        result[rows] = fuse(rows, stack)
    return result


def _balanced(joint: Joint, B: Floats, A: Floats) -> LowRank:
    # A rule may leave fewer directions than the space has; those at the level of rounding are dropped.
    L, s, R = truncating_maps(B, A)
    k = int(np.count_nonzero(s > joint.floor))
    return _update(joint, B @ L[:, :k], R[:k] @ A)


def _update(joint: Joint, B: Floats, A: Floats) -> LowRank:
    """The update B A; rank 0 becomes rank 1 of zeros, because no file format can store rank 0."""
    first = next(filter(None, joint.updates))
    if not B.shape[1]:
        B, A = np.zeros((joint.shape[0], 1)), np.zeros((1, joint.shape[1]))
    return LowRank(B, A, scaling=COMBINED, layout=first.layout)


def elementwise(*, elects: bool = False) -> Callable[[Callable[..., Fuse]], Callable[..., Fused]]:
    """Make the rule of one module of ``rule(entries, density=…, **options)``.

    The decorated function may look at all entries of the module, for instance to find a cutoff. It returns a function
    of one block, (slice of the rows, (updates, rows, n)) → (rows, n), which may write into the block. What is made of
    it takes the joint space, ``space`` and ``lam`` too, and returns λ times the result. ``elects`` says whether updates
    are left out where their signs disagree.
    """

    def decorate(rule: Callable[..., Fuse]) -> Callable[..., Fused]:
        def combine(
            joint: Joint, *, density: float = 1.0, lam: float = 1.0, space: Space = "full", **options: Any
        ) -> Fused:
            # Nothing would be dropped, and the factors give the sum without a pass over its entries.
            keeps_all = density - options.get("epsilon", 0.0) >= 1 and not (elects and joint.present.size > 1)
            found = None if keeps_all else entries_in_space(joint, space)
            if found is None:
                return Fused(joint.lift(lam * joint.total(), np.float64), 0.0)
            update, truncation = found.back(rule(found.entries, density=density, **options))
            return Fused(LowRank(lam * update.B, update.A, scaling=update.scaling, layout=update.layout), truncation)

        return combine

    return decorate


@final
@dataclass(frozen=True, slots=True)
class Modules:
    """All modules of a combination. Each is read into its joint space when it is needed, and is not kept in memory.

    Attributes
    ----------
    joint : callable
        Module name → its joint space.
    entries : int
        Σ out·in over all modules.
    step : callable, optional
        Called with 1 after every module of a pass that reports its progress.
    """

    names: Sequence[str]
    joint: Callable[[str], Joint]
    entries: int
    threads: int = 1
    step: Step | None = None

    def map(self, work: Callable[[Joint], T], *, report: bool = False) -> list[T]:
        """Return the results of ``work`` on every module, in order; with ``report``, ``step`` is called after each."""
        results = in_threads(
            lambda name: work(self.joint(name)), self.names, self.threads, self.step if report else None
        )
        return list(results.values())


def whole_cutoffs(modules: Modules, share: float, *, space: Space) -> tuple[float, ...]:
    """Return for every adapter the absolute value that a share of its entries in *all* modules reaches, exactly.

    Parameters
    ----------
    modules : Modules
        They are read twice, and once more if a sample was misleading.
    share : float
        In (0, 1], of the entries of the modules that the adapter has.
    space : str
    """
    # As `Entries.sampled`, of all modules together, but not more than fit into the memory.
    size = max(1, modules.entries)
    rate = min(SAMPLED / size ** (1 / 3), MOST_SAMPLED / size)

    def sample(joint: Joint) -> tuple[int, dict[int, tuple[int, Array]]]:
        samples = {t: (prod(M.shape), random_sizes(M, ceil(rate * prod(M.shape)))) for t, M in _matrices(joint, space)}
        return len(joint.updates), samples

    looks = modules.map(sample)
    samples: dict[int, list[tuple[int, Array]]] = {}  # of each adapter: the size of each of its modules, and a sample
    for _, by_adapter in looks:
        for t, module_sample in by_adapter.items():
            samples.setdefault(t, []).append(module_sample)
    selections = {}
    for t, parts in sorted(samples.items()):
        size = sum(module_size for module_size, _ in parts)
        # Modules are sampled at one rate, so the pooled sample is one of the whole adapter.
        pooled = np.concatenate([part.ravel() for _, part in parts])
        selections[t] = Selection(max(1, int(share * size)), size=size, sample=pooled)

    def count(joint: Joint) -> None:
        for t, matrix in _matrices(joint, space):
            for block in matrix.magnitudes() if selections[t].open else ():
                selections[t].add(block)

    # A selection stays open where its sample did not bracket the value that is sought: then all entries are read again.
    while any(selection.open for selection in selections.values()):
        modules.map(count, report=True)
        for selection in selections.values():
            if selection.open:
                selection.close()
    # An adapter that is 0 everywhere has no entries, and any cutoff serves.
    adapters = looks[0][0]
    return tuple(selections[t].value if t in selections else 0.0 for t in range(adapters))


def _matrices(joint: Joint, space: Space) -> Iterator[tuple[int, Matrix]]:
    """The index of every adapter that is not 0 in this module, and its weighted update in the space."""
    space_entries = entries_in_space(joint, space)
    if space_entries:
        yield from zip(space_entries.entries.places, space_entries.entries.matrices, strict=True)
