"""The way of every elementwise rule: entries in a space, a rule on blocks of them, and back to an update."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import ceil

import numpy as np

from loralens.arithmetic.entries import Entries, Fuse
from loralens.arithmetic.fused import Fused
from loralens.arithmetic.method import Space
from loralens.arithmetic.spaces import place
from loralens.core.joint import Joint
from loralens.core.lowrank import LowRank
from loralens.linalg.factor import Floats
from loralens.linalg.selection import Selection

Joints = Callable[[], Iterable[Joint]]


def fused(joint: Joint, rule: Callable[[Entries], Fuse], *, space: Space, lam: float) -> Fused:
    """λ times what a rule makes of the entries of a module.

    Parameters
    ----------
    joint : Joint
    rule : callable
        ``rule(entries)`` looks at the whole module as often as it must and returns the function of one block, (place of
        the rows, (updates, rows, n)) → (rows, n), which may write into what it is given.
    space : str
        ``full``, ``knots`` or ``core``: see `loralens.arithmetic.spaces.place`.
    lam : float
    """
    there = place(joint, space)
    if there is None:
        return summed(joint, lam)
    update, truncation = there.back(rule(there.entries))
    return Fused(LowRank(lam * update.B, update.A, scaling=update.scaling, layout=update.layout), truncation)


def summed(joint: Joint, lam: float) -> Fused:
    """λ Σ w_t ΔW_t, exact: what a rule that leaves everything as it is comes to, in every space."""
    return Fused(joint.lift(lam * joint.total(), np.float64), 0.0)


def whole_cutoffs(joints: Joints, share: float, *, space: Space) -> tuple[float, ...]:
    """For every adapter the size that a share of its entries in *all* modules reaches: exact.

    Parameters
    ----------
    joints : callable
        ``joints()`` gives every module; it is called three times, and again where a sample misled.
    share : float
        In (0, 1], of the entries of the modules that the adapter has.
    """
    sizes: dict[int, int] = {}
    adapters = 0
    for joint in joints():
        adapters = len(joint.updates)
        for t, one in _apart(joint, space):
            sizes[t] = sizes.get(t, 0) + one.size
    samples: dict[int, list[Floats]] = {t: [] for t in sizes}
    for joint in joints():
        for t, one in _apart(joint, space):
            samples[t].append(one.sample(ceil(sizes[t] ** (2 / 3) * one.size / sizes[t]))[0])
    sought = {
        t: Selection([max(1, int(share * size))], size=size, sample=np.concatenate(samples[t]))
        for t, size in sizes.items()
    }
    while any(one.open for one in sought.values()):
        for joint in joints():
            for t, one in _apart(joint, space):
                for block in one.magnitudes():
                    sought[t].add(block)
        for found in sought.values():
            found.close()
    return tuple(sought[t].values[0] if t in sought else 0.0 for t in range(adapters))


def _apart(joint: Joint, space: Space) -> Iterator[tuple[int, Entries]]:
    """The entries of every adapter alone."""
    there = place(joint, space)
    if there:
        one = there.entries
        for t, matrix in zip(one.places, one.matrices, strict=True):
            yield t, replace(one, matrices=(matrix,), places=(t,))
