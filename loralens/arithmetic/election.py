"""The election of a sign for every entry, and the mean of the updates that agree with it."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loralens.arithmetic.entries import Fuse, Workspace
from loralens.core.lazy import Array
from loralens.linalg.compiled.loops import elect_mean_of_two

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
    if len(stack) == 2 and not shares:
        result = work.of("result", shape, dtype)
        for rows in rows_for_cache(*shape):
            some = [keep[rows] if isinstance(keep, np.ndarray) else keep for keep in kept or (0.0, 0.0)]
            _mean_of_two(stack[:, rows], some, work, out=result[rows])
        return result
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


def rows_for_cache(m: int, n: int) -> Iterator[slice]:
    """Yield the rows of a block that are worked on at a time, so that the arrays of their entries fit the cache."""
    step = max(1, PART // n)
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def _mean_of_two(stack: Array, kept: Kept, work: Workspace, *, out: Array) -> None:
    """Write `elected_mean` of two updates into ``out``. Of two entries with opposite signs the larger one stays."""
    shape, dtype, (a, b) = stack.shape[1:], stack.dtype, stack
    if elect_mean_of_two(a, b, kept, out=out):
        return
    sizes = [np.abs(x, out=work.of(f"size {t}", shape, dtype)) for t, x in enumerate(stack)]
    stay = [
        keep if isinstance(keep, np.ndarray) else _at_least(size, keep, out=work.of(f"stay {t}", shape, np.bool_))
        for t, (size, keep) in enumerate(zip(sizes, kept, strict=True))
    ]
    both, clash, less = (work.of(name, shape, np.bool_) for name in ("both", "clash", "less"))
    np.logical_and(stay[0], stay[1], out=both)
    np.logical_xor(np.greater(a, 0, out=clash), np.greater(b, 0, out=less), out=clash)
    clash &= both
    both ^= clash
    # Of two that are equal and opposite neither stays, because their sum is 0.
    for mine, other, mask in zip(sizes, sizes[::-1], stay, strict=True):
        np.less_equal(mine, other, out=less)
        less &= clash
        mask ^= less
    # Twice the weight of each: 1 where both stay and agree, 2 where one stays alone. The sizes are not needed any more.
    weight = work.of("twice the weight", shape, np.uint8)
    for x, mask, part in zip(stack, stay, sizes, strict=True):
        np.add(mask.view(np.uint8), mask.view(np.uint8), out=weight)
        weight -= both.view(np.uint8)
        np.copyto(part, weight)
        part *= x
    np.add(sizes[0], sizes[1], out=out)
    out *= dtype.type(0.5)


def _at_least(size: Array, cutoff: float, *, out: Mask) -> Mask:
    """Where absolute values reach the cutoff; entries of 0 never do."""
    return np.greater_equal(size, cutoff, out=out) if cutoff > 0 else np.greater(size, 0, out=out)
