"""What the cosine of two updates means in words, from one adapter under two names to two that fight."""

FAR = 4.0  # smallest number of standard deviations at which a cosine counts as no accident
# From this |cosine| on two updates of one length differ by at most 14 % of it, √(2 − 2·0.99).
SAME = 0.99
HALF = 0.7  # from this |cosine| on half of the energy of each, 0.7², is along the other
# From this cosine downwards the sum of two updates of one norm has at most half of their energy, 1 + cosine.
FIGHT = -0.5
# The same share from which the doctor warns of the loss in a merge.
LARGE = 0.2  # smallest |cosine| that matters: the sum of two updates of one norm loses or gains a fifth of each


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
