"""The comparison of two checkpoints of one model, tensor by tensor, by keys and shapes; no number is read for it.

Matrices of layers are recognised by keys and shapes alone. ``….weight`` with two or more axes is a linear layer, a
convolution or, according to its name, an embedding. ``….experts.NAME`` with three axes is a stack of experts. Any other
name with two axes is a parameter of its module. The number of groups of a convolution cannot be seen from its shape,
except if every channel has a kernel of its own.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import cos, pi, prod, sqrt
from typing import Literal, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout
from loralens.core.matching import slots
from loralens.core.ranks import Rule
from loralens.core.weights import Weight
from loralens.errors import FormatError
from loralens.linalg.device import Device, Float
from loralens.linalg.factor import Floats
from loralens.linalg.randomized import ROUNDING, input_dtype, is_dense, leading_svd
from loralens.linalg.rounding import ulp

Tensors = Mapping[str, LazyArray]

# A prefix is common to nearly all keys, so a sample of them shows it.
SAMPLES = 64  # keys of one checkpoint that are searched in the other to find a common prefix

_EMBEDDING = re.compile(r"(^|_)(embed|embedding|embeddings|embed_tokens|embed_positions|embed_in)$|^(wte|wpe|shared)$")
_EXPERTS = re.compile(r"experts?\.[^.]+$")
_IN_LAST = re.compile(r"down|w2|wo$")  # expert weights whose outputs have the hidden size


@final
@dataclass(frozen=True, slots=True)
class MatrixDifference:
    """tuned − base of one matrix, computed a block of rows at a time.

    Attributes
    ----------
    base, tuned : Weight
        Weights of the same shape, both in the orientation of ``layout``. Their dtypes may differ.
    """

    base: Weight
    tuned: Weight
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.tuned.shape

    @property
    def stored(self) -> tuple[int, int]:
        """Number of rows and columns in the orientation in which both checkpoints store it."""
        rows, columns = self.tuned.stored.shape
        return rows, columns

    def blocks(self) -> Iterator[tuple[slice, Floats, Array]]:
        """Yield blocks of rows as stored: their slice, float64(tuned) − float64(base), and the tuned rows themselves.

        The float64 difference of two numbers of at most 32 bits is exact unless their exponents differ by more than 29.
        """
        for part, ours, theirs in self._both():
            yield part, ours.astype(np.float64) - theirs.astype(np.float64), ours

    def differs(self) -> bool:
        """Whether the tuned weight differs from the base by more than a change of dtype."""
        return any(values_differ(theirs, ours) for _, ours, theirs in self._both())

    def norm(self) -> float:
        """‖tuned − base‖_F, or 0 if only the dtype differs."""
        return sqrt(sum(float(np.vdot(D, D)) for _, D, _ in self.blocks())) if self.differs() else 0.0

    def _both(self) -> Iterator[tuple[slice, Array, Array]]:
        # Both are stored alike, so their blocks have the same rows.
        for (part, ours), (_, theirs) in zip(self.tuned.blocks(), self.base.blocks(), strict=True):
            yield part, ours, theirs


@final
@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """The comparison of two checkpoints, by the keys of the tuned one.

    Attributes
    ----------
    tuned : mapping of str to LazyArray
        All tensors of the tuned checkpoint.
    matrices : mapping of str to MatrixDifference
        By the name of the module.
    other_tensors : mapping of str to (LazyArray, LazyArray)
        Tensors that are not matrices of layers (norms, biases, buffers): those of the base and of the tuned checkpoint.
    added : tuple of str
        Keys that the base does not have.
    resized : mapping of str to tuple of int
        Keys whose tensor has another shape in the base, and that shape.
    missing : tuple of str
        Keys of the base that the tuned checkpoint does not have.
    edit : str
        How the names of the two differ, in words; empty if they do not.
    """

    tuned: Tensors
    matrices: Mapping[str, MatrixDifference]
    other_tensors: Mapping[str, tuple[LazyArray, LazyArray]]
    added: tuple[str, ...]
    resized: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...]
    edit: str


def is_embedding(name: str) -> bool:
    """Whether a module is an embedding according to its name."""
    return bool(_EMBEDDING.search(name.rpartition(".")[2]))


def is_depthwise(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a depthwise convolution, in which every channel has a kernel of its own."""
    return len(shape) > 2 and shape[1] == 1 < shape[0]


