"""The way of every elementwise rule: entries in a space, a rule on blocks of them, and back to an update."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import ceil

import numpy as np

from loralens.arithmetic.entries import Entries, Fuse
from loralens.arithmetic.fused import Fused
from loralens.arithmetic.method import Space
from loralens.arithmetic.modules import Modules
from loralens.arithmetic.spaces import place
from loralens.core.joint import Joint
from loralens.core.lowrank import LowRank
from loralens.linalg.factor import Floats
from loralens.linalg.selection import Selection


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


def whole_cutoffs(modules: Modules, share: float, *, space: Space) -> tuple[float, ...]:
    """For every adapter the size that a share of its entries in *all* modules reaches: exact.

    Parameters
    ----------
    modules : Modules
        They are looked at twice, and again where a sample misled.
    share : float
        In (0, 1], of the entries of the modules that the adapter has.
    """
    rate = 0.25 / max(1, modules.entries) ** (1 / 3)

    def sampled(joint: Joint) -> tuple[int, dict[int, tuple[int, Floats]]]:
        apart = dict(_apart(joint, space))
        return len(joint.updates), {t: (one.size, one.sample(ceil(rate * one.size))) for t, one in apart.items()}

    looks = modules.each(sampled)
    found = [one for _, one in looks]
    sizes = {t: sum(one[t][0] for one in found if t in one) for t in sorted({t for one in found for t in one})}
    sought = {
        t: Selection([max(1, int(share * size))], size=size, sample=_joined(one[t][1] for one in found if t in one))
        for t, size in sizes.items()
    }

    def counted(joint: Joint) -> None:
        for t, one in _apart(joint, space):
            for block in one.magnitudes():
                sought[t].add(block)

    while any(one.open for one in sought.values()):
        modules.each(counted, told=True)
        for one in sought.values():
            one.close()
    return tuple(sought[t].values[0] if t in sought else 0.0 for t in range(looks[0][0]))


def _joined(parts: Iterable[Floats]) -> Floats:
    """The numbers of all of them, in one dimension."""
    return np.concatenate([part.ravel() for part in parts])


def _apart(joint: Joint, space: Space) -> Iterator[tuple[int, Entries]]:
    """The entries of every adapter alone."""
    there = place(joint, space)
    if there:
        one = there.entries
        for t, matrix in zip(one.places, one.matrices, strict=True):
            yield t, replace(one, matrices=(matrix,), places=(t,))
