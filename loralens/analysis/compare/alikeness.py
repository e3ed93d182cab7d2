"""What the cosine of two updates means in words, from one adapter under two names to two that fight."""

FAR = 4.0  # smallest number of standard deviations from 0 at which a cosine does not count as chance
# At this |cosine| or a larger one, two updates of equal norm differ by at most 14 % of that norm: √(2 − 2·0.99).
SAME = 0.99
HALF = 0.7  # at this |cosine| or a larger one, at least half of the energy of each (0.7²) is along the other
# At this cosine or a lower one, the sum of two updates of equal norm has at most half of their energy: 1 + cosine.
FIGHT = -0.5
# The doctor warns of the loss in a merge if it is larger than the same share.
LARGE = 0.2  # smallest |cosine| that matters: in the sum of two updates of equal norm, each loses or gains a fifth


def is_same(cosine: float) -> bool:
    """Whether two updates with this cosine are practically one adapter, up to its strength."""
    return cosine >= SAME


def in_words(cosine: float, z: float) -> str:
    """What two updates with this cosine do, as the end of a sentence about both.

    Parameters
    ----------
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖) of the whole adapters.
    z : float
        The same in standard deviations of two random updates.
    """
    if is_same(cosine):
        return "are practically the same adapter"
    if cosine <= -SAME:
        return "are practically opposites: each takes back what the other does"
    # In small modules a large cosine may be an accident, so chance comes before all weaker words.
    if abs(z) < FAR:
        return "are no more alike than two random updates"
    if cosine >= HALF:
        return "do much the same"
    if cosine >= LARGE:
        return "agree in part"
    if cosine <= FIGHT:
        return "fight: their sum loses half of their energy or more"
    if cosine <= -LARGE:
        return "oppose each other in part"
    return "have little in common, though more than chance gives"