def may_be_grouped(difference: MatrixDifference) -> bool:
    """Whether a convolution may have groups, in which case PEFT would need an A that reads all channels."""
    kernel = prod(difference.layout.kernel)
    out, inside = difference.shape[0], difference.shape[1] // max(kernel, 1)
    return difference.layout.kind == "conv" and kernel > 1 and 1 < inside < out and not out % inside


def compare_checkpoints(
    base: Tensors, tuned: Tensors, *, conv1d: bool = False, hidden: int | None = None
) -> CheckpointComparison:
    """Compare two checkpoints by keys and shapes; no number is read.

    Parameters
    ----------
    base, tuned : mapping of str to LazyArray
        Their keys may differ by a prefix (``bert.encoder…`` and ``encoder…``).
    conv1d : bool
        Whether linear weights are stored as (in, out).
    hidden : int or None
        The hidden size, which shows the orientation of stacks of experts. Without it they are (expert, out, in).
    """
    partners, edit = _match_keys(base, tuned)
    holders = _modules_with_children({key.rpartition(".")[0] for key in tuned})
    matrices: dict[str, MatrixDifference] = {}
    other_tensors: dict[str, tuple[LazyArray, LazyArray]] = {}
    resized: dict[str, tuple[int, ...]] = {}
    for key, partner in partners.items():
        ours, theirs = tuned[key], base[partner]
        if ours.shape != theirs.shape:
            resized[key] = theirs.shape
            continue
        # A parameter of a module that contains other modules gets no pair (see `_matrices`).
        alone = "." in key and key.rpartition(".")[0] not in holders
        differences = _matrices(key, partner, ours, theirs, conv1d=conv1d, hidden=hidden, alone=alone)
        matrices.update(differences)
        if not differences:
            other_tensors[key] = theirs, ours
    added = tuple(key for key in tuned if key not in partners)
    used = {*partners.values()}
    return CheckpointComparison(
        tuned, matrices, other_tensors, added, resized, tuple(key for key in base if key not in used), edit
    )


def _modules_with_children(modules: Iterable[str]) -> set[str]:
    """The modules that contain other modules.

    They are searched in sorted order, since a set of all parents would take memory quadratic in the length of a name.
    """
    ordered = sorted(modules)
    has_children = {}
    for module in ordered:
        # In sorted order everything below a module directly follows `module.`.
        within = bisect_left(ordered, f"{module}.")
        has_children[module] = within < len(ordered) and ordered[within].startswith(f"{module}.")
    return {module for module, holds in has_children.items() if holds and module}


def _match_keys(base: Tensors, tuned: Tensors) -> tuple[dict[str, str], str]:
    """Keys of the tuned checkpoint → keys of the base, with the prefix that matches most, and the edit in words."""

    def edits() -> Iterator[tuple[dict[str, str], str]]:
        yield {key: key for key in tuned if key in base}, ""
        for lead in _prefixes(base, tuned):
            yield {lead + key: key for key in base if lead + key in tuned}, f"adding {lead!r} to the names of the base"
        for lead in _prefixes(tuned, base):
            pairs = {key: lead + key for key in tuned if lead + key in base}
            yield pairs, f"dropping {lead!r} from the names of the base"

    # `max` returns the first of several: on a tie the names stay as they are.
    best, edit = max(edits(), key=lambda option: len(option[0]))
    return {key: best[key] for key in tuned if key in best}, edit


