"""What elementwise rules share: the way from updates to entries in a space and back, and cutoffs of whole adapters."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TypeVar, final

import numpy as np

from loralens.arithmetic.entries import SAMPLED, Entries, Fuse, Fused, Matrix
from loralens.arithmetic.subspace_methods import entries_in_space
from loralens.choices import Space
from loralens.core.joint import Joint
from loralens.core.lowrank import LowRank
from loralens.core.threads import Step, in_threads
from loralens.linalg.factor import Array
from loralens.linalg.selection import Selection

MOST_SAMPLED = 1 << 20  # entries of an adapter that are sampled at most: 4 MiB

T = TypeVar("T")


def fuse_entries(joint: Joint, rule: Callable[[Entries], Fuse], *, space: Space, lam: float) -> Fused:
    """Apply a rule to the entries of a module, and return λ times its result.

    Parameters
    ----------
    joint : Joint
    rule : callable
        ``rule(entries)`` may look at all entries of the module, for instance to find a cutoff. It returns a function
        of one block, (slice of the rows, (updates, rows, n)) → (rows, n), which may write into the block.
    space : str
        ``full``, ``knots`` or ``core``: see `loralens.arithmetic.subspace_methods.entries_in_space`.
    lam : float
    """
    space_entries = entries_in_space(joint, space)
    if space_entries is None:
        return exact_sum(joint, lam)
    update, truncation = space_entries.back(rule(space_entries.entries))
    return Fused(LowRank(lam * update.B, update.A, scaling=update.scaling, layout=update.layout), truncation)


def exact_sum(joint: Joint, lam: float) -> Fused:
    """Return the exact sum λ Σ w_t ΔW_t, which is the result of a rule that changes no entry, in every space."""
    return Fused(joint.lift(lam * joint.total(), np.float64), 0.0)


@final
@dataclass(frozen=True, slots=True)
class Modules:
    """All modules of a combination. Each is read into its joint space when it is needed, and is not kept in memory.

    Attributes
    ----------
    joint : callable
        Module name → its joint space.
    entries : int
        Σ out·in over all modules.
    step : callable, optional
        Called with 1 after every module of a pass that reports its progress.
    """

    names: Sequence[str]
    joint: Callable[[str], Joint]
    entries: int
    threads: int = 1
    step: Step | None = None

    def map(self, work: Callable[[Joint], T], *, report: bool = False) -> list[T]:
        """Return the results of ``work`` on every module, in order; with ``report``, ``step`` is called after each."""
        results = in_threads(
            lambda name: work(self.joint(name)), self.names, self.threads, self.step if report else None
        )
        return list(results.values())


def whole_cutoffs(modules: Modules, share: float, *, space: Space) -> tuple[float, ...]:
    """Return for every adapter the absolute value that a share of its entries in *all* modules reaches, exactly.

    Parameters
    ----------
    modules : Modules
        They are read twice, and once more if a sample was misleading.
    share : float
        In (0, 1], of the entries of the modules that the adapter has.
    space : str
    """
    # As `Entries.sampled`, of all modules together, but not more than fit into the memory.
    size = max(1, modules.entries)
    rate = min(SAMPLED / size ** (1 / 3), MOST_SAMPLED / size)

    def sample(joint: Joint) -> tuple[int, dict[int, tuple[int, Array]]]:
        samples = {t: (prod(M.shape), np.abs(M.sample(ceil(rate * prod(M.shape))))) for t, M in _matrices(joint, space)}
        return len(joint.updates), samples

    looks = modules.map(sample)
    samples: dict[int, list[tuple[int, Array]]] = {}  # of each adapter: the size of each of its modules, and a sample
    for _, by_adapter in looks:
        for t, module_sample in by_adapter.items():
            samples.setdefault(t, []).append(module_sample)
    selections = {}
    for t, parts in sorted(samples.items()):
        size = sum(module_size for module_size, _ in parts)
        # Modules are sampled at one rate, so the pooled sample is one of the whole adapter.
        pooled = np.concatenate([part.ravel() for _, part in parts])
        selections[t] = Selection([max(1, int(share * size))], size=size, sample=pooled)

    def count(joint: Joint) -> None:
        for t, matrix in _matrices(joint, space):
            for block in matrix.magnitudes():
                selections[t].add(block)

    # A selection stays open where its sample did not bracket the value that is sought: then all entries are read again.
    while any(selection.open for selection in selections.values()):
        modules.map(count, report=True)
        for selection in selections.values():
            selection.close()
    # An adapter that is 0 everywhere has no entries, and any cutoff serves.
    adapters = looks[0][0]
    return tuple(selections[t].values[0] if t in selections else 0.0 for t in range(adapters))


def _matrices(joint: Joint, space: Space) -> Iterator[tuple[int, Matrix]]:
    """The index of every adapter that is not 0 in this module, and its weighted update in the space."""
    space_entries = entries_in_space(joint, space)
    if space_entries:
        yield from zip(space_entries.entries.places, space_entries.entries.matrices, strict=True)
