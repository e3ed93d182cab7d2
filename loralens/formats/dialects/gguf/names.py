"""Converting module names to the tensor names of GGUF and back.

The tensor names come from the tables of the package ``gguf``. These map many spellings of all model families to one
tensor, so they are ambiguous in the other direction. For that, `loralens.formats.dialects.gguf.architectures` lists the
names that the models of an architecture have in Hugging Face's library.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from loralens.formats.dialects.gguf.architectures import Architecture

_WRAPPERS = (  # prefixes that llama.cpp's converter replaces before it looks names up
    ("model.language_model.", "model."), ("language_model.", ""), ("bert.", ""), ("roberta.", ""), ("", "model."),
)  # fmt: skip
MOST_PARTS = 16  # parts of a name: names in the tables have at most eight, and the search takes time with their square
# A single expert (….experts.3.w1) or one of a stack (….experts.gate_proj[3]).
_EXPERT = re.compile(
    r"^(?P<path>.+\.experts)\.(?P<number>\d{1,9})\.(?P<part>\w+)$|^(?P<stack>.+)\[(?P<item>\d{1,9})\]$"
)
_BLOCK = re.compile(r"^blk\.(\d{1,9})\.(.+)$")
# Mixtral's experts have this path in the tables of gguf for stacks: layers.N.feed_forward.experts.
_MIXTRAL = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.")


class TensorPlace(NamedTuple):
    """The place of a module in a GGUF file: the tensor without ``.weight``, and its number in a stack of experts."""

    tensor: str
    expert: int | None


def place_of(module: str, arch: str) -> TensorPlace | None:
    """The place of a module in a GGUF file; None if the architecture has no tensor for it."""
    match = _EXPERT.match(module)
    if not match:
        tensor = _tensor(module, arch) or _tensor(f"{module}.layer", arch)  # Granite's router in memory
        return None if tensor is None or tensor.endswith("_exps") else TensorPlace(tensor, None)
    path = match["stack"] or f"{match['path']}.{match['part']}"
    tensor = _tensor(path, arch) or _tensor(_MIXTRAL.sub("layers.\\1.feed_forward.experts.", path), arch)
    if tensor is None or not tensor.endswith("_exps"):
        return None
    return TensorPlace(tensor, int(match["number"] or match["item"]))


def _tensor(module: str, arch: str) -> str | None:
    names = _spellings(arch)
    for old, new in (("", ""), *_WRAPPERS):
        if not module.startswith(old):
            continue
        path = (new + module[len(old) :]).split(".")
        if len(path) > MOST_PARTS:
            continue
        # The number of the block may be any numeric part of the path, or the name may have none.
        for i, part in [(0, ""), *enumerate(path)]:
            if part and not part.isdecimal():
                continue
            pattern = ".".join([*path[:i], "{bid}", *path[i + 1 :]] if part else path)
            if pattern in names:
                return names[pattern].replace("{bid}", part)
    return None


@cache
def _spellings(arch: str) -> Mapping[str, str]:
    """Every spelling of a weight's name → the name of its tensor, with ``{bid}`` for the number of the block.

    This reads the tables of the package ``gguf`` directly, because making a `TensorNameMap` changes those of the class.
    """
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap as Tables

    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == arch), None)
    if number is None:
        return {}
    # A family may have spellings of its own, which overrule the common ones.
    own = Tables.arch_block_mappings_cfg.get(number, {})
    names: dict[str, str] = {}
    for table in (Tables.mappings_cfg, {**Tables.block_mappings_cfg, **own}):
        for tensor, spellings in table.items():
            if tensor in MODEL_TENSORS[number]:
                names.update(dict.fromkeys((TENSOR_NAMES[tensor], *spellings), TENSOR_NAMES[tensor]))
    return names


def module_of(tensor: str, arch: Architecture | None, expert: int | None = None) -> str | None:
    """The Hugging Face name of a tensor; None if its architecture has none or several."""
    if arch is None:
        return None
    block = _BLOCK.match(tensor)
    pattern = _modules(arch).get(f"blk.{{bid}}.{block[2]}" if block else tensor)
    # A stack needs the number of an expert, and any other tensor must not have one.
    if pattern is None or ("{e}" in pattern) != (expert is not None):
        return None
    return pattern.format(bid=block[1] if block else "", e=expert)


def listed_name(module: str, arch: Architecture) -> str | None:
    """The name that an architecture lists for a module of any spelling; None if it lists none."""
    place = place_of(module, arch.name)
    return None if place is None else module_of(place.tensor, arch, place.expert)


def norm_of(tensor: str, arch: Architecture) -> str | None:
    """The Hugging Face name of a norm or another tensor without a matrix product; None if its family lists none."""
    block = _BLOCK.match(tensor)
    pattern = _norms(arch).get(f"blk.{{bid}}.{block[2]}" if block else tensor)
    return None if pattern is None else pattern.format(bid=block[1] if block else "")


@cache
def _modules(arch: Architecture) -> Mapping[str, str]:
    """Tensor names → patterns of the only module names that an architecture lists for them."""
    return _by_tensor(arch, [*arch.outside, *(arch.block + kind for kind in arch.kinds)])


@cache
def _norms(arch: Architecture) -> Mapping[str, str]:
    """Tensor names → patterns of the names of norms."""
    return _by_tensor(arch, [*arch.outside_norms, *(arch.block + norm for norm in arch.norms)])


def _by_tensor(arch: Architecture, patterns: list[str]) -> Mapping[str, str]:
    """Tensor names → the only pattern of a name with this tensor; tensors that several patterns have are left out."""
    names: dict[str, list[str]] = {}
    for pattern in patterns:
        spot = place_of(pattern.format(bid=0, e=0), arch.name)
        if spot:
            names.setdefault(spot.tensor.replace("blk.0.", "blk.{bid}."), []).append(pattern)
    return {tensor: found[0] for tensor, found in names.items() if len(found) == 1}
