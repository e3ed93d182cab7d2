"""What two adapters are to each other, in words that grow with the size of the effect."""

from math import log

from loralens.analysis.compare.interference import LARGE

# From this |cosine| on, the two updates differ by less than a fifth of their size: √(2 − 2·0.98) = 0.2.
SAME = 0.98
# At −0.5 the sum of two updates of equal norm loses half of each, which is a conflict in the plain sense of the word.
STRONG = 0.5


def is_chance(z: float, pairs: int) -> bool:
    """Whether the largest of so many cosines is no more than unrelated adapters would have.

    |z| of two single directions exceeds t with probability e^−t at most, and of more directions less: beyond
    ln(20·pairs), which is 3 for one pair, chance leaves any pair in one case of 20.
    """
    return abs(z) < log(20 * pairs)


def describe_relation(cosine: float, z: float, pairs: int) -> str:
    """A phrase that follows the names of two adapters, the strongest of ``pairs`` pairs.

    Parameters
    ----------
    cosine : float
        The cosine of the whole updates.
    z : float
        Its distance from 0, in standard deviations of unrelated updates.
    pairs : int
        The number of pairs of which this is the one of largest |cosine|.
    """
    if is_chance(z, pairs):
        return "are unrelated, as far as can be measured"
    size = abs(cosine)
    if cosine < 0:
        return (
            "are practically the same adapter with opposite signs"
            if size >= SAME
            else "conflict"
            if size >= STRONG
            else "partly work against each other"
            if size >= LARGE
            else "have almost nothing in common"
        )
    if size >= SAME:
        return "are practically the same adapter"
    if size >= STRONG:
        return "have much in common"
    return "have something in common" if size >= LARGE else "have almost nothing in common"
