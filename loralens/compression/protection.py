"""What a budget of ranks protects: the weight of the squared error of every module."""

from collections.abc import Mapping
from sys import float_info
from typing import Literal

from loralens.core.lazy import Array
from loralens.core.naming.selection import select
from loralens.errors import OptionError
from loralens.linalg.measures import frobenius

Protection = Literal["absolute", "relative"] | Mapping[str, float]
MOST = 1e50  # largest ratio of two norms ‖ΔW‖ that is used: its square, 1e100, times σ² is far from overflowing


def protection(spectra: Mapping[str, Array], protect: Protection) -> dict[str, float]:
    """Module name → the weight of its squared error.

    Parameters
    ----------
    spectra : mapping of str to float64 array
    protect : "absolute", "relative" or mapping of str to float
        ``absolute``: 1, which minimises ‖ΔW−ΔW'‖ of the whole adapter. ``relative``: 1/‖ΔW‖_F² of the module, relative
        to that of the largest one, so that small modules count as much as large ones. A mapping from globs over module
        names or kinds to numbers: the number of the first glob that matches, and 1 if none does.

    Raises
    ------
    OptionError
        A weight is negative or not a number, or a glob matches nothing.
    """
    if protect == "absolute":
        return dict.fromkeys(spectra, 1.0)
    if protect == "relative":
        norms = {name: frobenius(s) for name, s in spectra.items()}
        # Relative to the largest norm, because 1/‖ΔW‖² itself could overflow. ΔW = 0 has nothing to protect.
        largest = max(norms.values(), default=0.0)
        return {name: min(largest / norm, MOST) ** 2 if norm else 0.0 for name, norm in norms.items()}
    weights: dict[str, float] = {}
    for glob, weight in protect.items():
        # Python treats True as a number, but a weight of True is probably a mistake.
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= float_info.max:
            raise OptionError(f"the weight of {glob} is {weight!r:.100}", fix="give a finite number of 0 or more")
        # The first glob wins, so that exceptions can be written before a general rule.
        for name in select(spectra, [glob]):
            weights.setdefault(name, float(weight))
    return {name: weights.get(name, 1.0) for name in spectra}
