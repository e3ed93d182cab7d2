"""α that is stored as a tensor beside a pair, and the scale that diffusers, ComfyUI and others use without one.

This does not hold for kohya's dialect, whose software takes a missing α as α = r (`kohya.reader.kohya_scaling`).
"""

from collections.abc import Mapping
from math import isclose, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Scaling
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects.pairs import SAVE_AGAIN, Parts
from loralens.formats.files.container import FLOATS
from loralens.formats.files.json_text import finite_number

if TYPE_CHECKING:  # its classes are needed for LyCORIS files only
    from loralens.core.structured import Update

MISSING = "no alpha in the file: scale 1"
WRITE_ALPHA = "save the adapter again with an alpha for every module"


def stored_scaling(parts: Parts, rank: int) -> Scaling:
    """α/r by the tensor ``alpha`` of a module; scale 1 if it has none."""
    if "alpha" not in parts:
        return Scaling("given", origin=MISSING)
    return Scaling("alpha/r", single_number(*parts["alpha"]), rank, "alpha in the file")


def single_number(key: str, tensor: LazyArray) -> float:
    """The number in a stored tensor, which must hold a single finite one."""
    # Trainers store it with no axes or with one of length 1.
    if tensor.size != 1:
        raise ShapeError(f"{key} has the shape {tensor.shape}, but one number is expected", fix=SAVE_AGAIN)
    # A bool or a complex number would be converted without an error.
    if tensor.dtype not in FLOATS and tensor.dtype.kind not in "iu":
        raise FormatError(f"{key} has the dtype {tensor.dtype}, which is not that of a number", fix=SAVE_AGAIN)
    value = float(tensor.read().reshape(-1)[0])
    if not isfinite(value):
        raise FormatError(f"{key} is {value}, not a finite number", fix="train or save the adapter again")
    return value


def alpha_for_file(module: "Update") -> np.float32:
    """The α that a file has to hold so that α/r is the scale of a module.

    Raises
    ------
    FormatError
        No float32 gives this scale at this rank.
    """
    # The check below reports what float32 cannot hold.
    with np.errstate(all="ignore"):
        alpha = np.float32(module.scaling.alpha_for(module.scale, module.rank, "alpha/r"))
    # Rounding to float32 changes α by a relative 6e-8 at most; a larger difference is an overflow or an underflow.
    if not isclose(float(alpha) / module.rank, module.scale, rel_tol=1e-6):
        what = f"a scale of {module.scale:g} at rank {module.rank} has no α in float32"
        raise FormatError(what, fix="change the strength of the adapter first: loralens scale")
    return alpha


def alpha_findings(modules: "Mapping[str, Update]", metadata: Mapping[str, str] | None) -> list[Finding]:
    """Findings about modules without an α: whether a scale of 1 is assumed or certain.

    ai-toolkit folds α into the factors and writes none, so there it is certain.
    """
    missing = [name for name, module in modules.items() if module.scaling.origin == MISSING]
    # A file without any α is common, and every program reads it at scale 1. Only a mixed file is doubtful.
    if 0 < len(missing) < len(modules):
        text = (
            f"{len(missing)} of {len(modules)} modules have no alpha (the first is {missing[0]}), and are taken at "
            "scale 1; programs disagree about such files"
        )
        return [Finding("warning", "alpha-missing", text, WRITE_ALPHA)]
    if missing and "ai-toolkit" in (metadata or {}).get("software", ""):
        return [Finding("note", "alpha-folded", "made by ai-toolkit, whose factors hold α already: the scale is 1")]
    return []


def alpha_unknown(title: str) -> Finding:
    """The finding for a file without an α, of a dialect that stores none."""
    text = f"{title} stores no α with its weights, so the scale is unknown and taken as 1"
    return Finding("warning", "alpha-unknown", text, "give --alpha (the scale is then α/r) or --scale")


def config_scaling(config: Mapping[str, Any] | None, rank: int, *, r: str) -> Scaling:
    """α/r by ``lora_alpha`` of the configuration; ``r`` is the name of its field for the rank.

    A configuration with another rank belongs to another file, so the scale is then unknown.
    """
    fields = config or {}
    alpha = finite_number(fields.get("lora_alpha"))
    if alpha is None or fields.get(r, rank) != rank:
        return Scaling("unknown", rank=rank)
    return Scaling("alpha/r", alpha, rank, "adapter_config.json")
