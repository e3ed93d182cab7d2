"""Methods that choose entries: by size (magnitude, breadcrumbs, SCE), by sign (TIES), or by chance (DARE, DELLA)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralens.arithmetic.elementwise import (
    Entries,
    Fuse,
    Modules,
    Workspace,
    elementwise,
    whole_cutoffs,
)
from loralens.choices import Space
from loralens.core.lazy import Array
from loralens.errors import OptionError
from loralens.linalg.rounding import STEPS, Draws, Words

Mask = NDArray[np.bool_]
# For each update the entries that are kept: a mask without entries of 0, or the least absolute value. An empty sequence
# keeps all entries of all updates.
Kept = Sequence[Mask | float]

PART = 1 << 16  # entries that are worked on at a time where many arrays are needed: 256 KiB in float32


# `add_updates` or `elected_mean`: the result for a block of all updates, in which entries that are not kept count as 0.
Combine = Callable[..., Array]


def trim_entries(cutoffs: Sequence[float], then: Combine) -> Fuse:
    """Return the function that drops entries below the cutoff of their update, and combines the updates by ``then``.

    Parameters
    ----------
    cutoffs : sequence of float
        One for each update, to which absolute values are compared.
    then : callable
        `add_updates` or `elected_mean`.
    """
    work = Workspace()
    return lambda _, stack: then(stack, work, kept=cutoffs)


def add_updates(stack: Array, work: Workspace, *, kept: Kept = ()) -> Array:
    """Return the sum over the updates, shape (rows, n), added in their order so that the bits are always the same.

    Entries that are not ``kept`` are set to 0 in the stack.
    """
    for x, keep in zip(stack, kept, strict=False):
        _drop_entries(x, keep, work)
    # In an array of its own: `elected_mean` reads the updates again after it has their sum.
    result = work.of("total", stack.shape[1:], stack.dtype)
    np.copyto(result, stack[0])
    for x in stack[1:]:
        result += x
    return result


def _drop_entries(x: Array, keep: Mask | float, work: Workspace) -> None:
    """Set the entries of an update that are not kept to 0."""
    factor = work.of("factor", x.shape, x.dtype)
    if isinstance(keep, np.ndarray):
        mask = keep
    elif keep > 0:
        mask = np.greater_equal(np.abs(x, out=factor), keep, out=work.of("kept", x.shape, np.bool_))
    else:  # nothing is below 0
        return
    # To convert the mask first takes less time than to multiply by booleans.
    np.copyto(factor, mask)
    x *= factor


def elected_mean(stack: Array, work: Workspace, shares: Sequence[float] | None = None, *, kept: Kept = ()) -> Array:
    """Return for every entry the mean of the updates whose sign is that of the sum of all updates; shape (rows, n).

    These are steps 2 and 3 of Yadav et al. 2023, on the entries that are ``kept``. With ``shares`` η_t the mean is
    Σ η_t x_t / Σ η_t. An update whose entry is 0 does not take part. Where the sum is exactly 0, no sign is elected and
    the result is 0. The code of the paper takes the sign of the majority of all entries there, and PEFT and mergekit
    take +; with them a − a is not 0, and the result for −a, −b is not minus the result for a, b.
    """
    shape, dtype = stack.shape[1:], stack.dtype
    plus, minus, agrees, other = (work.of(name, shape, np.bool_) for name in ("plus", "minus", "agrees", "other"))
    part, mean = work.of("part", shape, dtype), work.of("mean", shape, dtype)
    # A count of updates needs no float, and 16 bits are a half or a quarter of the memory to move.
    weight = work.of("weight", shape, dtype if shares else np.uint16)
    total = add_updates(stack, work, kept=kept)
    np.greater(total, 0, out=plus)
    np.less(total, 0, out=minus)
    mean[:], weight[:] = 0, 0
    for t, x in enumerate(stack):
        np.logical_and(np.greater(x, 0, out=agrees), plus, out=agrees)
        np.logical_and(np.less(x, 0, out=other), minus, out=other)
        agrees |= other
        np.copyto(part, agrees)
        if shares:
            part *= dtype.type(shares[t])
        # `part` holds ones, or shares, where the update agrees.
        weight += part if shares else agrees
        part *= x
        mean += part
    # Where no update agrees, this divides 0 by 1 and not by 0. `np.maximum` would do the same, with a branch per entry.
    weight += np.equal(weight, 0, out=agrees)
    np.divide(mean, weight, out=mean, dtype=dtype)
    return mean


@elementwise()
def magnitude(entries: Entries, *, density: float) -> Fuse:
    """Σ_t top(w_t ΔW_t), where top keeps the share ``density`` of entries that are largest in absolute value.

    The share is taken in each module by itself. Of several equal entries at the boundary all are kept; PEFT's
    ``magnitude_prune`` keeps some of them.
    """
    return trim_entries([cutoff for (cutoff,) in entries.cutoffs(entries.count(density))], add_updates)


@elementwise()
def breadcrumbs(entries: Entries, *, density: float, gamma: float) -> Fuse:
    """Σ_t of the w_t ΔW_t, each without its γ largest entries and reduced to the share ``density`` that follows.

    arXiv 2312.06795, §3: the masks are those of each layer, here of each module. The defaults are where the search of
    the authors' code starts; mergekit takes γ = 0.01.
    """
    # The density has priority over γ: with γ + density > 1 there would not be enough entries.
    gamma = min(gamma, 1 - density)
    # The γ largest, and those that are kept after them. γ is rounded down: in a small module, where it is less than
    # one entry, nothing is skipped.
    skipped, count = int(gamma * entries.size), entries.count(density)
    last = min(skipped + count, entries.size)
    # There is no 0th largest entry to compare with.
    cutoffs = entries.cutoffs(last, skipped) if skipped else entries.cutoffs(last)
    work = Workspace()

    def fuse(_: slice, stack: Array) -> Array:
        kept = []
        for t, (x, (low, *high)) in enumerate(zip(stack, cutoffs, strict=True)):
            size = np.abs(x, out=work.of("size", x.shape, x.dtype))
            inside = np.greater_equal(size, low, out=work.of(f"kept {t}", x.shape, np.bool_))
            # Entries as large as the last of the γ largest count among them, so that equal entries are treated alike.
            if high:
                inside &= np.less(size, high[0], out=work.of("below", x.shape, np.bool_))
            kept.append(inside)
        return add_updates(stack, work, kept=kept)

    return fuse


@elementwise(elects=True)
def sce(entries: Entries, *, density: float) -> Fuse:
    """Σ_t η_t x_t / Σ_t η_t over those of the x_t that have the elected sign.

    x_t is w_t ΔW_t at the share ``density`` of positions where the variance among the adapters is largest, else 0, and
    η_t = Σx_t² / Σ_t Σx_t², one number for each adapter and module (arXiv 2408.07990, §3.2). The share is taken of all
    positions, and all equal variances at its boundary are kept. So a single adapter, whose variance is 0 everywhere,
    stays whole; mergekit counts positions of nonzero variance only and turns it into 0.
    """
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


@elementwise(elects=True)
def ties(entries: Entries, *, density: float, whole: int = 1, cutoffs: Sequence[float] | None = None) -> Fuse:
    """The mean, entry by entry, of the trimmed w_t ΔW_t that have the elected sign (arXiv 2306.01708, §4).

    ``density`` is the share of entries that trimming keeps, 0.2 in the paper: with ``whole`` the largest entries of the
    whole adapter, by the ``cutoffs`` of `prepare_cutoffs`, and else those of each module, as in PEFT and mergekit.

    Trimming and election act on the *weighted* updates, so 2a with weight 1 is the same as a with weight 2. The paper
    has no weights. PEFT elects by the unweighted updates and applies weights afterwards, which is the same where all
    weights are 1. ⌊density · size⌋ entries are kept, and all that equal the smallest of them. The paper's code keeps
    one more.
    """
    if density >= 1:
        cutoffs = [0.0] * len(entries.places)
    # Cutoffs of adapters that are 0 in this module are left out with their entries.
    elif whole and cutoffs is not None:
        cutoffs = [cutoffs[t] for t in entries.places]
    else:
        cutoffs = [cutoff for (cutoff,) in entries.cutoffs(entries.count(density))]
    return trim_entries(cutoffs, elected_mean)


def prepare_cutoffs(modules: Modules, *, density: float, whole: int, space: Space, **_: Any) -> dict[str, Any]:
    """Return the cutoff of every adapter over all its modules, or nothing if each module has cutoffs of its own."""
    return {"cutoffs": whole_cutoffs(modules, density, space=space)} if whole and density < 1 else {}


@elementwise()
def dare(entries: Entries, *, density: float, seed: np.random.SeedSequence) -> Fuse:
    """Σ_t w_t ΔW_t ∘ m_t / q, where every entry of m_t is 1 with probability q and 0 otherwise (arXiv 2311.03099, §3).

    q is ``density``, rounded to a multiple of 2⁻¹⁶ so that the mean stays exact; the paper calls it 1 − p and drops
    90 % and more. ``seed`` is that of this module. Every adapter has random numbers of its own, by its place among the
    adapters, and every random number belongs to one entry, so the mask is the same on every machine. PEFT's
    ``dare_linear`` does the same with torch's global random generator.

    Before the result is cut to a low rank, its mean over seeds is Σ_t w_t ΔW_t in every space. The cut, which the space
    ``full`` needs, keeps the strongest directions of signal and noise together and is therefore biased towards 0.
    Measured on the sum of two trained adapters of rank 8, written at rank 16: the result has 0.940 ± 0.003 of the
    strength of the sum at density 0.1, and 0.992 at density 0.5.
    """
    return _drop_at_random(entries, density, seed, add_updates)


@elementwise(elects=True)
def dare_ties(entries: Entries, *, density: float, seed: np.random.SeedSequence) -> Fuse:
    """DARE, then the sign election of TIES: the mean of the rescaled entries that have the elected sign.

    TIES' own trimming is left out, as in the other implementations. The election makes the result biased.
    """
    return _drop_at_random(entries, density, seed, elected_mean)


def _drop_at_random(entries: Entries, density: float, seed: np.random.SeedSequence, then: Combine) -> Fuse:
    # An entry is kept if its random 16-bit word is below the threshold. The threshold is at least 1, because kept
    # entries are divided by the probability.
    threshold = min(max(1, round(density * STEPS)), STEPS)
    draws, work = adapter_draws(entries, seed), Workspace()
    n = entries.shape[1]

    def fuse(rows: slice, stack: Array) -> Array:
        kept = []
        if threshold < STEPS:  # else all entries are kept without random numbers
            for t, (x, draws_t) in enumerate(zip(stack, draws, strict=True)):
                # A word belongs to the place of its entry, so the mask does not depend on the size of the blocks.
                words = draws_t.words(rows.start * n, x.size).reshape(x.shape)
                mask = np.less(words, threshold, out=work.of(f"kept {t}", x.shape, np.bool_))
                mask &= np.not_equal(x, 0, out=work.of("nonzero", x.shape, np.bool_))
                kept.append(mask)
                # The probability is exactly threshold/STEPS, so the mean over seeds is exactly the update.
                x *= x.dtype.type(STEPS / threshold)
        return then(stack, work, kept=kept)

    return fuse


def adapter_draws(entries: Entries, seed: np.random.SeedSequence) -> list[Draws]:
    """The source of random numbers of every update, which depends on its place among the adapters."""
    # The seed comes from the place, not from the order of the matrices: if an adapter is 0 in a module, the random
    # numbers of the others stay.
    return [Draws.of(seed, t) for t in entries.places]


@elementwise(elects=True)
def della(entries: Entries, *, density: float, epsilon: float, seed: np.random.SeedSequence) -> Fuse:
    """The mean of those of the pruned w_t ΔW_t that have the elected sign (arXiv 2406.11617, §3).

    Pruning keeps an entry with probability q = density + ε(2i/(n − 1) − 1), where i = 0 … n − 1 is its rank by absolute
    value within its row, smallest first, and divides it by q. The defaults are those of the authors' code: density 0.7
    and a window 2ε = 0.14. ``seed`` is used as by `dare`.

    Equal entries are ranked from left to right. q is rounded to a multiple of 2⁻¹⁶, and entries that are kept are
    divided by the rounded q; mergekit rescales by a norm instead. Every row is sorted in both passes over the entries,
    which is most of the work. Raises an OptionError if density ± ε is not within (0, 1].
    """
    if not 0 < density - epsilon <= density + epsilon <= 1:
        # A little below the density, because q must stay above 0.
        widest = min(1 - density, 0.99 * density)
        raise OptionError(
            f"density {density:g} ± epsilon {epsilon:g} is not within (0, 1]",
            fix=f"give an epsilon of {widest:g} or less",
        )
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


def rows_for_cache(m: int, n: int) -> Iterator[slice]:
    """Yield the rows of a block that are worked on at a time, so that the arrays of their entries fit the cache."""
    step = max(1, PART // n)
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def _prune(x: Array, words: Words, factors: Array, mask: Array, work: Workspace) -> None:
    """Write into ``mask`` which entries of some rows are kept, and multiply all of them by their factors."""
    mine, draws = work.of("factors", x.shape, x.dtype), work.of("draws", x.shape, x.dtype)
    # From ranks back to the places of the entries.
    for row, order in zip(mine, np.argsort(np.abs(x), axis=1, kind="stable"), strict=True):
        row[order] = factors
    # For integers w and h and f = STEPS / h, w·f is at least STEPS if w ≥ h, and at most STEPS − 1 if w < h, apart from
    # roundings below 0.01. So the thresholds h need not be put in place beside the factors.
    np.copyto(draws, words)
    draws *= mine
    np.less(draws, STEPS - 0.5, out=mask)
    mask &= np.not_equal(x, 0, out=work.of("nonzero", x.shape, np.bool_))
    x *= mine