def _prefixes(short: Tensors, long: Tensors) -> list[str]:
    """The prefixes with which keys of ``short`` occur in ``long``."""
    step = max(1, len(short) // SAMPLES)
    tails = [f".{key}" for key in list(short)[::step]]
    return sorted({key[: 1 - len(tail)] for key in long for tail in tails if key.endswith(tail)})


def _matrices(
    key: str, partner: str, ours: LazyArray, theirs: LazyArray, *, conv1d: bool, hidden: int | None, alone: bool
) -> dict[str, MatrixDifference]:
    """The modules whose matrices a tensor holds: one module, the experts of a stack, or none.

    A parameter without a layer of its own is used only if it is ``alone``. PEFT wraps the module that holds the
    parameter, which would change the names of other modules within it.
    """
    shape = ours.shape
    if len(shape) < 2 or not _is_floating(ours) or not _is_floating(theirs) or not prod(shape):
        return {}
    name = key.removesuffix(".weight")
    if len(shape) == 3 and (_EXPERTS.search(key) if name == key else ".experts." in slots(name)[0].name):
        return _expert_matrices(key, partner, ours, theirs, hidden)
    # Without `.weight` it is a parameter, whose orientation is unknown, so it is taken as it is stored.
    if name == key:
        bare = len(shape) == 2 and alone
        layout = Layout("parameter")
        return {key: MatrixDifference(Weight(partner, theirs, False), Weight(key, ours, False), layout)} if bare else {}
    if len(shape) > 2:
        # A pair would mix the channels.
        if is_depthwise(shape):
            return {}
        layout, transposed = Layout("conv", kernel=shape[2:]), False
    elif is_embedding(name):
        layout, transposed = Layout("embedding"), True
    else:
        layout, transposed = Layout("linear", transposed=conv1d), conv1d
    flat = shape[0], prod(shape[1:])
    before, after = (Weight(k, t.reshape(*flat), transposed) for k, t in ((partner, theirs), (key, ours)))
    return {name: MatrixDifference(before, after, layout)}


def _expert_matrices(
    key: str, partner: str, ours: LazyArray, theirs: LazyArray, hidden: int | None
) -> dict[str, MatrixDifference]:
    """The matrices of a stack, one for each expert."""
    count, rows, columns = ours.shape
    name = key.removesuffix(".weight")
    # Granite's layers have names of their own, which `slots` translates.
    called = slots(name)[0].name if name != key else key
    inner = bool(_IN_LAST.search(called.rpartition(".")[2]))
    # The axis with the hidden size shows the orientation. Square experts look the same in both orientations, and are
    # taken as (out, in).
    transposed = rows != columns and (columns if inner else rows) == hidden

    def expert_weight(tensor: LazyArray, e: int) -> LazyArray:
        return tensor.rows(e, e + 1).reshape(rows, columns)

    return {
        f"{name}[{e}]": MatrixDifference(
            Weight(partner, expert_weight(theirs, e), transposed),
            Weight(key, expert_weight(ours, e), transposed),
            Layout("experts"),
        )
        for e in range(count)
    }


def _is_floating(tensor: LazyArray) -> bool:
    return tensor.dtype.kind in "fV"


def values_differ(base: Array, tuned: Array) -> bool:
    """Whether numbers differ by more than a change of dtype; NaN counts as equal to NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A tuned checkpoint is often saved in another dtype, which alone does not count as a change.
        cast = base.astype(tuned.dtype)
        return not bool(np.all((cast == tuned) | ((cast != cast) & (tuned != tuned))))


# 8 and 16 are the usual ranks of adapters.
START = 16  # directions of the first computation, if the rule does not say how many it needs
# The relative error of a mean over 65,536 entries is 1/256 of their spread.
SAMPLE = 1 << 16  # entries from which the level of the rounding noise is estimated, within 1 %
SETTLED = ("rank", "energy", "error")  # rules that need only k triplets and ‖D‖ to decide that k directions are kept


@final
@dataclass(frozen=True, slots=True)
class NoiseEdge:
    """The rule that keeps the directions above the noise (`loralens.merging.checkpoint_difference`).

    Attributes
    ----------
    noise : str
        ``rounding``: the noise comes from rounding to the dtype of the tuned checkpoint, √(mean ulp²/12) per entry.
        ``median``: the noise is unknown and estimated by the median of all singular values, so all are computed.
    ceiling : int, optional
        The most directions of a module.
    """

    noise: Literal["rounding", "median"] = "rounding"
    ceiling: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Triplets:
    """The leading singular triplets of one difference D in its stored orientation; arrays are float64.

    Attributes
    ----------
    U, V : arrays, shape (rows, k), (columns, k)
    s : array
        k values, largest first, or all singular values of D if the SVD was dense.
    is_complete : bool
        Whether ``s`` has all singular values.
    norm : float
        ‖D‖_F, computed from every entry.
    noise : float
        √(mean ulp²/12) of the tuned weight, the rounding noise of one entry.
    edge : float or None
        The threshold for singular values under `NoiseEdge`.
    error : float
        Relative error bound of √Σσ² of the first k; 0 if the SVD was dense.
    """

    U: Floats
    V: Floats
    s: Floats
    is_complete: bool
    norm: float
    noise: float
    edge: float | None
    error: float

    @property
    def count(self) -> int:
        """Number of directions in U and V."""
        return int(self.U.shape[1])

    def spectrum(self) -> Floats:
        """All singular values. Those that were not computed are replaced by equal ones with the missing energy of ‖D‖².

        A rule that takes none of the replaced values decides as it would with the true ones, because none of them is
        larger than the last computed one, and their energy is the same.
        """
        if self.is_complete or not self.s.size:
            return self.s
        missing_energy = max(self.norm**2 - float(self.s @ self.s), 0.0)
        missing = min(len(self.U), len(self.V)) - self.s.size
        # No unseen value can exceed the last one that was seen.
        value = min(sqrt(missing_energy / missing), float(self.s[-1]))
        return np.concatenate([self.s, np.full(missing, value)])

    def above(self) -> int:
        """Number of directions above the edge."""
        assert self.edge is not None
        return int(np.count_nonzero(self.s > self.edge))

    def factors(self, rank: int, dtype: np.dtype[np.generic]) -> tuple[Array, Array]:
        """Factors (rows, rank) and (columns, rank) whose product is nearest to D, balanced and rounded once.

        If D has fewer directions, the remaining columns are 0.
        """
        k = min(rank, self.count)
        # √σ on both sides, so that both factors have the same range when they are rounded.
        root = np.sqrt(self.s[:k])
        scaled_vectors = (self.U[:, :k] * root, self.V[:, :k] * root)
        padded = (np.pad(X, ((0, 0), (0, rank - k))) for X in scaled_vectors)
        left, right = (X.astype(dtype) for X in padded)
        return left, right


def compute_triplets(
    name: str,
    difference: MatrixDifference,
    rule: Rule | NoiseEdge,
    *,
    count: int | None = None,
    exact: bool = False,
    threads: int = 1,
) -> Triplets:
    """Compute the leading triplets of a difference, as many as ``rule`` needs to decide, or ``count`` under a budget.

    Parameters
    ----------
    name : str
        The name of the module. It seeds the random start, so the result does not depend on other modules.
    difference : MatrixDifference
    rule : Rule or NoiseEdge
    count : int or None
        Number of directions. The default depends on the rule.
    exact : bool
        Compute the dense SVD with LAPACK in float64. Small matrices always get it.
    threads : int
        Number of threads for products with D.

    Raises
    ------
    FormatError
        The difference has NaN or infinite numbers.

    Notes
    -----
    Without a dense SVD, D is kept in float32, rounded once from the float64 difference, and `leading_svd` computes 16,
    32, 64 … directions. These values may exceed the true ones by up to 2⁻²⁰σ₁, so the edge is never below 2⁻²⁰σ₁. A
    value that is within its error of the edge may be on either side.
    """
    rows, columns = difference.stored
    most = min(rows, columns)
    k = min(most, count or (int(rule.value) if isinstance(rule, Rule) and rule.name == "rank" else START))
    # Σσ depends on every value; all other rules need the largest ones and ‖D‖.
    if isinstance(rule, Rule) and rule.name == "sv-cumulative":
        k = most
    # Equal weights need no SVD.
    if not difference.differs():
        return Triplets(np.zeros((rows, 0)), np.zeros((columns, 0)), np.zeros(0), True, 0.0, 0.0, None, 0.0)
    working_dtype: Float = input_dtype((rows, columns), k, exact=exact)
    D, norm, noise = _read_difference(difference, working_dtype, name)
    device = Device("cpu", threads)
    while True:
        dense = is_dense((rows, columns), k, exact=exact)
        # Only now is it clear that a dense SVD is needed, which is computed in float64.
        if dense and working_dtype == "float32":
            working_dtype = "float64"
            D, norm, noise = _read_difference(difference, working_dtype, name)
        # Seeded by the name, so that the result does not depend on the other modules.
        rng = np.random.default_rng(int.from_bytes(sha256(name.encode()).digest()[:8], "little"))
        svd = leading_svd(D, most if dense else k, rng=rng, device=device, exact=exact)
        # Directions of length 0 have no meaning.
        positive = svd.s > 0
        s = svd.s[positive]
        error = float(np.linalg.norm(svd.error[:k])) / float(np.linalg.norm(s[:k]))
        edge = (
            _noise_edge(rule, difference, D, s, noise, dense=dense, device=device)
            if isinstance(rule, NoiseEdge)
            else None
        )
        result = Triplets(svd.U[:, positive], svd.V[:, positive], s, dense, norm, noise, edge, error)
        if isinstance(rule, NoiseEdge):
            needed = result.above()
        else:  # a budget is shared by all modules, so this module alone cannot decide how many directions it needs
            needed = 0 if rule.budget else rule.rank_of(result.spectrum())
        # All values are known; the vectors beyond those needed are not kept, and a copy frees their memory.
        if dense:
            keep = min(max(k, needed), s.size)
            return Triplets(result.U[:, :keep].copy(), result.V[:, :keep].copy(), s, dense, norm, noise, edge, error)
        if count or needed < k or (needed == k and isinstance(rule, Rule) and rule.name in SETTLED):
            return result
        # Doubled, so that all attempts together cost at most twice as much as the last one.
        k = min(2 * k, most)


def _noise_edge(
    rule: NoiseEdge, difference: MatrixDifference, D: Array, s: Floats, noise: float, *, dense: bool, device: Device
) -> float:
    shape = difference.stored
    if rule.noise == "median":
        return median_threshold(_median_singular_value(D, s, dense=dense), shape)
    # Below this, values of the float32 method are not reliable.
    floor = 0.0 if dense else ROUNDING * float(s[0])
    N = _draw_rounding_noise(difference, input_dtype(shape, 1))
    largest = float(leading_svd(N, 1, rng=np.random.default_rng(1), device=device).s[0])
    # The largest of the three: a direction must exceed every kind of noise.
    return max(sampled_threshold(largest, shape), known_threshold(noise, shape), floor)


def _draw_rounding_noise(difference: MatrixDifference, dtype: Float) -> Array:
    """A random sample of the rounding noise of the tuned weight: ulp times a number in (−½, ½) for every entry."""
    # A fixed seed, so that the same checkpoints give the same threshold.
    rng = np.random.default_rng(0)
    N = np.empty(difference.stored, dtype)
    for part, _, tuned in difference.blocks():
        N[part] = ulp(tuned, tuned.dtype) * (rng.random(tuned.shape) - 0.5)
    return N


def _median_singular_value(D: Array, s: Floats, *, dense: bool) -> float:
    """The median of all min(m, n) singular values, from a dense SVD or else from the smaller Gram matrix in float64.

    A Gram matrix is accurate for values above 1e-8·σ₁.
    """
    least = min(D.shape)
    if dense:
        return float(np.median(np.pad(s, (0, least - s.size))))
    X = D if D.shape[1] == least else D.T
    gram = np.zeros((least, least))
    # In blocks, so that no float64 copy of all of D is needed.
    for start in range(0, len(X), least):
        block = X[start : start + least].astype(np.float64)
        gram += block.T @ block
    return float(np.median(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))))


def _read_difference(difference: MatrixDifference, dtype: Float, name: str) -> tuple[Array, float, float]:
    """D in ``dtype``, ‖D‖_F and the level of the rounding noise, in one pass over both weights."""
    rng = np.random.default_rng(0)
    size = difference.stored[0] * difference.stored[1]
    D = np.empty(difference.stored, dtype)
    energy = noise = 0.0
    count = 0
    for part, block, tuned in difference.blocks():
        D[part] = block
        # The norm is that of the float64 difference, before it is rounded to the dtype of D.
        flat = block.reshape(-1)
        energy += float(flat @ flat)
        # Each block gives its share of the sample, rounded up.
        sample = rng.integers(tuned.size, size=-(-SAMPLE * tuned.size // size))
        noise += float(np.sum(ulp(tuned.reshape(-1)[sample], tuned.dtype) ** 2))
        count += sample.size
    if not np.isfinite(energy):
        raise FormatError(
            f"{name}: the difference holds NaN or infinity", fix="one of the checkpoints is damaged or diverged"
        )
    return D, sqrt(energy), sqrt(noise / count / 12)


def measured_error(difference: MatrixDifference, left: Array, right: Array) -> float:
    """‖D − left·rightᵀ‖_F in float64, computed from every entry of both weights with the factors as they are stored."""
    L, R = left.astype(np.float64), right.astype(np.float64).T
    total = 0.0
    for part, block, _ in difference.blocks():
        block -= L[part] @ R
        flat = block.reshape(-1)
        total += float(flat @ flat)
    return sqrt(total)


# The trapezoidal rule errs by 1/POINTS², and interpolating the median by about as much.
POINTS = 1 << 14  # steps of the integral of the Marchenko–Pastur law, which give its median to 1e-8

Shape = tuple[int, int]


def known_threshold(noise: float, shape: Shape) -> float:
    """τ = λ(β)·e·√max(m, n) for white noise of standard deviation e = ``noise``.

    λ(β) = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))), 4/√3 for a square matrix.
    """
    return _lambda(_aspect_ratio(shape)) * noise * sqrt(max(shape))


def sampled_threshold(largest: float, shape: Shape) -> float:
    """τ = λ(β)/(1+√β)·σ₁, where σ₁ = ``largest`` is that of pure noise drawn with the variances of the entries.

    For white noise in a large matrix σ₁ = e(√m + √n), and the result is that of `known_threshold`.
    """
    beta = _aspect_ratio(shape)
    return _lambda(beta) / (1 + sqrt(beta)) * largest


def median_threshold(median: float, shape: Shape) -> float:
    """τ = ω(β) times the median of all min(m, n) singular values; ω(β) = λ(β)/√μ_β, 2.8584 for a square matrix."""
    beta = _aspect_ratio(shape)
    return _lambda(beta) / sqrt(marchenko_pastur_median(beta)) * median


@lru_cache(maxsize=1024)
def marchenko_pastur_median(beta: float) -> float:
    """μ_β, the median of the squared singular values of m × n noise with variance 1/n, β = m/n ≤ 1.

    With t = 1 + β − 2√β cos θ the Marchenko–Pastur law is (2/π) sin²θ/t dθ on (0, π), which is smooth also for β = 1.
    """
    theta = np.linspace(0, pi, POINTS + 1)[1:]  # without 0, where the density is 0/0 for β = 1
    density = 2 / pi * np.sin(theta) ** 2 / (1 + beta - 2 * sqrt(beta) * np.cos(theta))
    first = 2 / pi if beta == 1 else 0.0  # the limit of the density at 0
    steps = (np.concatenate([[first], density[:-1]]) + density) / 2 * (pi / POINTS)
    middle = float(np.interp(0.5, np.cumsum(steps), theta))
    return 1 + beta - 2 * sqrt(beta) * cos(middle)


def _aspect_ratio(shape: Shape) -> float:
    return min(shape) / max(shape)


def _lambda(beta: float) -> float:
    return sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + sqrt(beta**2 + 14 * beta + 1)))
