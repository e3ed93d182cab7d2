"""DELLA: entries are dropped at random, small ones with a higher probability; then as in TIES (Deep et al. 2024)."""

import numpy as np

from loralens.arithmetic.dare import adapter_draws
from loralens.arithmetic.election import elected_mean
from loralens.arithmetic.elementwise import fuse_entries
from loralens.arithmetic.entries import Entries, Fuse, Fused, Workspace
from loralens.choices import Space
from loralens.core.joint import Joint
from loralens.core.lazy import Array
from loralens.errors import OptionError
from loralens.linalg.draws import STEPS
from loralens.linalg.factor import Integers

MOST_PLACES = 14  # bits of a position in a 32-bit key, which leave 17 bits for the absolute value
SMALLEST = 2.0**-90  # the largest entry of a row by which a power of two can be divided


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
    # An entry is kept if its random number, 0 … STEPS − 1, is below the threshold. The threshold is at least 1,
    # because entries are divided by q. In the dtype of the entries, so that they are copied without a conversion.
    thresholds = np.clip(np.rint(q * STEPS), 1, STEPS).astype(entries.dtype)

    def fuse(rows: slice, stack: Array) -> Array:
        kept = []
        for t, (x, draws_t) in enumerate(zip(stack, draws, strict=True)):
            chances = work.of("chances", x.shape, x.dtype)
            # From ranks back to the places of the entries.
            for row, order in zip(chances, _orders(x, work), strict=True):
                row[order] = thresholds
            words = draws_t.words(rows.start * n, x.size).reshape(x.shape)
            mask = np.less(words, chances, out=work.of(f"kept {t}", x.shape, np.bool_))
            mask &= np.not_equal(x, 0, out=work.of("nonzero", x.shape, np.bool_))
            kept.append(mask)
            np.divide(STEPS, chances, out=chances)
            x *= chances
        return elected_mean(stack, work, kept=kept)

    return fuse


def _orders(x: Array, work: Workspace) -> Integers:
    """For every row, the positions of its entries by rising absolute value; equal entries from left to right."""
    if x.dtype != np.float32:
        return np.argsort(np.abs(x), axis=1, kind="stable")
    places = max(1, x.shape[1] - 1).bit_length()
    size = np.abs(x, out=work.of("size", x.shape, x.dtype))
    largest = size.max(axis=1, keepdims=True)
    # Of a row of zeros, or of subnormal numbers, the scale below would not be finite.
    if places <= MOST_PLACES and largest.min() > SMALLEST:
        return _quick_orders(x, size, largest, places, work)
    # Without its sign bit, the pattern of a float32 orders as its absolute value does. With the position in the lower
    # bits all keys differ, and NumPy sorts integers several times as fast as it sorts positions stably.
    keys = work.of("keys", x.shape, np.int64)
    np.copyto(keys, x.view(np.int32))
    keys &= 0x7FFFFFFF
    keys <<= places
    keys |= np.arange(x.shape[1])
    keys.sort(axis=1)
    keys &= (1 << places) - 1
    return keys


def _quick_orders(x: Array, size: Array, largest: Array, places: int, work: Workspace) -> Integers:
    """`_orders` by a sort of 32-bit integers, which takes half as long.

    A key has the position in its lower bits, and above them what fits of the absolute value relative to the largest one
    of the row. About one entry in a hundred has a neighbour that this does not tell apart, and those few are sorted
    again by all of their bits.
    """
    low = (1 << places) - 1
    # Below 2³¹ after every rounding. A float32 grows with its number before and after it is multiplied and cut off.
    size *= np.float32(2**31 - 2**9) / largest
    keys = work.of("keys 32", x.shape, np.int32)
    np.copyto(keys, size, casting="unsafe")
    keys &= ~low
    keys |= np.arange(x.shape[1], dtype=np.int32)
    keys.sort(axis=1)
    near = work.of("near", x.shape, np.bool_)
    near[:, -1] = False
    difference = np.bitwise_xor(keys[:, 1:], keys[:, :-1], out=work.of("size", (x.shape[0], x.shape[1] - 1), np.int32))
    np.less_equal(difference, low, out=near[:, :-1])
    orders = work.of("orders", x.shape, np.int64)
    keys &= low
    np.copyto(orders, keys)
    _order_near(x.view(np.int32).ravel(), orders.ravel(), np.flatnonzero(near), x.shape[1], places)
    return orders


def _order_near(bits: Integers, orders: Integers, near: Integers, n: int, places: int) -> None:
    """Sort within every run of neighbours in ``orders`` that have one key, whose first members are ``near``."""
    if not near.size:
        return
    # A run goes on where the next place is in `near` too; the place after its last one belongs to it.
    ends = np.append(near[1:] != near[:-1] + 1, True)
    run = np.cumsum(ends) - ends
    slots = np.concatenate([near, near[ends] + 1])
    run = np.concatenate([run, run[ends]])
    positions = orders[slots]
    # The run, all bits of the absolute value, and the position: 16 + 31 + 14 bits at most.
    keys = (run << 31 | bits[slots // n * n + positions] & 0x7FFFFFFF) << places | positions
    keys.sort()
    slots.sort()
    orders[slots] = keys & ((1 << places) - 1)
