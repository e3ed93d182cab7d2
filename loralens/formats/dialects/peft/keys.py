"""Parsing the keys of a PEFT file.

A key consists of ``base_model.model.``, the path of the module in the base model, and a leaf. Some files have the name
of the adapter in the leaf (``lora_A.default.weight``), and wrapped layers have ``base_layer`` in their path.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

PREFIX = "base_model.model."
OUT_PROJ = "base_layer.out_proj"  # within an adapted nn.MultiheadAttention

# The adapter's name in a leaf. It must not take `weight` or `bias`, which end the key.
_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
# role → the keys of its tensors
_LEAVES = {
    "pair": re.compile(rf"^(?P<path>.+?)\.lora_(?P<half>[AB]){_NAME}\.weight$"),
    "embedding": re.compile(rf"^(?P<path>.+?)\.lora_embedding_(?P<half>[AB]){_NAME}$"),
    "lora_bias": re.compile(rf"^(?P<path>.+?)\.lora_B{_NAME}\.bias$"),
    "magnitude": re.compile(rf"^(?P<path>.+?)\.lora_magnitude_vector{_NAME}(?:\.weight)?$"),
    "diagonal": re.compile(rf"^(?P<path>.+?)\.lora_diag{_NAME}$"),
}


# role → the leaf that PEFT writes, with a place for the half
_WRITTEN = {
    "pair": "lora_{}.weight",
    "embedding": "lora_embedding_{}",
    "lora_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "diagonal": "lora_diag",
}


_HALVES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_TAIL = len(".lora_A.weight")


class PeftKey(NamedTuple):
    """A key of a pair or of a tensor that belongs to one.

    ``path`` is the stored one without ``base_model.model.``, ``adapter`` the name of the adapter if the key has it.
    """

    role: str
    path: str
    half: str
    adapter: str


# Files have the halves of a pair one after the other, so that a few paths are enough to share them.
@lru_cache(maxsize=1 << 6)
def _once(path: str) -> str:
    """A path as one object for both halves of its pair, because paths may be long."""
    return path


# Reading, checking and writing parse every key several times; 16,384 keys are those of a large adapter.
@lru_cache(maxsize=1 << 14)
def parse_peft_key(key: str) -> PeftKey | None:
    """The parts of a key; None for a key that PEFT's LoRA layers do not write."""
    # Nearly all keys have this form, and a regular expression would take three times as long.
    head, tail = key[:-_TAIL], key[-_TAIL:]
    if head and tail in _HALVES and "\n" not in head and ".lora_" not in head:
        return PeftKey("pair", _once(head.removeprefix(PREFIX)), _HALVES[tail], "")
    for role, regex in _LEAVES.items():
        match = regex.match(key)
        if match:
            parts = match.groupdict()
            path = _once(parts["path"].removeprefix(PREFIX))
            return PeftKey(role, path, parts.get("half") or "", parts["adapter"] or "")
    return None


def canonical_key(key: str) -> str:
    """A key in PEFT's own form: with its prefix and without the name of the adapter."""
    parts = parse_peft_key(key)
    if parts is None:
        return key
    own = f"{PREFIX}{parts.path}.{_WRITTEN[parts.role].format(parts.half)}"
    # The same string where it is in this form, so that long keys are not held twice.
    return key if key == own else own


def is_pair(key: str) -> bool:
    """Whether a key is half of a PEFT pair."""
    parts = parse_peft_key(key)
    return parts is not None and parts.role in ("pair", "embedding")


def module_path(path: str) -> str:
    """A stored path without the parts ``base_layer``, which PEFT's wrappers insert."""
    if "base_layer" not in path:
        return path
    return ".".join(part for part in path.split(".") if part != "base_layer")


def depth(path: str) -> int:
    """The number of wrappers around a stored path, which are its trailing parts ``base_layer``."""
    parts = path.split(".")
    count = 0
    while count < len(parts) and parts[-1 - count] == "base_layer":
        count += 1
    return count


def adapter_names(keys: Iterable[str]) -> set[str]:
    """The names of adapters in the keys of pairs."""
    return {found.adapter for found in map(parse_peft_key, keys) if found and found.role in ("pair", "embedding")}
