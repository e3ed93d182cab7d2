"""The three spaces in which an elementwise rule can act: ΔW itself, the parts of a joint SVD, or small cores.

A rule that looks at single entries depends on the basis, so the three spaces give different updates: TIES of two
independent adapters in the core space differs from TIES of the full updates by 80 %.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from loralens.arithmetic.entries import DenseMatrix, Entries, Fuse, Fused, Product
from loralens.arithmetic.knots import output_basis
from loralens.choices import Space
from loralens.core.joint import COMBINED, Joint
from loralens.core.lowrank import LowRank
from loralens.linalg.factor import Floats, Integers
from loralens.linalg.product import truncating_maps
from loralens.linalg.sketch import low_rank_approximation


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
        factors = low_rank_approximation(
            lambda: ((rows, fuse(rows, stack)) for rows, stack in entries.blocks()),
            joint.shape,
            rank=rank,
            start=joint.right,
        )
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
    return np.asarray(U[:, s > s[0] * max(U.shape) * 2.0**-52], np.float64)


def _dense(joint: Joint, places: Integers, matrices: list[Floats]) -> Entries:
    # float64 where the full space takes float32: these matrices are small, and float32 would add its rounding.
    dense = tuple(DenseMatrix(np.asarray(matrix, np.float64)) for matrix in matrices)
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
