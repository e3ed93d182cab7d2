"""The names of LitGPT's modules, which distinguish its files from those of loralib."""

import re
from collections.abc import Iterable

_OURS = re.compile(
    r"^transformer\.h\.[0-9]+\.(attn\.(attn|qkv|proj)|mlp\.(fc|fc_1|fc_2|proj|gate|experts\.[0-9]+\.\w+))$"
)
_FUSED = re.compile(r"\.attn\.(attn|qkv)$")


def are_litgpt_names(names: Iterable[str]) -> bool:
    """Whether all modules have names of LitGPT, and at least one is in a block."""
    names = list(names)
    other_names = [name for name in names if not _OURS.match(name)]
    return other_names in ([], ["lm_head"]) and any(map(_OURS.match, names))


def is_fused(name: str) -> bool:
    """Whether a module is the fused projection of query, key and value."""
    return bool(_FUSED.search(name))
