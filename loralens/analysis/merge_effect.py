"""The base model that an adapter is checked against, and the effect of merging each update into its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import ml_dtypes
import numpy as np

from loralens.analysis.inspection import count_non_finite
from loralens.analysis.spectrum import Spectrum
from loralens.core.base_model import BaseModel
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.names import nearest, weight_name
from loralens.core.structured import Update, Updates
from loralens.core.threads import Step
from loralens.core.weights import CodedWeight, Weight, merged_dtype, weights_of
from loralens.errors import MismatchError
from loralens.linalg.rounding import SAMPLE, RoundingLoss, product_entries, sample_entries, sampled_rounding

Reason = tuple[str, str]  # what is wrong, and a fix

NAMED = 20  # modules without a weight for which the nearest names in the base are listed
FEW = 1 << 14  # entries of a coded weight: the ratio of norms then has an error of 1 %


@final
@dataclass(frozen=True, slots=True)
class Base:
    """A base model.

    Attributes
    ----------
    tensors : mapping of str to LazyArray
        Its tensors by key.
    conv1d : bool
        Whether linear weights are stored (in, out).
    float8 : mapping of str to pair of dtype and LazyArray
        Key of each float8 weight that has scales → its stored dtype, and the scale of every entry.
    model : BaseModel or None
        What else is known of it, such as other names and its sizes.
    coded : mapping of str to CodedWeight
        The quantised weights, by key.
    """

    name: str
    tensors: Mapping[str, LazyArray]
    conv1d: bool = False
    float8: Mapping[str, tuple[np.dtype[Any], LazyArray]] = field(default_factory=dict)
    model: BaseModel | None = None
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class MergeEffect:
    """The effect of merging one update ΔW into its weight W.

    Attributes
    ----------
    ratio : float
        ‖ΔW‖_F/‖W‖_F, where ‖W‖_F is estimated from at most 2¹⁸ entries (error 0.3 %), or from 2¹⁴ if the merge moves
        codes (error 1 %).
    dtype : str
        The dtype that the merge writes: the requested one, else that of W.
    rounding : RoundingLoss
        What rounding leaves of ΔW, estimated from the same entries.
    """

    ratio: float
    dtype: str
    rounding: RoundingLoss


def find_weights(modules: Updates, base: Base) -> tuple[dict[str, Weight], dict[str, Reason]]:
    """The weight of every module in the base, and module name → the reason why it has none.

    Modules whose rows are not in the order of the base are left out, because the reader has reported them. A reason
    that applies to all modules is under the key ""; then no weight is returned.
    """
    modules = {name: module for name, module in modules.items() if not module.layout.rows}
    try:
        weights = weights_of(modules, base.tensors, conv1d=base.conv1d, allow_missing=True).modules
    except MismatchError as error:
        return {}, {"": (error.what, error.fix)}
    stored = [key.removesuffix(".weight") for key in base.tensors if key.endswith(".weight")]
    unmatched: dict[str, Reason] = {}
    for name in [name for name in modules if name not in weights]:
        shape = modules[name].shape
        what, fix = f"the base has no weight of this name and shape {shape}", "compare the names with those in the base"
        other = next((base.tensors[key].shape for key in (f"{name}.weight", name) if key in base.tensors), None)
        if other is not None:
            what, fix = f"{shape} here and {other} in the base", "give the base that the adapter was trained on"
        elif len(unmatched) < NAMED:  # to look for near names takes long
            fix = f"the nearest names there are {nearest(weight_name(name), stored)}"
        unmatched[name] = what, fix
    return dict(weights), unmatched


def merge_effects(
    modules: Updates,
    spectra: Mapping[str, Spectrum],
    weights: Mapping[str, Weight],
    base: Base,
    *,
    dtype: str | None = None,
    stochastic: bool = False,
    step: Step | None = None,
) -> tuple[dict[str, MergeEffect], dict[str, int]]:
    """The effect of merging every update, from entries drawn with a fixed seed; and the weights with NaN or Inf.

    The merge writes ``dtype``, by default that of the base, and rounds to the nearest number unless ``stochastic``.
    ``step`` is called with 1 for every module.

    Returns
    -------
    dict of str to MergeEffect
    dict of str to int
        Module name → the number of NaN and Inf in its weight; such modules have no effect listed.
    """
    effects, non_finite_weights = {}, {}
    scales = _scales(modules, weights, base)
    merge_dtype = None if dtype is None else np.dtype(getattr(ml_dtypes, dtype, dtype))
    for name, spectrum in spectra.items():
        if step:
            step(1)
        if name not in weights or spectrum.spectral == 0:
            continue
        W, scale = weights[name].read(), scales.get(name)
        if count := count_non_finite(W):
            non_finite_weights[name] = count
            continue
        # A float8 weight is decoded when it is read, so W has another dtype than the stored weight. A merge writes the
        # stored dtype by default.
        stored = base.float8[weights[name].key][0] if scale else W.dtype
        written = merged_dtype(stored, merge_dtype, scaled=scale is not None)
        # Without a dtype a merge moves the codes of a coded weight, which has a prediction of its own (`low_bit`).
        # Here only the ratio is of use, for which fewer entries will do.
        moves_codes = merge_dtype is None and weights[name].key in base.coded
        rows, columns = sample_entries(W.shape, count=FEW if moves_codes else SAMPLE)
        w = W[rows, columns]
        rounding = sampled_rounding(
            w,
            update_entries(modules[name], rows, columns),
            size=W.size,
            norm=spectrum.frobenius,
            dtype=written,
            scale=scale.read()[rows, columns] if scale and written == stored else None,
            stochastic=stochastic,
        )
        weight_norm = float(np.mean(w.astype(np.float64) ** 2) * W.size) ** 0.5
        ratio = spectrum.frobenius / weight_norm if weight_norm else np.inf
        effects[name] = MergeEffect(ratio, written.name, rounding)
    return effects, non_finite_weights


def bf16_errors(
    modules: Updates, spectra: Mapping[str, Spectrum], weights: Mapping[str, Weight], effects: Mapping[str, MergeEffect]
) -> dict[str, float]:
    """Module name → the error of a merge into bfloat16 weights, as a share of ‖ΔW‖, for the modules of ``effects``.

    Where the merge writes bfloat16 anyway, the error is that of its effect.
    """
    errors = {name: effect.rounding.error for name, effect in effects.items() if effect.dtype == "bfloat16"}
    for name in effects.keys() - errors.keys():
        W = weights[name].read()
        rows, columns = sample_entries(W.shape)
        d = update_entries(modules[name], rows, columns)
        size, norm = W.size, spectra[name].frobenius
        errors[name] = sampled_rounding(W[rows, columns], d, size=size, norm=norm, dtype=ml_dtypes.bfloat16).error
    return {name: errors[name] for name in effects}


def _scales(modules: Updates, weights: Mapping[str, Weight], base: Base) -> dict[str, Weight]:
    """The scales of the float8 weights among ``weights``, in the layout of their weights."""
    # Most bases have none: nothing is matched for them.
    if not any(weight.key in base.float8 for weight in weights.values()):
        return {}
    spread = {key: scale for key, (_, scale) in base.float8.items()}
    aligned_scales = weights_of(
        {name: modules[name] for name in weights}, {**base.tensors, **spread}, conv1d=base.conv1d
    )
    return {name: weight for name, weight in aligned_scales.modules.items() if weight.key in spread}


def update_entries(module: Update, rows: Array, columns: Array) -> Array:
    """ΔW at some entries, float64."""
    if isinstance(module, LowRank):
        return module.scale * product_entries(module.B, module.A, rows, columns)
    return np.asarray(module.dense()[rows, columns])
