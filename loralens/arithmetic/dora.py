"""Exact sums of DoRA adapters, and the DoRA adapter that such a sum is.

A DoRA adapter turns W into W' = diag(g)(W + L) with L = scale·B·A and g = m/‖W + L‖ for every row. The change that it
makes is a pair and a scaling of the rows of W,

    ΔW = diag(g) L + diag(g − 1) W,

which has full rank. A sum of such changes has the same form, Σ c ΔW = K + diag(h) W, where K = Σ c diag(g) L has the
rank Σ r and h = Σ c (g − 1). One DoRA adapter makes exactly this change:

    W + K + diag(h) W = diag(1 + h)(W + L'),    L' = diag(1/(1 + h)) K,    m' = (1 + h)‖W + L'‖.

The only error is the rounding of the factors and of m', and m' is computed from the rounded factors. Where ranks are
cut, K is cut optimally and the scaling stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import final

import numpy as np

from loralens.arithmetic.methods import METHODS, CombiningMethod
from loralens.arithmetic.quality import Quality, sum_above_rounding
from loralens.core.adapter import Adapter, Extra
from loralens.core.attached import PEFT_PREFIX
from loralens.core.joint import Core, Joint, Lift
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.threads import in_threads
from loralens.core.together import NORMS, Row, magnitudes, match_names
from loralens.core.weights import Weight
from loralens.errors import MismatchError, OptionError, ShapeError, place
from loralens.linalg.factor import Floats

Weights = Mapping[str, Weight]
# The smallest |1 + h|. Below it almost nothing of W is left in a row, and B' cannot replace it: L' would be more than a
# million times as large as K.
LEAST = 2.0**-20


def store_magnitudes(adapter: Adapter, weights: Weights) -> Adapter:
    """Return the adapter with the magnitudes that its file lacks, which are the lengths of the base weights."""
    extra = dict(adapter.extra)
    for key, entry in adapter.extra.items():
        if entry.role in NORMS:
            kernel, by_input = adapter[entry.module].layout.kernel, entry.role == "norms_in"
            m = weights[entry.module].lengths(by_input=by_input).astype(np.float32)
            role = "magnitude_in" if by_input else "magnitude"
            extra[key] = Extra(role, entry.module, LazyArray.of(m.reshape(_magnitude_shape(m.size, kernel))))
    return replace(adapter, extra=extra)


def _magnitude_shape(count: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """PEFT's shape of a magnitude: of a convolution one number for each channel, to be broadcast over the kernel."""
    return (1, count, *(1 for _ in kernel)) if kernel else (count,)


def separate_row_scalings(adapter: Adapter, weights: Weights, *, threads: int = 1) -> tuple[Adapter, dict[str, Floats]]:
    """Separate a DoRA adapter into the adapter of the pairs diag(g) L and the row scaling g − 1 of every DoRA module.

    Parameters
    ----------
    adapter : Adapter
    weights : mapping of str to Weight
        The base weight of every module that has a magnitude.

    Raises
    ------
    MismatchError
        A magnitude belongs to the inputs, a module is not a pair, or its base weight is missing.
    ShapeError
        A magnitude does not have one number for each output.
    """
    keys_by_module = magnitudes(adapter)
    row_scalings = in_threads(
        lambda name: _row_scaling(adapter, name, keys_by_module[name], weights.get(name)), list(keys_by_module), threads
    )
    keys = {*keys_by_module.values()}
    extra = {key: entry for key, entry in adapter.extra.items() if key not in keys}
    modules = {
        name: _scale_rows(module, row_scalings[name] + 1) if name in row_scalings else module
        for name, module in adapter.items()
    }
    return replace(adapter, modules=modules, extra=extra), row_scalings


def _row_scaling(adapter: Adapter, name: str, key: str, weight: Weight | None) -> Floats:
    """The row scaling g − 1 of the module whose magnitude is stored under ``key``, float64, shape (out,)."""
    module, extra = adapter[name], adapter.extra[key]
    with place(key):
        if extra.role not in ("magnitude", "norms"):
            # Such a sum is not K + diag(h) W, as columns are scaled and not rows.
            what = "is a magnitude by input: it scales the columns of W"
            raise MismatchError(what, fix="merge it into the base with loralens merge")
        if extra.role == "magnitude" and extra.tensor.size != module.shape[0]:
            raise ShapeError(
                f"the shape {extra.tensor.shape} is not one number for each output", fix="save the adapter again"
            )
        if weight is None:
            raise MismatchError("the base has no weight for it", fix="give the base that the adapter was trained on")
        # Without a stored magnitude programs take the lengths of W, so g is ‖W‖/‖W + L‖.
        m = weight.lengths() if extra.role in NORMS else extra.tensor.read().astype(np.float64).reshape(-1)
        lengths = np.sqrt(squares(weight, module))
        # A row of W + L that is 0 stays 0, whatever its magnitude is.
        return np.divide(m, lengths, out=np.ones_like(m), where=lengths > 0) - 1


