"""Amplification: ‖ΔW‖ relative to ‖UᵀWV‖, with controls that separate the directions of ΔW from its norm."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import NamedTuple, Protocol, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.selection import select
from loralens.core.threads import Step
from loralens.core.weights import Weight
from loralens.errors import OptionError, ShapeError, place
from loralens.linalg.chance import overlap_chance, projection_beyond, projection_moments
from loralens.linalg.device import Device
from loralens.linalg.factor import Basis, Floats
from loralens.linalg.randomized import (
    SMALL,
    Block,
    Estimate,
    Leading,
    Projection,
    copy_dtype,
    exact_fourth_powers,
    fourth_powers,
    gaussian,
    is_dense,
    leading_svd,
    project,
)
from loralens.linalg.subspace import phi_map


@final
@dataclass(frozen=True, slots=True)
class WeightNorms:
    """Norms of one weight W.

    Attributes
    ----------
    frobenius : float
        ‖W‖_F.
    spectral : float
        σ₁(W); the randomised method never gives more, except for rounding.
    spectral_error : float
        W has a singular value within this distance of ``spectral``; 0 if the SVD was dense.
    """

    frobenius: float
    spectral: float
    spectral_error: float


def weight_norms(
    weights: Mapping[str, Weight], *, device: str | Device = "cpu", step: Step | None = None
) -> dict[str, WeightNorms]:
    """‖W‖_F and σ₁(W) of the base weight of every module.

    Parameters
    ----------
    weights : mapping of str to Weight
        Read one at a time, with a copy in memory: float64 if the shorter side is at most 512, else float32, or bfloat16
        if the weight is stored in it and the kernel was compiled.
    device, step
        As in `loralens.analysis.amplification.measure_amplification`.

    Raises
    ------
    FormatError
        A weight holds NaN or Inf.
    """
    on_device = Device.of(device)

    norms = {}
    for name, weight in weights.items():
        with place(name):
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            # The pass projects onto no directions and has no sketch: it sums the squares and copies W for the SVD.
            nothing = [np.zeros((n, 0)) for n in (*shape, shape[1])]
            W = on_device.empty(shape, copy_dtype(shape, 1, stored=weight.stored.dtype, device=on_device))
            projection = project(weight.blocks(on_device.block), *nothing, device=on_device, out=W)
            # A fixed seed: the norm of a weight does not depend on the run.
            led = leading_svd(W, 1, rng=np.random.default_rng(0), device=on_device)
            norms[name] = WeightNorms(sqrt(projection.squares), float(led.s[0]), float(led.error[0]))
        if step:
            step(1)
    return norms


# By chance, |z| exceeds FAR in 2 % of the cases at rank 1 and in 0.3 % at high ranks. So every count is reported with
# the count that chance gives.
FAR = 3.0  # standard deviations beyond which a module is counted
# Below this relative spread the null distribution has one possible value, and the spread is rounding error.
SURE = 1e-9


class KeptRank(NamedTuple):
    """The quantities of Hu et al. 2021, Table 7, for the ``rank`` leading directions of ΔW.

    A quantity without a value is NaN: ΔW or W is 0, or the leading directions of W were not requested.
    ``amplification`` is infinite where UᵀWV = 0.
    """

    rank: int
    delta_norm: float  # ‖ΔWᵢ‖_F of these directions alone, the update that `loralens compress --rank i` keeps
    projected_norm: float  # ‖UᵢᵀWVᵢ‖_F
    top_norm: float  # √Σσ(W)² of as many directions, the largest possible ‖UᵀWV‖
    top_error: float  # a bound on the error of top_norm
    random_norm: float  # i/√(out·in)·‖W‖_F, the root mean square for uniform random U and V
    amplification: float  # ‖ΔWᵢ‖ / ‖UᵢᵀWVᵢ‖
    excess: float  # ‖UᵢᵀWVᵢ‖ / random_norm
    z: float  # z-score of ‖UᵢᵀWVᵢ‖² under uniform random U and V
    z_error: float  # standard error of z, because Σσ⁴ of W is estimated from a sketch
    far_chance: float  # probability of |z| > 3 under uniform U and V: 2 % at rank 1, falling to 0.3 % as ranks grow


@final
@dataclass(frozen=True, slots=True)
class Top:
    """The leading directions of W, and how those of ΔW overlap with them.

    Attributes
    ----------
    s, error : float64 array, shape (t,)
        Leading singular values of W, largest first, and a bound on the error of each.
    out, in_ : float64 array, shape (k, t), in [0, 1]
        φ(i, j) between the i leading directions of ΔW and the j of W, on either side (Hu et al. 2021, Figure 8).
    exact : bool
        Whether they come from a dense SVD.
    """

    s: Array
    error: Array
    out: Array
    in_: Array
    exact: bool

    def chance(self, shape: tuple[int, int]) -> tuple[Array, Array]:
        """Mean of φ between uniform subspaces on the out and on the in side, each shape (k, t)."""
        k, t = self.out.shape
        return overlap_chance(k, t, shape[0]), overlap_chance(k, t, shape[1])


@final
@dataclass(frozen=True, slots=True)
class Amplification:
    """The amplification of one update.

    Attributes
    ----------
    shape : tuple of int
        (out, in).
    rank : int
        Nominal rank r of the update.
    s : float64 array, shape (k,)
        Singular values of ΔW above rounding, at most as many as the largest requested rank. Empty where ΔW = 0.
    overlap : float64 array, shape (k, k)
        UᵀWV in the units of W, U (out, k) and V (in, k) the singular directions of ΔW. Row and column i change sign
        with the directions, but no reported number depends on that.
    weight_norm : float
        ‖W‖_F.
    fourths : Estimate
        Σσ⁴(W), which the spread of the random control needs.
    top : Top or None
        The leading directions of W, if they were requested.
    ranks : tuple of int
        The requested ranks, at most k each; by default k.
    """

    shape: tuple[int, int]
    rank: int
    s: Array
    overlap: Array
    weight_norm: float
    fourths: Estimate
    top: Top | None
    ranks: tuple[int, ...]

    @property
    def curve(self) -> tuple[KeptRank, ...]:
        """The quantities for every rank i = 1 … k."""
        return tuple(self.at_rank(i) for i in range(1, self.s.size + 1))

    @property
    def rows(self) -> tuple[KeptRank, ...]:
        """The quantities for every requested rank."""
        return tuple(self.at_rank(i) for i in self.ranks)

    @property
    def directions(self) -> Array:
        """σᵢ / |uᵢᵀWvᵢ| of every direction of ΔW, float64, shape (k,); infinite where uᵢᵀWvᵢ = 0."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.s / np.abs(np.diagonal(self.overlap)), dtype=np.float64)

    def at_rank(self, i: int) -> KeptRank:
        """The quantities for the i leading directions of ΔW.

        Notes
        -----
        The numerator is ‖ΔWᵢ‖ and not ‖ΔW‖: these are the quantities of the adapter truncated to rank i. At i = k both
        are equal.
        """
        delta, projected = float(np.linalg.norm(self.s[:i])), float(np.linalg.norm(self.overlap[:i, :i]))
        random = i / sqrt(self.shape[0] * self.shape[1]) * self.weight_norm
        top = float(np.linalg.norm(self.top.s[:i])) if self.top else nan
        error = float(np.linalg.norm(self.top.error[:i])) if self.top else nan
        z, z_error, far_chance = self._z(i, projected)
        factor = delta / projected if projected else inf if delta else nan
        excess = projected / random if random else nan
        return KeptRank(i, delta, projected, top, error, random, factor, excess, z, z_error, far_chance)

    def _z(self, i: int, projected: float) -> tuple[float, float, float]:
        """The z-score of ‖UᵀWV‖², its standard error, and the probability that chance exceeds `FAR`."""
        squares, (fourths, error) = self.weight_norm**2, self.fourths
        if not (i and squares):
            return nan, nan, nan
        mean, spread = projection_moments(self.shape, i, squares, fourths)
        # By chance only one value is possible, for example if U and V span the whole spaces.
        if spread <= SURE * mean:
            return nan, nan, nan
        z = (projected**2 - mean) / spread
        wider = projection_moments(self.shape, i, squares, fourths + error)[1]
        return z, abs(z) * (wider / spread - 1), projection_beyond(mean, spread, FAR)


