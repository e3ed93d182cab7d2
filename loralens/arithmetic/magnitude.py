"""Magnitude pruning: the sum of the largest entries of every update (Han et al. 2015)."""

from loralens.arithmetic.election import add_updates, keep_largest
from loralens.arithmetic.elementwise import exact_sum, fuse_entries
from loralens.arithmetic.entries import Entries, Fuse, Fused, Workspace
from loralens.arithmetic.method import Space
from loralens.core.joint import Joint
from loralens.core.lazy import Array


def magnitude(joint: Joint, *, density: float = 0.2, lam: float = 1.0, space: Space = "full") -> Fused:
    """λ Σ_t top(w_t ΔW_t), where top keeps the share ``density`` of entries that are largest in absolute value.

    The share is one of each module. Of several equal entries at the boundary all are kept; PEFT's ``magnitude_prune``
    keeps some of them.
    """
    if density >= 1:
        return exact_sum(joint, lam)
    return fuse_entries(joint, lambda entries: _rule(entries, density), space=space, lam=lam)


def _rule(entries: Entries, density: float) -> Fuse:
    cutoffs, work = entries.cutoffs([entries.count(density)]), Workspace()

    def fuse(_: slice, stack: Array) -> Array:
        for x, (cutoff,) in zip(stack, cutoffs, strict=True):
            keep_largest(x, cutoff, work)
        return add_updates(stack, work)

    return fuse
