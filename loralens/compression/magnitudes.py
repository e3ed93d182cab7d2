"""The DoRA magnitudes of a truncated adapter that keep the merged weight nearest to what it was.

DoRA merges to W' = m · V/‖V‖ with V = W + ΔW, where ‖·‖ and m belong to each output (in some LyCORIS files, to each
input). When V changes to V', the multiple of V'/‖V'‖ that is nearest to the old row m V/‖V‖ is its projection, so
m' = m · cos∠(V, V'). The row becomes shorter, never longer. With the old m it would have the old norm but lie farther
away.
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


def solve_magnitudes(before: Adapter, after: Adapter, weights: Mapping[str, Weight]) -> Adapter:
    """``after`` with magnitudes that fit its directions, in every module that differs from that of ``before``.

    Parameters
    ----------
    before, after : Adapter
        Both have the same extra tensors.
    weights : mapping of str to Weight
        The base weight of every module that has a magnitude.

    Raises
    ------
    ShapeError
        A magnitude does not have one number for each output, or input channel.
    """
    extra = dict(after.extra)
    for name, key in magnitudes(after).items():
        # A module that keeps its rank and dtype is the same object: its magnitude stays, bit for bit.
        if after[name] is not before[name]:
            with place(key):
                extra[key] = _solve_magnitude(extra[key], before[name], after[name], weights[name])
    return replace(after, extra=extra)


def _solve_magnitude(extra: Extra, before: Update, after: Update, weight: Weight) -> Extra:
    over_in, kernel = extra.role in ("magnitude", "norms"), before.layout.kernel
    tensor = extra.tensor
    # LyCORIS stores a magnitude by input channel flat: the kernel is what is left of the width.
    if extra.role == "magnitude_in" and not kernel and before.shape[1] % max(1, tensor.size) == 0:
        kernel = (before.shape[1] // max(1, tensor.size),)
    cosines = weight_cosines(before, after, weight, over_in=over_in, kernel=kernel)
    if extra.role in NORMS:  # the file had no magnitudes, so programs used ‖W‖ for them; from now on it has some
        # PEFT stores the magnitudes of a convolution as (1, out, 1, 1).
        shape = (1, before.shape[0], *(1 for _ in kernel)) if kernel else (cosines.size,)
        tensor = LazyArray.of(weight.lengths(by_input=not over_in).astype(np.float32).reshape(shape))
        extra = Extra("magnitude" if over_in else "magnitude_in", extra.module, tensor)
    if tensor.size != cosines.size:
        what = f"{tensor.shape} is not one number for each of {cosines.size} channels"
        raise ShapeError(what, fix="save the adapter again")
    m = tensor.read().astype(np.float64) * cosines.reshape(tensor.shape)
    return replace(extra, tensor=LazyArray.of(m.astype(tensor.dtype)))


def weight_cosines(
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
        if over_in == weight.transposed:  # each block holds a part of every row, so parts are added up
            sums += products
        else:
            sums[:, part] = products
    if not over_in and kernel:
        sums = sums.reshape(3, in_ // prod(kernel), prod(kernel)).sum(2)
    dot, square, square_ = sums
    length = np.sqrt(square) * np.sqrt(square_)  # the root of the product could overflow
    return np.asarray(np.divide(dot, length, out=np.ones_like(dot), where=length > 0))


def _parts(module: Update, *, in_side: bool) -> Callable[[slice], Array]:
    """A function from a slice to those rows of ΔW, or those columns. The factors are read once."""
    if not isinstance(module, LowRank):
        dense = module.dense()
        return lambda part: dense[:, part] if in_side else dense[part]
    scale, B, A = module.scale, module.B.astype(np.float64), module.A.astype(np.float64)
    return lambda part: scale * (B @ A[:, part] if in_side else B[part] @ A)