def _scale_rows(module: Update, rows: Floats) -> LowRank:
    """The pair diag(rows) ΔW: the rows of B are multiplied, A and the scale stay."""
    B, A = module.factors
    # Lazily: B is read when the module is combined, and not for all modules at once.
    scaled = B.map(lambda X: rows[:, None] * X, shape=B.shape, dtype=np.float64)
    return LowRank(scaled, A, module.scale, scaling=module.scaling, layout=module.layout)


def squares(weight: Weight, update: Update) -> Floats:
    """Return ‖W + ΔW‖² of every row, float64, shape (out,)."""
    B, A = update.scale * update.B.astype(np.float64), update.A.astype(np.float64)
    total = np.zeros(weight.shape[0])
    # In pieces, as W + ΔW of a large weight would take gigabytes in float64.
    for rows, columns, W in weight_pieces(weight):
        W += B[rows] @ A[:, columns]
        total[rows] += np.einsum("ij,ij->i", W, W)
    return total


def weight_pieces(weight: Weight) -> Iterator[tuple[slice, slice, Floats]]:
    """Yield W in float64, some rows or columns at a time, with the slices of both; the caller may overwrite a piece."""
    for part, block in weight.blocks():
        # Weights that are stored (in, out), as GPT-2's, are read along their rows, which are the columns of W.
        if weight.transposed:
            yield slice(None), part, block.T.astype(np.float64)
        else:
            yield part, slice(None), block.astype(np.float64)


@final
@dataclass(frozen=True, slots=True)
class RowScalings:
    """The row scalings h of a combination, with the base weights and file keys that its magnitudes need.

    Attributes
    ----------
    h : mapping of str to float64 array, shape (out,)
    weights : mapping of str to Weight
    keys : mapping of str to (str, tuple of int)
        The key of each module's magnitude in the file, and its shape there.
    """

    h: Mapping[str, Floats]
    weights: Weights
    keys: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def any(self) -> bool:
        """Whether any row of W is scaled; if not, the combination is a plain sum of pairs."""
        return any(h.any() for h in self.h.values())

    def pair(self, name: str, lift: Lift) -> Lift:
        """Return L' = diag(1/(1 + h)) K of the module whose K is given.

        Raises
        ------
        MismatchError
            The combination removes the base weight from a row, which DoRA cannot express.
        """
        rows = 1 + self.h[name]
        # A negative 1 + h is possible: m' is then negative, which the formula of DoRA allows.
        gone = int(np.count_nonzero(np.abs(rows) < LEAST))
        if gone:
            with place(name):
                raise MismatchError(
                    f"{gone} rows would keep nothing of the base weight, which no DoRA adapter can express",
                    fix="give other weights",
                )
        return lift.scale_rows(1 / rows)

    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """Return the DoRA adapter of the pairs L' in ``adapter``, with their magnitudes.

        If no row is scaled, the adapter has no magnitudes, and PEFT's configuration says that it is not DoRA.
        """
        extra = dict(adapter.extra)
        for name, module in adapter.items() if self.any else ():
            key, shape = self.keys[name]
            # Computed when it is read, and once: a pass over W takes most of the time of writing.
            compute = cache(partial(_lengths, 1 + self.h[name], self.weights[name], module, shape))
            extra[key] = Extra("magnitude", name, LazyArray(compute, shape=shape, dtype=np.float32))
        config = adapter.config
        # PEFT builds magnitudes only if its configuration says so, and would expect them where it says so wrongly.
        if config is not None and adapter.format == "peft" and bool(config.get("use_dora")) != self.any:
            config = {**config, "use_dora": self.any}
        return replace(adapter, extra=extra, config=config)


def _lengths(rows: Floats, weight: Weight, module: Update, shape: tuple[int, ...]) -> Array:
    """(1 + h)‖W + L'‖; always float32, because a rounding error of m' changes all of W and not only the update."""
    return (rows * np.sqrt(squares(weight, module))).astype(np.float32).reshape(shape)


