"""Model Breadcrumbs: neither the largest entries nor the small ones (Davari & Belilovsky 2024)."""

import numpy as np

from loralens.arithmetic.election import add_updates
from loralens.arithmetic.elementwise import exact_sum, fuse_entries
from loralens.arithmetic.entries import Entries, Fuse, Fused, Workspace
from loralens.choices import Space
from loralens.core.joint import Joint
from loralens.core.lazy import Array


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
