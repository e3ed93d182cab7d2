"""SCE: select the entries where adapters differ, calculate shares, erase minority signs (Wan et al. 2024)."""

import numpy as np

from loralens.arithmetic.election import elected_mean
from loralens.arithmetic.elementwise import exact_sum, fuse_entries
from loralens.arithmetic.entries import Entries, Fuse, Fused, Workspace
from loralens.choices import Space
from loralens.core.joint import Joint
from loralens.core.lazy import Array


def sce(joint: Joint, *, density: float = 1.0, lam: float = 1.0, space: Space = "full") -> Fused:
    """λ Σ_t η_t x_t / Σ_t η_t over those of the x_t that have the elected sign.

    x_t is w_t ΔW_t at the share ``density`` of positions where the variance among the adapters is largest, else 0, and
    η_t = Σx_t² / Σ_t Σx_t², one number for each adapter and module.

    Notes
    -----
    arXiv 2408.07990, §3.2. The share is taken of all positions, and all equal variances at its boundary are kept. So a
    single adapter, whose variance is 0 everywhere, stays whole; mergekit counts positions of nonzero variance only and
    turns it into 0.
    """
    # With a second adapter, even one that is 0 here, the variance tells positions apart.
    if joint.present.size <= 1 and len(joint.updates) == 1:
        return exact_sum(joint, lam)
    return fuse_entries(joint, lambda entries: _rule(entries, density), space=space, lam=lam)


def _rule(entries: Entries, density: float) -> Fuse:
    work = Workspace()

    def variance(stack: Array) -> Array:
        shape, dtype = stack.shape[1:], stack.dtype
        mean, variances, part = (work.of(name, shape, dtype) for name in ("mean", "variance", "part"))
        np.sum(stack, axis=0, out=mean)
        # Divided by the number of all adapters, including those that have no matrix here because they are 0.
        mean /= entries.adapters
        np.square(mean, out=variances)
        # Updates that are 0 have no matrix, but a deviation of −mean.
        variances *= entries.adapters - len(stack)
        for x in stack:
            np.subtract(x, mean, out=part)
            variances += np.square(part, out=part)
        variances /= entries.adapters
        return variances

    # At density 1 every position is selected, also those where all adapters agree and the variance is 0.
    cutoff = entries.cutoff_of(variance, entries.count(density)) if density < 1 else 0.0

    def select(stack: Array) -> None:
        if cutoff > 0:
            selected = np.greater_equal(variance(stack), cutoff, out=work.of("selected", stack.shape[1:], np.bool_))
            stack *= selected.astype(stack.dtype)

    # In a separate pass, because the shares of a module need the sums over all its entries.
    squares = np.zeros(len(entries.places))
    for _, stack in entries.blocks():
        select(stack)
        squares += [float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64)) for x in stack]
    # If no entry is left, the shares have no effect, and any positive numbers serve.
    shares = (squares / squares.sum()).tolist() if squares.any() else [1.0] * len(squares)

    def fuse(_: slice, stack: Array) -> Array:
        select(stack)
        return elected_mean(stack, work, shares)

    return fuse
