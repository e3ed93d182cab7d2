"""Magnitude pruning: the sum of the largest entries of every update (Han et al. 2015)."""

from loralens.arithmetic.election import add_updates, trim_entries
from loralens.arithmetic.elementwise import exact_sum, fuse_entries
from loralens.arithmetic.entries import Entries, Fuse, Fused
from loralens.choices import Space
from loralens.core.joint import Joint


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
