"""The way of every elementwise rule: entries in a space, a rule on blocks of them, and back to an update."""

from collections.abc import Callable, Iterator
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
    space_entries = place(joint, space)
    if space_entries is None:
        return summed(joint, lam)
    update, truncation = space_entries.back(rule(space_entries.entries))
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

    def sample(joint: Joint) -> tuple[int, dict[int, tuple[int, Floats]]]:
        by_adapter = dict(_each_alone(joint, space))
        samples = {t: (entries.size, entries.sample(ceil(rate * entries.size))) for t, entries in by_adapter.items()}
        return len(joint.updates), samples

    looks = modules.map(sample)
    samples: dict[int, list[tuple[int, Floats]]] = {}  # of each adapter: the size of each of its modules, and a sample
    for _, by_adapter in looks:
        for t, module_sample in by_adapter.items():
            samples.setdefault(t, []).append(module_sample)
    selections = {}
    for t, parts in sorted(samples.items()):
        size = sum(module_size for module_size, _ in parts)
        pooled = np.concatenate([part.ravel() for _, part in parts])
        selections[t] = Selection([max(1, int(share * size))], size=size, sample=pooled)

    def count(joint: Joint) -> None:
        for t, entries in _each_alone(joint, space):
            for block in entries.magnitudes():
                selections[t].add(block)

    # A selection stays open where its sample did not bracket the value that is sought: then all entries are read again.
    while any(selection.open for selection in selections.values()):
        modules.map(count, report=True)
        for selection in selections.values():
            selection.close()
    adapters = looks[0][0]
    return tuple(selections[t].values[0] if t in selections else 0.0 for t in range(adapters))


def _each_alone(joint: Joint, space: Space) -> Iterator[tuple[int, Entries]]:
    """The entries of every adapter alone."""
    space_entries = place(joint, space)
    if space_entries:
        entries = space_entries.entries
        for t, matrix in zip(entries.places, entries.matrices, strict=True):
            yield t, replace(entries, matrices=(matrix,), places=(t,))