def count_far(rows: Sequence[KeptRank]) -> tuple[int, float]:
    """The number of rows more than `FAR` standard deviations from chance, and the expected number by chance."""
    return sum(abs(row.z) > FAR for row in rows), sum(row.far_chance for row in rows if isfinite(row.far_chance))


class CachedLeading(Protocol):
    """The leading directions of one weight, kept between runs under a hash of its numbers."""

    def follow(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield the blocks of the weight, and take the hash of their numbers."""

    def read(self) -> Leading | None:
        """The directions of the weight whose blocks have passed; None if they are not kept."""

    def write(self, leading: Leading) -> None:
        """Keep them."""


class LeadingStore(Protocol):
    """A place that keeps leading directions of weights between runs."""

    def of(self, weight: Weight, count: int, method: str) -> CachedLeading:
        """The place of the ``count`` leading directions of a weight, computed by a method with its random numbers."""


def measure_amplification(
    adapter: Adapter,
    weights: Mapping[str, Weight],
    *,
    ranks: Sequence[int] = (),
    top: bool = True,
    directions: int = 0,
    exact: bool = False,
    device: str | Device = "cpu",
    seed: int = 0,
    modules: Sequence[str] = (),
    threads: int = 1,
    store: LeadingStore | None = None,
    step: Step | None = None,
) -> dict[str, Amplification]:
    """Measure the amplification of every update, in natural module order.

    Amplification is ‖ΔW‖_F / ‖UᵀWV‖_F, where U (out, r) and V (in, r) hold the singular directions of ΔW = scale·B·A
    (Hu et al. 2021, §7.3, Table 7 and App. H.4). The paper writes UᵀWVᵀ, because the rows of its V are the directions.
    The factor rises even if only ‖ΔW‖ rises. It is therefore reported with the random control r/√(out·in)·‖W‖_F, the
    ratio of ‖UᵀWV‖ to that control, and its z-score under uniform random U and V
    (`loralens.linalg.chance.projection_moments`).

    Parameters
    ----------
    adapter : Adapter
    weights : mapping of str to Weight
        The base weight of every module, as `loralens.core.weights.weights_of` finds them.
    ranks : sequence of int
        Ranks to report. Only the leading ``max(ranks)`` directions are then computed. If empty, the full rank.
    top : bool
        Also compute the leading directions of W: √Σσ(W)², and φ between them and those of ΔW (Figure 8).
    directions : int
        The number of directions of W; 0 stands for as many as ΔW has.
    exact : bool
        Use a dense SVD of W in float64, and the exact Σσ⁴. This takes minutes and more memory for a big weight.
    device : str or Device
        ``cpu`` (NumPy), ``cuda`` or ``cuda:N`` (torch).
    seed : int
        The seed of the sketch and of the randomised SVD.
    modules : sequence of str
        Globs over module names or kinds; all modules where empty.
    threads : int
        On the CPU, the blocks of weights worked on at a time. Results do not depend on it.
    store : LeadingStore, optional
        Where leading directions of large weights are looked up, and kept. Results do not depend on it.
    step : callable, optional
        Called with 1 after every module.

    Raises
    ------
    OptionError
        A glob matches nothing, no module has such a rank, or there is no such device.
    FormatError
        A factor or a weight holds NaN or Inf.

    Notes
    -----
    W is read once, in float64 on the CPU. With ``top`` a copy of W is kept in memory for the steps of
    `loralens.linalg.randomized.leading_svd`, in float32 or bfloat16
    (`loralens.linalg.randomized.copy_dtype`). Weights whose shorter side is at most 512 are decomposed exactly.

    Table 7 of the paper is reproduced up to its rounding: 6.91/0.32 = 21.6 (printed 21.5), and its random column for
    r = 64 is 0.3227 (printed 0.33). The paper sets α to the first r tried, so its two ‖ΔW‖ have different scales.
    """
    names = select(adapter, modules)
    most = max((adapter[name].rank for name in names), default=0)
    if wrong := [rank for rank in ranks if not 0 < rank <= most]:
        raise OptionError(f"rank {wrong[0]} is not between 1 and {most}, the largest rank", fix="give such a rank")
    on_device = Device.of(device, threads=threads)

    def measure(name: str) -> Amplification:
        with place(name):
            module, weight = adapter[name], weights[name]
            if weight.shape != module.shape:
                what = f"ΔW is {module.shape} and W {weight.shape}"
                raise ShapeError(what, fix="give the base that it was trained on")
            bases = module.bases()
            k = min(bases.s.size, max(ranks, default=module.rank))
            U_basis, s, V_basis = bases.left.head(k), bases.s[:k], bases.right.head(k)
            # At least one direction of W, so that σ₁(W) is known where ΔW = 0 too.
            count = min(max(directions, k, 1), *module.shape) if top else 0
            swap = weight.transposed  # W is processed as it is stored, so U and V change places
            U, V = (basis.columns() for basis in ((V_basis, U_basis) if swap else (U_basis, V_basis)))
            method = f"{'exact' if exact else f'seed {seed}'} on {on_device.name.partition(':')[0]}"
            # The directions of a small weight are computed as quickly as they are read.
            cached = store.of(weight, count, method) if store and count and min(weight.shape) > SMALL else None
            projection, led, fourths = _measure_weight(
                weight, (U, V), count, exact=exact, device=on_device, seed=seed, cached=cached,
            )  # fmt: skip
            return Amplification(
                shape=module.shape,
                rank=module.rank,
                s=s,
                overlap=projection.product.T if swap else projection.product,
                weight_norm=sqrt(projection.squares),
                fourths=fourths,
                top=_compare_top(U_basis, V_basis, led, swap=swap) if led else None,
                ranks=tuple(sorted({min(rank, k) for rank in ranks})) or (k,),
            )

    results = {}
    for name in names:
        with place(name):
            results[name] = measure(name)
        if step:
            step(1)
    return results


def _measure_weight(
    weight: Weight,
    bases: tuple[Floats, Floats],
    count: int,
    *,
    exact: bool,
    device: Device,
    seed: int,
    cached: CachedLeading | None,
) -> tuple[Projection, Leading | None, Estimate]:
    """One pass over W as it is stored, its ``count`` leading triplets, which may be ``cached``, and Σσ⁴."""
    rows, columns = shape = weight.stored.shape[0], weight.stored.shape[1]
    dense = is_dense(shape, max(count, 1), exact=exact)
    # A copy of W is kept only if something needs more than one pass over W.
    dtype = copy_dtype(shape, max(count, 1), stored=weight.stored.dtype, device=device, exact=exact)
    W_copy = device.empty((rows, columns), dtype) if count or dense else None
    # Anew for each module, whose result then does not depend on the others. Where W is decomposed as a whole, nothing
    # is estimated, and to load NumPy's generators takes 7 MB.
    rng = None if dense else np.random.default_rng(seed)
    sketch, blocks = gaussian(rng, columns), weight.blocks(device.block)
    followed = cached.follow(blocks) if cached else blocks
    projection = project(followed, *bases, sketch, device=device, out=W_copy)
    led = None
    if count and projection.squares:  # W = 0 has no leading directions
        led = cached.read() if cached else None
        if led is None:
            led = leading_svd(W_copy, count, rng=rng, device=device, exact=exact)
            if cached:
                cached.write(led)
    if dense:
        return projection, led, Estimate(exact_fourth_powers(W_copy, device=device), 0.0)
    # The leading directions contribute a known part, so only the remainder is estimated.
    return projection, led, fourth_powers(projection, shape, leading=(led.s, led.V.T @ sketch) if led else None)


def _compare_top(U_basis: Basis, V_basis: Basis, led: Leading, *, swap: bool) -> Top:
    """Compare the leading directions of W with those of ΔW; ``swap`` says that W was processed transposed."""
    U, V = (led.V, led.U) if swap else (led.U, led.V)
    out, in_ = (phi_map(own.cross(Basis.of(columns))) for own, columns in ((U_basis, U), (V_basis, V)))
    return Top(led.s, led.error, out, in_, led.steps == 0)
