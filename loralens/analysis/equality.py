"""The relative difference of two adapters, independent of their dialects, ranks and gauge."""

from dataclasses import dataclass
from math import isfinite
from typing import final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lowrank import TOO_LARGE, LowRank, same_numbers
from loralens.core.matching import same_modules
from loralens.core.names import natural_key
from loralens.core.structured import Update
from loralens.core.threads import Step
from loralens.errors import NOT_FINITE, FormatError, place
from loralens.linalg.product import product_norm


@final
@dataclass(frozen=True, slots=True)
class UpdateDifference:
    """The relative difference of two updates of one module.

    Attributes
    ----------
    name : str
        The name in the first adapter, or in the second if only that has the module.
    relative : float
        ‖ΔW₁ − ΔW₂‖_F / max(‖ΔW₁‖_F, ‖ΔW₂‖_F); 0 if both are 0; 1 if only one adapter has the module and it is not 0;
        infinite if their shapes differ.
    note : str
        Anything else, in words.
    """

    name: str
    relative: float
    note: str = ""


def differences(first: Adapter, second: Adapter, *, step: Step | None = None) -> list[UpdateDifference]:
    """The difference of every module, in natural order.

    Modules are matched by name, else by normal form: component prefix stripped, dots and underscores the same. ``step``
    is called with 1 after every module.

    Raises
    ------
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    ΔW₁ − ΔW₂ is the product [s₁B₁, −s₂B₂]·[A₁; A₂], so its norm needs no dense matrix, and nearly equal updates do not
    cancel: the result is accurate to about ε and not √ε. For equal factors it is exactly 0.
    """
    names = same_modules(first, second)
    pairs: dict[str, tuple[Update | None, Update | None]] = {
        name: (module, second.modules.get(names.get(name, ""))) for name, module in first.items()
    }
    matched = set(names.values())
    pairs |= {name: (None, module) for name, module in second.items() if name not in matched}
    results = []
    for name, (update, other) in sorted(pairs.items(), key=lambda p: natural_key(p[0])):
        results.append(_difference(name, update, other))
        if step:
            step(1)
    return results


def _difference(name: str, first: Update | None, second: Update | None) -> UpdateDifference:
    with place(name):
        if first is None or second is None:
            only = first or second
            assert only
            note = "only in the " + ("first" if second is None else "second")
            # A module that does nothing makes no difference between two adapters.
            return UpdateDifference(name, float(only.singular_values().any()), note)
        if first.shape != second.shape:  # no difference is defined; infinite, so that no tolerance passes it
            return UpdateDifference(name, np.inf, f"{first.shape} and {second.shape}")
        # A structured update has no factors to stack, and its dense form is what its format defines.
        if isinstance(first, LowRank) and isinstance(second, LowRank):
            return UpdateDifference(name, _relative(first, second))
        return UpdateDifference(name, _relative_dense(first, second))


def _relative(first: LowRank, second: LowRank) -> float:
    first, second = first.load(), second.load()
    if same_numbers(first, second):
        product_norm(first.B, first.A)  # raises a FormatError if a factor is not finite
        return 0.0
    B1, A1, B2, A2 = (X.astype(np.float64) for X in (first.B, first.A, second.B, second.A))
    with np.errstate(over="ignore"):  # an overflow is refused below, with a message
        B1, B2 = first.scale * B1, second.scale * B2  # in float64, so that a scale does not round the stored factors
    for module, B, scaled_B in ((first, first.B, B1), (second, second.B, B2)):
        if np.isinf(scaled_B).any() and not np.isinf(B).any():
            raise FormatError(f"ΔW is too large for float64: its scale is {module.scale:g}", fix=TOO_LARGE)
    largest = max(product_norm(B1, A1), product_norm(B2, A2))
    return product_norm(np.hstack([B1, -B2]), np.vstack([A1, A2])) / largest if largest else 0.0


def _relative_dense(first: Update, second: Update) -> float:
    """The relative difference of two updates if one of them is not a pair: both are formed densely."""
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are reported below, as an error with a fix
        X, Y = first.dense(), second.dense()
    norms = float(np.linalg.norm(X)), float(np.linalg.norm(Y))
    if not all(map(isfinite, norms)):
        raise FormatError(NOT_FINITE, fix="the adapter is damaged or diverged: use an earlier one")
    return float(np.linalg.norm(X - Y)) / max(norms) if any(norms) else 0.0
