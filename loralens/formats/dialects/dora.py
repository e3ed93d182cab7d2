"""DoRA adapters whose magnitudes are not in the file: the values that their software uses, and a warning about it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from loralens.core.adapter import Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.together import MAGNITUDES, NORMS

if TYPE_CHECKING:  # its classes are needed for LyCORIS files only
    from loralens.core.structured import Update

CODE = "dora-magnitudes-missing"
NOTHING = LazyArray.of(np.zeros(0, np.float32))  # the tensor of an extra for which the file has no numbers


def missing_magnitudes(
    modules: "Mapping[str, Update]", extra: Mapping[str, Extra], roles: Mapping[str, str], key: Callable[[str], str]
) -> dict[str, Extra]:
    """Extras with the roles ``norms`` and ``norms_in`` for the modules of a DoRA adapter that have no magnitude.

    Parameters
    ----------
    modules, extra
        The modules and extras of the adapter.
    roles : mapping of str to str
        Kind of layout → role. A kind that is missing here is never DoRA.
    key : callable
        Module name → the key that its magnitude would have in a file.
    """
    with_magnitude = {item.module for item in extra.values() if item.role in MAGNITUDES}
    return {
        key(name): Extra(roles[module.layout.kind], name, NOTHING)
        for name, module in modules.items()
        # A stack of experts, for example, is never DoRA in PEFT.
        if name not in with_magnitude and module.layout.kind in roles
    }


def magnitude_findings(extra: Mapping[str, Extra], *, software: str) -> list[Finding]:
    """The warning about missing magnitudes, if there are any."""
    missing = [item.module for item in extra.values() if item.role in NORMS]
    if not missing:
        return []
    count = sum(item.role in MAGNITUDES for item in extra.values())
    text = (
        f"{len(missing)} of {count} DoRA modules have no magnitude in the file (the first is {missing[0]}): {software} "
        "uses the lengths in W, W' = ‖W‖ · (W+ΔW)/‖W+ΔW‖, and so do commands that are given the base; without a base, "
        "only ΔW = scale·B·A is measured"
    )
    fix = "save the adapter again from training if it trained magnitudes"
    return [Finding("warning", CODE, text, fix)]
