"""DoRA's magnitudes for a truncated direction: those with which the merged weight is nearest to what it was.

DoRA has W' = m · V/‖V‖ with V = W + ΔW, ‖·‖ and m for each output (or each input, as some LyCORIS files have it). With
another V' the nearest multiple of V'/‖V'‖ to the old row m V/‖V‖ is its projection: m' = m · cos∠(V, V'). So a shorter
row, never a longer one; with the old m the norms would be right and the distance larger.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.carried import NORMS, magnitudes
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.weights import Weight
from loralens.errors import ShapeError, place


def resolved(before: Adapter, after: Adapter, weights: Mapping[str, Weight]) -> Adapter:
    """``after`` with magnitudes solved anew for its directions, wherever a module is not the one of ``before``.

    Parameters
    ----------
    before, after : Adapter
        With the same extras.
    weights : mapping of str to Weight
        The base weight of every module that has a magnitude.

    Raises
    ------
    ShapeError
        A magnitude that is not one number for each output, or input channel.
    """
    extra = dict(after.extra)
    for name, key in magnitudes(after).items():
        if after[name] is not before[name]:
            with place(key):
                extra[key] = _solved(extra[key], before[name], after[name], weights[name])
    return replace(after, extra=extra)


def _solved(extra: Extra, before: Update, after: Update, weight: Weight) -> Extra:
    over_in, kernel = extra.role in ("magnitude", "norms"), before.layout.kernel
    tensor = extra.tensor
    if extra.role == "magnitude_in" and not kernel and before.shape[1] % max(1, tensor.size) == 0:
        kernel = (before.shape[1] // max(1, tensor.size),)  # which LyCORIS stores flat
    cosines = cosines_of(before, after, weight, over_in=over_in, kernel=kernel)
    if extra.role in NORMS:  # from now on the file has them
        shape = (1, before.shape[0], *(1 for _ in kernel)) if kernel else (cosines.size,)
        tensor = LazyArray.of(weight.lengths(by_input=not over_in).astype(np.float32).reshape(shape))
        extra = Extra("magnitude" if over_in else "magnitude_in", extra.module, tensor)
    if tensor.size != cosines.size:
        raise ShapeError(
            f"{tensor.shape} is not one number for each of {cosines.size} channels", fix="save the adapter again"
        )
    m = tensor.read().astype(np.float64) * cosines.reshape(tensor.shape)
    return replace(extra, tensor=LazyArray.of(m.astype(tensor.dtype)))


def cosines_of(
    before: Update, after: Update, weight: Weight, *, over_in: bool = True, kernel: tuple[int, ...] = ()
) -> Array:
    """cos∠(V, V') of each row (``over_in``) or column of V = W + ΔW and V' = W + ΔW'.

    Returns
    -------
    float64 array, shape (out,), or (in channels,): columns of one input channel of a kernel count as one; 1 where a
    row is 0.
    """
    out, in_ = before.shape
    sums = np.zeros((3, out if over_in else in_))
    first, second = (_parts(module, in_side=weight.transposed) for module in (before, after))
    for part, block in weight.blocks():
        W = block.astype(np.float64).T if weight.transposed else block.astype(np.float64)
        V, V_ = W + first(part), W + second(part)
        products = [np.einsum("ij,ij->i" if over_in else "ij,ij->j", x, y) for x, y in ((V, V_), (V, V), (V_, V_))]
        if over_in == weight.transposed:  # each block holds a piece of every row
            sums += products
        else:
            sums[:, part] = products
    if not over_in and kernel:
        sums = sums.reshape(3, in_ // prod(kernel), prod(kernel)).sum(2)
    dot, square, square_ = sums
    length = np.sqrt(square) * np.sqrt(square_)
    return np.asarray(np.divide(dot, length, out=np.ones_like(dot), where=length > 0))


def _parts(module: Update, *, in_side: bool) -> Callable[[slice], Array]:
    """Slice → those rows of ΔW, or those columns; the factors are read once."""
    if not isinstance(module, LowRank):
        dense = module.dense()
        return lambda part: dense[:, part] if in_side else dense[part]
    scale, B, A = module.scale, module.B.astype(np.float64), module.A.astype(np.float64)
    return lambda part: scale * (B @ A[:, part] if in_side else B[part] @ A)
