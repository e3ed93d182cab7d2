"""The base model that an adapter is checked against, and the effect of merging each update into its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import ml_dtypes
import numpy as np

from loralens.analysis.inspection import count_non_finite
from loralens.analysis.spectrum import Spectrum
from loralens.core.base_model import BaseModel
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.matching import Shape, Storage, match
from loralens.core.structured import Update, Updates
from loralens.core.threads import Step
from loralens.core.weights import CodedWeight, Weight, merged_dtype, weights_of
from loralens.errors import MismatchError
from loralens.linalg.rounding import SAMPLE, RoundingLoss, product_entries, sample_entries, sampled_rounding

Reason = tuple[str, str]  # what is wrong, and a fix

FEW = 1 << 14  # entries of a coded weight: the ratio of norms then has an error of 1 %
# A module without a weight is found by halving, about 12 splits among 4,000 modules.
TRIES = 200  # splits in the search for modules without a weight: enough for a dozen of them among thousands


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
        The weights that are stored as codes of a few bits, by key.
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
    """Find the weight of every module in the base, and the reason for every module that has none.

    Modules whose rows are not in the order of the base are left out, because the reader has reported them. If the match
    of all modules fails, each half is matched alone, and so on, so that one head that the base lacks does not hide the
    weights of all other modules.

    Returns
    -------
    dict of str to Weight
    dict of str to Reason
        Module name → reason. A reason that applies to all modules is under the key ""; then no weight is returned.
    """
    modules = {name: module for name, module in modules.items() if not module.layout.rows}
    # Computed once: the table of stored names is needed for every attempt to match.
    shapes = {key: tensor.shape for key, tensor in base.tensors.items()}
    storage = Storage(shapes)
    tries = iter(range(TRIES))
    errors: list[MismatchError] = []

    def find_unmatched(names: Sequence[str]) -> Iterator[tuple[str, Reason]]:
        try:
            match({name: modules[name].shape for name in names}, shapes, storage=storage)
        except MismatchError as error:
            errors.append(error)
            if len(names) == 1 or next(tries, None) is None:
                yield from ((name, _reason(name, modules[name].shape, shapes, error)) for name in names)
                return
            middle = len(names) // 2
            yield from find_unmatched(names[:middle])
            yield from find_unmatched(names[middle:])

    unmatched = dict(find_unmatched(list(modules)))
    matching = {name: module for name, module in modules.items() if name not in unmatched}
    if not matching:
        return {}, unmatched | {"": (errors[0].what, errors[0].fix)} if errors else {}
    try:
        return dict(weights_of(matching, base.tensors, conv1d=base.conv1d).modules), unmatched
    except MismatchError as error:  # halves may match alone, each under another prefix, and not together
        return {}, unmatched | {"": (error.what, error.fix)}


def _reason(name: str, shape: Shape, shapes: Mapping[str, Shape], error: MismatchError) -> Reason:
    stored = next((shapes[key] for key in (f"{name}.weight", name) if key in shapes), None)
    if stored is not None:
        return f"{shape} here and {stored} in the base", "give the base that the adapter was trained on"
    return f"the base has no weight of this name and shape {shape}", error.fix


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
    errors = {}
    for name, effect in effects.items():
        if effect.dtype == "bfloat16":
            errors[name] = effect.rounding.error
            continue
        W = weights[name].read()
        rows, columns = sample_entries(W.shape)
        d = update_entries(modules[name], rows, columns)
        rounding = sampled_rounding(
            W[rows, columns], d, size=W.size, norm=spectra[name].frobenius, dtype=ml_dtypes.bfloat16
        )
        errors[name] = rounding.error
    return errors


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
