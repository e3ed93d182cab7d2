"""Alpha elsewhere: the α of dialects whose weights' files hold none, where something beside the file says it."""

from collections.abc import Mapping
from typing import Any

from loralens.core.adapter import Finding
from loralens.core.scaling import Scaling
from loralens.formats.files.number import finite


def alpha_unknown(title: str) -> Finding:
    """The finding that says so where nothing does."""
    text = f"{title} stores no α with its weights, so the scale is unknown and taken as 1"
    return Finding("warning", "alpha-unknown", text, "give --alpha (the scale is then α/r) or --scale")


def scaling(config: Mapping[str, Any] | None, rank: int, *, r: str) -> Scaling:
    """α/r by ``lora_alpha``, unless the rank said under ``r`` is another: that configuration is of another file."""
    fields = config or {}
    alpha = finite(fields.get("lora_alpha"))
    if alpha is None or fields.get(r, rank) != rank:
        return Scaling("unknown", rank=rank)
    return Scaling("alpha/r", alpha, rank, "adapter_config.json")
