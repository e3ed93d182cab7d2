"""TIES: trim updates to their largest entries, elect a sign, average the updates that agree (Yadav et al. 2023)."""

from collections.abc import Sequence
from typing import Any

from loralens.arithmetic.election import elected_mean, trim_entries
from loralens.arithmetic.elementwise import Modules, exact_sum, fuse_entries, whole_cutoffs
from loralens.arithmetic.entries import Entries, Fuse, Fused
from loralens.choices import Space
from loralens.core.joint import Joint


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
