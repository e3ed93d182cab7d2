"""Writing the whole merged model in another dtype, which also changes tensors that no adapter touches."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy the name bfloat16
import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.weights import merged_dtype
from loralens.merging.plan import MergePlan, TensorPlan, as_matrix

# Older versions of transformers write the first name, newer ones the second.
FIELDS = ("torch_dtype", "dtype")  # of config.json
QUANTISATION = ("quantization_config", "quantization")  # of config.json; the second one is MLX's


def recast(
    plan: MergePlan,
    tensors: Mapping[str, LazyArray],
    dtype: str | None,
    *,
    scales: Mapping[str, LazyArray],
    coded: Collection[str],
    without: Collection[str],
    config: Mapping[str, Any],
) -> MergePlan:
    """Add to a plan all other tensors that change their dtype, and the fields of the configuration that name the dtype.

    Parameters
    ----------
    plan : MergePlan
    tensors : mapping of str to LazyArray
        All tensors of the base, as stored; weights that are stored as codes of a few bits are decoded.
    dtype : str or None
        NumPy's name of the dtype. None keeps the dtype of every tensor.
    scales : mapping of str to LazyArray
        The scales of float8 weights. In another dtype these weights are stored as products, without scales.
    coded : collection of str
        Keys of the weights that are stored as codes. In another dtype they are stored as floats.
    without : collection of str
        Keys of the stored scales and codes, which the merged model does not have.
    config : mapping
        ``config.json``.
    """
    # Every tensor keeps its dtype, so only the adapted tensors change.
    if dtype is None:
        count = sum(tensor.scale is not None for tensor in plan.tensors.values())
        note = f"{count} weights are float8 with scales: they are decoded, merged, and rounded to float8 again"
        return replace(plan, notes=(*plan.notes, note)) if count else plan
    untouched = {
        key: TensorPlan(key, tensor, as_matrix(tensor.shape), scale=scales.get(key))
        for key, tensor in tensors.items()
        if key not in plan.tensors
    }
    # Integers and tensors that already have the dtype are copied as they are. Codes must be decoded first.
    changing = {
        key: tensor
        for key, tensor in untouched.items()
        if key in coded or recast_dtype(tensor, dtype) != tensor.source.dtype
    }
    # A decoded weight is a new tensor of the merged model.
    planned = {
        key: replace(tensor, base=None, replacement=tensor.source) if key in coded else tensor
        for key, tensor in {**plan.tensors, **changing}.items()
    }
    fields: dict[str, object] = {name: dtype for name in FIELDS if name in config}
    if scales or coded:
        # transformers and mlx-lm would otherwise look for the scales that are no longer stored.
        fields |= dict.fromkeys((name for name in QUANTISATION if name in config), None)
    notes = [f"{len(scales)} float8 weights become {dtype}, multiplied by their scales"] if scales else []
    notes += [f"{len(coded)} low-bit weights become {dtype}"] if coded else []
    return replace(
        plan,
        tensors=planned,
        config={**plan.config, **fields},
        dropped=tuple(without),
        notes=(*plan.notes, *notes),
    )


def recast_dtype(tensor: TensorPlan, dtype: str | None) -> np.dtype[Any]:
    """The dtype of a tensor in the merged model."""
    return merged_dtype(tensor.dtype, dtype, scaled=tensor.scale is not None)
