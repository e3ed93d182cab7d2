"""The α of dialects that do not store it with the weights, from a configuration beside the file."""

from collections.abc import Mapping
from typing import Any

from loralens.core.adapter import Finding
from loralens.core.scaling import Scaling
from loralens.formats.files.number import finite


def alpha_unknown(title: str) -> Finding:
    """The finding for a file without an α, of a dialect that stores none."""
    text = f"{title} stores no α with its weights, so the scale is unknown and taken as 1"
    return Finding("warning", "alpha-unknown", text, "give --alpha (the scale is then α/r) or --scale")


def scaling(config: Mapping[str, Any] | None, rank: int, *, r: str) -> Scaling:
    """α/r by ``lora_alpha`` of the configuration; ``r`` is the name of its field for the rank.

    A configuration with another rank belongs to another file, so the scale is then unknown.
    """
    fields = config or {}
    alpha = finite(fields.get("lora_alpha"))
    if alpha is None or fields.get(r, rank) != rank:
        return Scaling("unknown", rank=rank)
    return Scaling("alpha/r", alpha, rank, "adapter_config.json")
