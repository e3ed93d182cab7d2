"""DoRA adapters in a combination: each is separated into pairs and stretches of W, and a method combines both.

The notation is that of `loralens.arithmetic.dora`: ΔW = diag(g) L + diag(g − 1) W with L = scale·B·A.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from loralens.arithmetic.dora import Stretches, Weights, keys_of_magnitudes, separate_stretches, weight_pieces
from loralens.arithmetic.method import CombiningMethod
from loralens.arithmetic.quality import Quality, sum_above_rounding
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.joint import Core, Joint
from loralens.core.together import Row, match_names
from loralens.core.weights import Weight
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.factor import Floats


@final
@dataclass(frozen=True, slots=True)
class DoraCombination:
    """Adapters of which at least one is DoRA, each separated into pairs and stretches.

    Attributes
    ----------
    adapters : tuple of Adapter
        The adapters as they were given.
    plain : list of Adapter
        The same adapters without magnitudes: their pairs are diag(g) L.
    parts : list of mapping of str to float64 array, shape (out,)
        For each adapter, g − 1 of its DoRA modules, under its own module names.
    called : mapping of str to sequence of str or None
        Module name of the combination → the name of that module in each adapter.
    weights : mapping of str to Weight
        Base weights, under the module names of any of the adapters.
    """

    adapters: tuple[Adapter, ...]
    plain: list[Adapter]
    parts: list[dict[str, Floats]]
    called: Mapping[str, Sequence[str | None]]
    weights: Weights

    @classmethod
    def of(
        cls, adapters: Sequence[Adapter], labels: Sequence[str], row: CombiningMethod, weights: Weights, threads: int
    ) -> "DoraCombination | None":
        """Separate the adapters; return None if none of them is DoRA."""
        if not any(map(magnitudes, adapters)):
            return None
        # A rule that is not linear would need the whole ΔW, and diag(g − 1) W lies in no joint space of pairs.
        if not row.linear:
            raise OptionError(
                f"{row.name} does not combine DoRA adapters, because what they add to the base has full rank",
                fix="give --method sum or average; or make each a plain pair with loralens merge and extract",
            )
        separated = []
        for adapter, label in zip(adapters, labels, strict=True):
            with place(label):
                separated.append(separate_stretches(adapter, weights, threads=threads))
        plain, parts = (list(side) for side in zip(*separated, strict=True))
        return cls(tuple(adapters), plain, parts, match_names(adapters, labels), weights)

    def row_changes(self, name: str, out: int) -> Floats:
        """Return the stretches h_t of one module, shape (T, out); 0 for an adapter that is not DoRA in this module."""
        own = zip(self.called[name], self.parts, strict=True)
        return np.array([part[own_name] if own_name in part else np.zeros(out) for own_name, part in own])

    def weight(self, name: str) -> Weight:
        """Return the base weight of one module, under whichever of its names it was given."""
        for own_name in self.called[name]:
            if own_name is not None and own_name in self.weights:
                return self.weights[own_name]
        raise MismatchError(f"the base weight of {name} is not there", fix="give the base that it was trained on")

    def stretches(self, rows: Mapping[str, Row], h: Mapping[str, Floats]) -> Stretches:
        """Return the stretches ``h`` of the result, with the base weights and file keys that its magnitudes need."""
        present = {name: next(update for update in row if update is not None) for name, row in rows.items()}
        modules = {name: (update, self.called[name]) for name, update in present.items()}
        stretches = Stretches(h, {name: self.weight(name) for name in rows}, {})
        # Without a stretch no magnitude is written, and no key for one has to be found.
        return replace(stretches, keys=keys_of_magnitudes(self.adapters, modules)) if stretches.any else stretches

    def notes(self, stretches: Stretches) -> tuple[str, ...]:
        """Return a sentence that says whether the result is DoRA too."""
        count = sum(map(bool, self.parts))
        came = "DoRA too, exact for this base" if stretches.any else "a plain sum of pairs: all stretches cancel"
        return (f"{count} of {len(self.parts)} adapters {'is' if count == 1 else 'are'} DoRA; the result is {came}",)


def add_stretches(
    quality: Quality, joint: Joint, core: Core, h_each: Floats, h_result: Floats, weight: Weight
) -> Quality:
    """Add what stretches of W contribute to the squares and inner products of ``quality``, which has only the pairs.

    Parameters
    ----------
    quality : Quality
    joint : Joint
        The joint space of the pairs K_t = diag(g_t) L_t.
    core : Core
        The pair of the result. It may be cut later; its stretch never is.
    h_each : float64 array, shape (T, out)
        The stretches h_t of the adapters: ΔW_t = K_t + diag(h_t) W.
    h_result : float64 array, shape (out,)
        The stretch h of the result.
    weight : Weight
        W.

    Notes
    -----
    For a pair K = Q_B M Q_Aᵀ, ⟨K, diag(h) W⟩ = ⟨M, P⟩ with P = Q_Bᵀ diag(h) W Q_A, and ⟨diag(x) W, diag(y) W⟩ =
    Σ x_i y_i‖W_i‖². So one pass over W is enough, and none is needed if no update stretches it. Cutting the rank takes
    energy from the pair only, so the energy of the stretch and its mixed terms with the pair count as retained in full.
    """
    if not h_each.any():
        return quality
    U, s, Vh = core
    # One pass over W gives all products: W is multiplied by the columns of Q_A only.
    norms, across = _row_norms_and_products(weight, joint.right.columns())
    Q_B = joint.left.columns()
    of_sum = joint.strengths @ h_each
    P, P_sum, P_result = ([Q_B.T @ (h[:, None] * across) for h in hs] for hs in (h_each, [of_sum], [h_result]))
    S = sum_above_rounding(joint.strengths, joint.cores, joint.floor)

    # Summed over the directions in their order, as any of them may be the last that is kept.
    def along(X: Floats) -> Floats:
        """⟨R_j, X⟩ for the ranks j = 0 … k to which the pair of the result is cut."""
        return np.append(0.0, (s * np.einsum("ik,ij,kj->k", U, X, Vh)).cumsum())

    # Every square and inner product of pairs gains two mixed terms, of pair and stretch, and one of the two stretches.
    pairs = list(zip(joint.cores, P, h_each, strict=True))
    extra = np.array([2 * np.sum(M * own) + h**2 @ norms for M, own, h in pairs])
    P_excess = P_result[0] - P_sum[0]
    # R_j − S is a difference of pairs and a difference of stretches, with a mixed term between them.
    errors = quality.errors + 2 * (along(P_excess) - np.sum(S * P_excess)) + (h_result - of_sum) ** 2 @ norms
    return replace(
        quality,
        energies=quality.energies + extra,
        sum_energy=float(quality.sum_energy + 2 * np.sum(S * P_sum[0]) + of_sum**2 @ norms),
        sum_inner=quality.sum_inner
        + np.array([np.sum(S * own) + np.sum(P_sum[0] * M) + (of_sum * h) @ norms for M, own, h in pairs]),
        # Rounding can leave a small negative number where R equals S.
        errors=np.maximum(errors, 0.0),
        inner=quality.inner
        + np.array([along(own) + np.sum(P_result[0] * M) + (h_result * h) @ norms for M, own, h in pairs]),
        retained=quality.retained + extra[:, None],
    )


def _row_norms_and_products(weight: Weight, columns: Floats) -> tuple[Floats, Floats]:
    """‖W_i‖² of every row, shape (out,), and W @ columns."""
    out = weight.shape[0]
    norms, across = np.zeros(out), np.zeros((out, columns.shape[1]))
    for rows, part, W in weight_pieces(weight):
        norms[rows] += np.einsum("ij,ij->i", W, W)
        across[rows] += W @ columns[part]
    return norms, across
