"""Intruder dimensions: leading singular directions of W + ΔW that no singular direction of W resembles.

This is Definition 3.1 and Algorithm 1 of Shuttleworth et al. 2024, arXiv 2410.21228, as in their code: with left
vectors, the absolute value of the cosine, and all thin left vectors of W. The test detects *delocalisation*. Where
out ≤ in, the left vectors of W span the whole space, and a direction that is spread evenly over m of them has the score
1/√m, although it lies in the span of W.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import copysign
from typing import final

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.ranks import shared_ranks
from loralens.core.structured import Update
from loralens.core.together import magnitudes, pad_rank
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.chance import largest_entry_chance, largest_entry_median
from loralens.linalg.factor import common_dtype
from loralens.linalg.lanczos import Decomposed, Method, leading_triplets, rank_update
from loralens.linalg.measures import numerical_rank

# The values of Shuttleworth et al. 2024, of their code and of PEFT's `reduce_intruder_dimension`.
TOP = 10  # leading directions that are tested
THRESHOLD = 0.5  # the cosine below which a direction is an intruder


@final
@dataclass(frozen=True, slots=True)
class Intruders:
    """The leading singular directions of W + ΔW of one module, and their similarity to those of W.

    Attributes
    ----------
    s : float64 array, shape (k,)
        The k largest singular values of W + ΔW, largest first, in the units of the weight.
    scores : float64 array, shape (k,)
        max_i |⟨y_j, u_i⟩| of the left vector y_j over all thin left vectors u_i of W; in [0, 1].
    threshold : float
        y_j is an intruder if its score is below this.
    shape : tuple of int
        (out, in).
    tied : bool
        Whether two of these values, or the last one and the next, agree to 1e-9. Their vectors, and so the scores,
        are then not unique.
    method : str
        ``lanczos``, or ``dense`` if that did not converge in time.
    U : float64 array, shape (out, count)
    V : float64 array, shape (in, count)
        Left and right vectors of the intruders, in order.
    """

    s: Array
    scores: Array
    threshold: float
    shape: tuple[int, int]
    tied: bool
    method: Method
    U: Array
    V: Array

    @property
    def indices(self) -> Array:
        """The indices of the intruders among the leading directions, from 0."""
        return np.flatnonzero(self.scores < self.threshold)

    @property
    def count(self) -> int:
        """The number of intruders."""
        return int(self.indices.size)

    @property
    def energy_share(self) -> float:
        """Σσ² of the intruders relative to Σσ² of the leading directions, in [0, 1]."""
        total = float(np.sum(self.s**2))
        return float(np.sum(self.s[self.indices] ** 2)) / total if total else 0.0

    @property
    def chance(self) -> float:
        """The probability that a uniform random direction of R^out would be called an intruder."""
        return largest_entry_chance(self.shape[0], min(self.shape), self.threshold)

    @property
    def random_score(self) -> float:
        """The median score of a uniform random direction of R^out."""
        return largest_entry_median(self.shape[0], min(self.shape))

    def without_vectors(self) -> "Intruders":
        """The same numbers without the vectors, whose memory is released."""
        return replace(self, U=self.U[:, :0].copy(), V=self.V[:, :0].copy())


def check_plain(adapter: Adapter, names: Sequence[str], *, pairs: bool = False) -> None:
    """Raise an error for modules whose tuned weight is not W + ΔW; with ``pairs``, also for those without factors.

    Raises
    ------
    MismatchError
        A module has a DoRA magnitude, or no factors.
    """
    dora = magnitudes(adapter)
    for name in names:
        if name in dora:
            raise MismatchError(
                f"{name} is DoRA: its magnitude scales the rows of W + ΔW, which no adapter of low rank can express",
                fix="choose other modules with --modules, or merge the adapter and compare whole models",
            )
        if pairs:
            with place(name):
                _factors(adapter[name])


def check_definition(*, top: int, threshold: float) -> None:
    """Raise an error for a threshold, or a number of directions, with which nothing could be found.

    Raises
    ------
    OptionError
        The message states the allowed values.
    """
    if not 0 < threshold <= 1:
        raise OptionError(f"the threshold {threshold:g} is not in (0, 1]", fix="give a cosine above 0, and at most 1")
    if top < 1:
        raise OptionError(f"the number of leading directions is {top}", fix="give 1 or more")


def find_intruders(module: Update, W: Decomposed, *, top: int = TOP, threshold: float = THRESHOLD) -> Intruders:
    """The leading directions of W + ΔW, and which of them are intruders.

    Parameters
    ----------
    module : LowRank or Structured
        ΔW (out, in).
    W : Decomposed
        The SVD of the weight it is added to.
    top : int
        The number of leading directions that are tested; fewer if W + ΔW has a smaller rank.
    threshold : float
        ε of the definition, in (0, 1].

    Notes
    -----
    W + ΔW is never formed. In the bases of W it is S₀ + P Q (`rank_update`), a matrix that can be multiplied in O(n r),
    and the first min(out, in) entries of its left vectors are the cosines. If a singular value is at least 1e-2 σ_1
    from its neighbours, the error of its score is 1e-7, the rounding of the stored vectors.

    Raises
    ------
    OptionError
        The threshold or the number of directions is out of range.
    """
    check_definition(top=top, threshold=threshold)
    # ΔW as a product of singular directions times √σ, so that both factors have the same norm. Directions with σ = 0
    # are left out.
    U, s, Vh = module.svd()
    r = numerical_rank(s, module.shape)
    root = np.sqrt(s[:r])
    tuned = rank_update(W, U[:, :r] * root, root[:, None] * Vh[:r])
    k = min(module.shape)
    triplets = leading_triplets(tuned.matrix, min(top, k))
    count = numerical_rank(triplets.s, module.shape)
    # The bases of W were extended by the directions outside them: the first k entries belong to W's own left vectors.
    scores = np.abs(triplets.Y[:k, :count]).max(axis=0, initial=0.0)
    chosen = np.flatnonzero(scores < threshold)
    return Intruders(
        triplets.s[:count],
        np.minimum(scores, 1.0),
        threshold,
        module.shape,
        triplets.tied,
        triplets.method,
        tuned.left.columns(triplets.Y[:, chosen]),
        tuned.right.columns(triplets.Z[:, chosen]),
    )


def remove_intruders(module: Update, intruders: Intruders, *, strength: float, dtype: DTypeLike = np.float32) -> Update:
    """Scale the singular values of the intruders in W + ΔW by ``strength``: 0 removes them, 1 keeps them.

    ΔW′ = ΔW + (strength − 1) Σ σ_i u_i v_iᵀ (Shuttleworth et al. 2024, §5). The edit is exact and adds one rank for
    each intruder. PEFT's ``reduce_intruder_dimension`` makes the same edit and truncates the result to the old rank.

    Parameters
    ----------
    module : LowRank or Structured
    intruders : Intruders
        The intruders of this module, with their vectors.
    strength : float
        λ of the paper.
    dtype : dtype
        The dtype of the new factors. The scale is kept, and every new direction is balanced between the two factors, so
        that a narrow dtype adds no error beyond its rounding.

    Raises
    ------
    MismatchError
        The module is not a pair.
    """
    if strength == 1 or not intruders.count:  # the same object, with its stored bits
        return module
    module = _factors(module)
    weights = (strength - 1) * intruders.s[intruders.indices]
    scale = module.scale or 1.0  # an update with the scale 0 is 0, so the scale is free
    # The sign of a weight goes into B, and each factor gets the root of its size relative to the scale.
    root = np.sqrt(np.abs(weights) / abs(scale))
    B = module.B.astype(np.float64) * (module.scale != 0)
    B = np.hstack([B, intruders.U * root * copysign(1.0, (strength - 1) * scale)])
    A = np.vstack([module.A.astype(np.float64), (intruders.V * root).T])
    # New columns of B have no block structure, so the module is an ordinary one from now on.
    layout = replace(module.layout, kind="linear", groups=1) if module.layout.kind == "merged" else module.layout
    return LowRank(B.astype(dtype), A.astype(dtype), scale, scaling=module.scaling, layout=layout)


def _factors(module: Update) -> LowRank:
    """The module itself if it is a pair; raises a MismatchError if not."""
    if isinstance(module, LowRank):
        return module
    raise MismatchError(
        f"a {module.form.name} has no factors that could be extended",
        fix="make it a pair first (loralens convert --rank R), or choose other modules with --modules",
    )


def replace_modules(adapter: Adapter, modules: Mapping[str, Update], *, uniform: bool = False) -> Adapter:
    """Replace modules; the experts of a stack, or with ``uniform`` all modules, are brought to one rank.

    Groups without a replaced module stay the same objects, and are written back as they were read.
    """
    all_modules = {name: modules.get(name, module) for name, module in adapter.items()}
    groups = dict.fromkeys(all_modules, "") if uniform else shared_ranks(all_modules)
    for group in {groups[name] for name in modules if name in groups}:
        members = {name: module for name, module in all_modules.items() if groups.get(name) == group}
        rank, dtype = max(m.rank for m in members.values()), common_dtype(m.dtype for m in members.values())
        all_modules |= {name: pad_rank(module, rank, dtype) for name, module in members.items()}
    return replace(adapter, modules=all_modules)
