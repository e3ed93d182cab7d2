"""DELLA: entries are dropped at random, small ones with a higher probability; then as in TIES (Deep et al. 2024)."""

import numpy as np

from loralens.arithmetic.dare import adapter_draws
from loralens.arithmetic.election import elected_mean, rows_for_cache
from loralens.arithmetic.elementwise import fuse_entries
from loralens.arithmetic.entries import Entries, Fuse, Fused, Workspace
from loralens.choices import Space
from loralens.core.joint import Joint
from loralens.core.lazy import Array
from loralens.errors import OptionError
from loralens.linalg.compiled.loops import prune_rows
from loralens.linalg.draws import STEPS, Words
from loralens.linalg.factor import Integers


def della(
    joint: Joint,
    *,
    density: float = 0.7,
    epsilon: float = 0.07,
    lam: float = 1.0,
    space: Space = "full",
    seed: "np.random.SeedSequence | None" = None,
) -> Fused:
    """λ times the mean of those of the pruned w_t ΔW_t that have the elected sign.

    Pruning keeps an entry with probability q = density + ε(2i/(n − 1) − 1), where i = 0 … n − 1 is its rank by absolute
    value within its row, smallest first, and divides it by q.

    Parameters
    ----------
    joint : Joint
    density : float
        The mean of q.
    epsilon : float
        Half the range of q; density ± ε must lie in (0, 1]. The defaults are those of the authors' code: density 0.7
        and a window 2ε = 0.14.
    lam : float
    space : str
    seed : SeedSequence
        As for `loralens.arithmetic.dare.dare`.

    Raises
    ------
    OptionError
        density ± ε is not within (0, 1].

    Notes
    -----
    arXiv 2406.11617, §3. Equal entries are ranked from left to right. q is rounded to a multiple of 2⁻¹⁶, and entries
    that are kept are divided by the rounded q; mergekit rescales by a norm instead. Every row is sorted in both passes
    over the entries, which is most of the work.
    """
    if not 0 < density - epsilon <= density + epsilon <= 1:
        # A little below the density, because q must stay above 0.
        widest = min(1 - density, 0.99 * density)
        raise OptionError(
            f"density {density:g} ± epsilon {epsilon:g} is not within (0, 1]",
            fix=f"give an epsilon of {widest:g} or less",
        )
    return fuse_entries(joint, lambda entries: _rule(entries, density, epsilon, seed), space=space, lam=lam)


def _rule(entries: Entries, density: float, epsilon: float, seed: "np.random.SeedSequence | None") -> Fuse:
    draws, work = adapter_draws(entries, seed), Workspace()
    n = entries.shape[1]
    # The probabilities of a row by rank, from the smallest entry to the largest; a row of one entry has the mean.
    q = density + epsilon * (2 * np.arange(n) / (n - 1) - 1) if n > 1 else np.full(1, density)
    # An entry is kept if its random number, 0 … STEPS − 1, is below a threshold; then it is multiplied by this factor.
    # The threshold is at least 1, because entries are divided by q.
    factors: Array = STEPS / np.clip(np.rint(q * STEPS), 1, STEPS).astype(entries.dtype)

    def fuse(rows: slice, stack: Array) -> Array:
        kept = []
        for t, (x, draws_t) in enumerate(zip(stack, draws, strict=True)):
            words = draws_t.words(rows.start * n, x.size).reshape(x.shape)
            mask = work.of(f"kept {t}", x.shape, np.bool_)
            # Some rows at a time, because the arrays for all rows of a block would not fit the cache.
            for some in rows_for_cache(*x.shape):
                _prune(x[some], words[some], factors, mask[some], work)
            kept.append(mask)
        return elected_mean(stack, work, kept=kept)

    return fuse


def _prune(x: Array, words: Words, factors: Array, mask: Array, work: Workspace) -> None:
    """Write into ``mask`` which entries of some rows are kept, and multiply all of them by their factors."""
    if prune_rows(x, words, factors, STEPS - 0.5, kept=mask):
        return
    mine, draws = work.of("factors", x.shape, x.dtype), work.of("draws", x.shape, x.dtype)
    # From ranks back to the places of the entries.
    for row, order in zip(mine, _orders(x, work), strict=True):
        row[order] = factors
    # For integers w and h and f = STEPS / h, w·f is at least STEPS if w ≥ h, and at most STEPS − 1 if w < h, apart from
    # roundings below 0.01. So the thresholds h need not be put in place beside the factors.
    np.copyto(draws, words)
    draws *= mine
    np.less(draws, STEPS - 0.5, out=mask)
    mask &= np.not_equal(x, 0, out=work.of("nonzero", x.shape, np.bool_))
    x *= mine


def _orders(x: Array, work: Workspace) -> Integers:
    """For every row, the positions of its entries by rising absolute value; equal entries from left to right."""
    if x.dtype != np.float32:
        return np.argsort(np.abs(x), axis=1, kind="stable")
    # A float32 leaves 29 bits of a float64 empty, which take the position. So all numbers differ, and NumPy sorts them
    # several times as fast as it sorts positions stably; float64 is sorted faster than integers of 64 bits, too.
    keys = work.of("keys", x.shape, np.float64)
    np.copyto(keys, np.abs(x, out=work.of("draws", x.shape, x.dtype)))
    patterns: Integers = keys.view(np.int64)
    patterns |= np.arange(x.shape[1])
    keys.sort(axis=1)
    patterns &= (1 << max(1, x.shape[1] - 1).bit_length()) - 1
    return patterns
