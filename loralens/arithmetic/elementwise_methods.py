"""Methods that choose entries: by size (magnitude, breadcrumbs, SCE), by sign (TIES), or by chance (DARE, DELLA)."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loralens.arithmetic.elementwise import (
    Entries,
    Fuse,
    Fused,
    Modules,
    Workspace,
    exact_sum,
    fuse_entries,
    whole_cutoffs,
)
from loralens.choices import Space
from loralens.core.joint import Joint
from loralens.core.lazy import Array
from loralens.errors import OptionError
from loralens.linalg.rounding import STEPS, Draws, Words

Mask = NDArray[np.bool_]
# For each update the entries that are kept: a mask without entries of 0, or the least absolute value. An empty sequence
# keeps all entries of all updates.
Kept = Sequence[Mask | float]

PART = 1 << 16  # entries that are worked on at a time where many arrays are needed: 256 KiB in float32


class Combine(Protocol):
    """`add_updates` or `elected_mean`."""

    def __call__(self, stack: Array, work: Workspace, *, kept: Kept = ()) -> Array:
        """The result for a block of all updates, of which the entries that are not kept count as 0."""


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


def magnitude(joint: Joint, *, density: float = 0.2, lam: float = 1.0, space: Space = "full") -> Fused:
    """λ Σ_t top(w_t ΔW_t), where top keeps the share ``density`` of entries that are largest in absolute value.

    The share is taken in each module by itself. Of several equal entries at the boundary all are kept; PEFT's
    ``magnitude_prune`` keeps some of them.
    """
    # The space makes no difference to a sum of all entries, and the factors need no rounding on the way.
    if density >= 1:
        return exact_sum(joint, lam)

    def rule(entries: Entries) -> Fuse:
        return trim_entries([cutoff for (cutoff,) in entries.cutoffs(entries.count(density))], add_updates)

    return fuse_entries(joint, rule, space=space, lam=lam)


def breadcrumbs(
    joint: Joint, *, density: float = 0.15, gamma: float = 0.006, lam: float = 1.0, space: Space = "full"
) -> Fused:
    """λ Σ_t of the w_t ΔW_t, each without its γ largest entries and reduced to the share ``density`` that follows.

    Parameters
    ----------
    joint : Joint
    density : float
        Share of entries that is kept: those that follow the γ largest.
    gamma : float
        Share of the largest entries that is dropped, at most 1 − density. The defaults are where the search of the
        authors' code starts; mergekit takes γ = 0.01.
    lam : float
        The strength of the result; α in the paper.
    space : str

    Notes
    -----
    arXiv 2312.06795, §3: the masks are those of each layer, here of each module.
    """
    # Everything is kept and nothing is dropped: the sum is exact and needs no sampling.
    if density >= 1:
        return exact_sum(joint, lam)
    # The density has priority over γ: with γ + density > 1 there would not be enough entries.
    return fuse_entries(joint, lambda entries: _rule(entries, density, min(gamma, 1 - density)), space=space, lam=lam)


def _rule(entries: Entries, density: float, gamma: float) -> Fuse:
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
    return fuse_entries(joint, lambda entries: _sce_rule(entries, density), space=space, lam=lam)


def _sce_rule(entries: Entries, density: float) -> Fuse:
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


def ties(
    joint: Joint,
    *,
    density: float = 0.2,
    lam: float = 1.0,
    whole: int = 1,
    space: Space = "full",
    cutoffs: Sequence[float] | None = None,
) -> Fused:
    """λ times the mean, entry by entry, of the trimmed w_t ΔW_t that have the elected sign.

    Parameters
    ----------
    joint : Joint
    density : float
        Share of entries that trimming keeps, in (0, 1]. The paper uses 0.2.
    lam : float
    whole : int
        1: the largest entries of the whole adapter are kept, as in the paper, by the cutoffs of `prepare_cutoffs`. 0:
        the largest of each module are kept, as in PEFT and mergekit.
    space : str
    cutoffs : sequence of float, optional
        One for each adapter. Without them, this module is treated as the whole adapter.

    Notes
    -----
    arXiv 2306.01708, §4. Trimming and election act on the *weighted* updates, so 2a with weight 1 is the same as a with
    weight 2. The paper has no weights. PEFT elects by the unweighted updates and applies weights afterwards, which is
    the same where all weights are 1. ⌊density · size⌋ entries are kept, and all that equal the smallest of them. The
    paper's code keeps one more.
    """
    # With several updates the election matters even if nothing is trimmed.
    if density >= 1 and joint.present.size <= 1:
        return exact_sum(joint, lam)

    def rule(entries: Entries) -> Fuse:
        if density >= 1:
            return trim_entries([0.0] * len(entries.places), elected_mean)
        # Cutoffs of adapters that are 0 in this module are left out with their entries.
        if whole and cutoffs is not None:
            return trim_entries([cutoffs[t] for t in entries.places], elected_mean)
        return trim_entries([cutoff for (cutoff,) in entries.cutoffs(entries.count(density))], elected_mean)

    return fuse_entries(joint, rule, space=space, lam=lam)


def prepare_cutoffs(modules: Modules, *, density: float, whole: int, space: Space, **_: Any) -> dict[str, Any]:
    """Return the cutoff of every adapter over all its modules, or nothing if each module has cutoffs of its own."""
    return {"cutoffs": whole_cutoffs(modules, density, space=space)} if whole and density < 1 else {}


def dare(
    joint: Joint,
    *,
    density: float = 0.1,
    lam: float = 1.0,
    space: Space = "full",
    seed: "np.random.SeedSequence | None" = None,
) -> Fused:
    """λ Σ_t w_t ΔW_t ∘ m_t / q, where every entry of m_t is 1 with probability q and 0 otherwise.

    Before the result is cut to a low rank, its mean over seeds is λ Σ_t w_t ΔW_t in every space. The cut, which the
    space ``full`` needs, keeps the strongest directions of signal and noise together and is therefore biased towards 0.
    Measured on the sum of two trained adapters of rank 8, written at rank 16: the result has 0.940 ± 0.003 of the
    strength of the sum at density 0.1, and 0.992 at density 0.5.

    Parameters
    ----------
    joint : Joint
    density : float
        The probability q in (0, 1] that an entry is kept, rounded to a multiple of 2⁻¹⁶ so that the mean stays exact.
        The paper calls it 1 − p and drops 90 % and more.
    lam : float
    space : str
    seed : SeedSequence
        The seed of this module. Every adapter has random numbers of its own, by its place among the adapters. Every
        random number belongs to one entry, so the mask is the same on every machine.

    Notes
    -----
    arXiv 2311.03099, §3. PEFT's ``dare_linear`` does the same with torch's global random generator.
    """
    # Nothing would be dropped, and the factors give the sum without a pass over its entries.
    if density >= 1:
        return exact_sum(joint, lam)
    return fuse_entries(joint, lambda entries: _dare_rule(entries, density, seed, elect=False), space=space, lam=lam)


def dare_ties(
    joint: Joint,
    *,
    density: float = 0.1,
    lam: float = 1.0,
    space: Space = "full",
    seed: "np.random.SeedSequence | None" = None,
) -> Fused:
    """DARE, then the sign election of TIES: λ times the mean of the rescaled entries that have the elected sign.

    The options are those of `dare`. TIES' own trimming is left out, as in the other implementations. The election makes
    the result biased.
    """
    # With several updates the election matters even if nothing is dropped.
    if density >= 1 and joint.present.size <= 1:
        return exact_sum(joint, lam)
    return fuse_entries(joint, lambda entries: _dare_rule(entries, density, seed, elect=True), space=space, lam=lam)


def _dare_rule(entries: Entries, density: float, seed: "np.random.SeedSequence | None", *, elect: bool) -> Fuse:
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
        return elected_mean(stack, work, kept=kept) if elect else add_updates(stack, work, kept=kept)

    return fuse


def adapter_draws(entries: Entries, seed: "np.random.SeedSequence | None") -> list[Draws]:
    """Return the source of random numbers of every update, which depends on its place among the adapters."""
    seed = np.random.SeedSequence(0) if seed is None else seed
    # The seed comes from the place, not from the order of the matrices: if an adapter is 0 in a module, the random
    # numbers of the others stay.
    return [Draws.of(seed, t) for t in entries.places]


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
        As for `loralens.arithmetic.elementwise_methods.dare`.

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
    return fuse_entries(joint, lambda entries: _della_rule(entries, density, epsilon, seed), space=space, lam=lam)


def _della_rule(entries: Entries, density: float, epsilon: float, seed: "np.random.SeedSequence | None") -> Fuse:
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