def keys_of_magnitudes(
    adapters: Sequence[Adapter], modules: Mapping[str, tuple[Update, Sequence[str | None]]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the key of each module's magnitude in a file of the first adapter's dialect, and its shape there.

    They are taken from an adapter of that dialect that has such a magnitude; otherwise they are PEFT's.

    Parameters
    ----------
    adapters : sequence of Adapter
    modules : mapping of str to (LowRank, sequence of str or None)
        Module name in the combination → an update of that module, and its name in each adapter.

    Raises
    ------
    MismatchError
        The dialect is not PEFT's, and no file shows what it calls a magnitude.
    """
    first = adapters[0].format
    keys_by_adapter = [magnitudes(adapter) if adapter.format == first else {} for adapter in adapters]
    keys = {}
    for name, (update, own) in modules.items():
        # Magnitudes that are not in the file have no key that could be used again.
        existing = [
            (keys_here[name], adapter.extra[keys_here[name]].tensor.shape)
            for adapter, keys_here, called in zip(adapters, keys_by_adapter, own, strict=True)
            if called == name and name in keys_here and adapter.extra[keys_here[name]].role not in NORMS
        ]
        if not existing and first != "peft":
            raise MismatchError(
                f"{name} needs a magnitude, and no file shows its name in the format {first}",
                fix="convert the adapters to PEFT first: loralens convert --to peft",
            )
        shape = _magnitude_shape(update.shape[0], update.layout.kernel)
        keys[name] = existing[0] if existing else (f"{PEFT_PREFIX}{name}.lora_magnitude_vector", shape)
    return keys


@final
@dataclass(frozen=True, slots=True)
class DoraCombination:
    """Adapters of which at least one is DoRA, each separated into pairs and row scalings.

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
            linear = " or ".join(name for name, each in METHODS.items() if each.linear)
            raise OptionError(
                f"{row.name} does not combine DoRA adapters, because what they add to the base has full rank",
                fix=f"give --method {linear}; or make each a plain pair with loralens merge and extract",
            )
        separated = []
        for adapter, label in zip(adapters, labels, strict=True):
            with place(label):
                separated.append(separate_row_scalings(adapter, weights, threads=threads))
        plain, parts = (list(side) for side in zip(*separated, strict=True))
        return cls(tuple(adapters), plain, parts, match_names(adapters, labels), weights)

    def row_changes(self, name: str, out: int) -> Floats:
        """Return the row scalings h_t of one module, shape (T, out); 0 for an adapter that is not DoRA here."""
        own = zip(self.called[name], self.parts, strict=True)
        return np.array([part[own_name] if own_name in part else np.zeros(out) for own_name, part in own])

    def weight(self, name: str) -> Weight:
        """Return the base weight of one module, under whichever of its names it was given."""
        for own_name in self.called[name]:
            if own_name is not None and own_name in self.weights:
                return self.weights[own_name]
        raise MismatchError(f"the base weight of {name} is not there", fix="give the base that it was trained on")

    def row_scalings(self, rows: Mapping[str, Row], h: Mapping[str, Floats]) -> RowScalings:
        """Return the row scalings ``h`` of the result, with the base weights and file keys that its magnitudes need."""
        present = {name: next(update for update in row if update is not None) for name, row in rows.items()}
        modules = {name: (update, self.called[name]) for name, update in present.items()}
        row_scalings = RowScalings(h, {name: self.weight(name) for name in rows}, {})
        # Without a row scaling no magnitude is written, and no key for one has to be found.
        return (
            replace(row_scalings, keys=keys_of_magnitudes(self.adapters, modules)) if row_scalings.any else row_scalings
        )

    def notes(self, row_scalings: RowScalings) -> tuple[str, ...]:
        """Return a sentence that says whether the result is DoRA too."""
        count = sum(map(bool, self.parts))
        came = (
            "DoRA too, exact for this base"
            if row_scalings.any
            else "a plain sum of pairs: all scalings of the rows of W cancel"
        )
        return (f"{count} of {len(self.parts)} adapters {'is' if count == 1 else 'are'} DoRA; the result is {came}",)


def add_row_scalings(
    quality: Quality, joint: Joint, core: Core, h_each: Floats, h_result: Floats, weight: Weight
) -> Quality:
    """Add what scalings of the rows of W contribute to ``quality``, which has the squares and products of the pairs.

    Parameters
    ----------
    quality : Quality
    joint : Joint
        The joint space of the pairs K_t = diag(g_t) L_t.
    core : Core
        The pair of the result. It may be cut later; its row scaling never is.
    h_each : float64 array, shape (T, out)
        The row scalings h_t of the adapters: ΔW_t = K_t + diag(h_t) W.
    h_result : float64 array, shape (out,)
        The row scaling h of the result.
    weight : Weight
        W.

    Notes
    -----
    For a pair K = Q_B M Q_Aᵀ, ⟨K, diag(h) W⟩ = ⟨M, P⟩ with P = Q_Bᵀ diag(h) W Q_A, and ⟨diag(x) W, diag(y) W⟩ =
    Σ x_i y_i‖W_i‖². So one pass over W is enough, and none is needed if no update scales its rows. Cutting the rank
    takes energy from the pair only, so the energy of the scaling and its mixed terms with the pair count as retained in
    full.
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

    # Every square and inner product of pairs gains two mixed terms, of pair and scaling, and one of the two scalings.
    pairs = list(zip(joint.cores, P, h_each, strict=True))
    extra = np.array([2 * np.sum(M * own) + h**2 @ norms for M, own, h in pairs])
    P_excess = P_result[0] - P_sum[0]
    # R_j − S is a difference of pairs and a difference of scalings, with a mixed term between them.
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
