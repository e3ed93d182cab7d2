"""Files of torchtune: a pickle of ``<module>.lora_a.weight`` and ``.lora_b.weight`` under its own module names.

=========  ==============================================================  ===============================
kind       stored                                                          here
=========  ==============================================================  ===============================
linear     lora_a.weight (r, in), lora_b.weight (out, r)                   the same
DoRA       magnitude (out,)                                                ``magnitude``
experts    lora_gate_a (E, in, r), lora_gate_b (E, r, out); up, down too   both transposed, ``gate_proj[e]``
=========  ==============================================================  ===============================

α is in torchtune's recipe and not in the file. In most of torchtune's models the rows of q_proj and k_proj have another
order than in the model of Hugging Face: the two rows of a rotary pair are neighbours. If that model is the base, they
are put into its order, and the modules get its names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lowrank import LowRank
from loralens.core.model_in_memory import ModelPath
from loralens.core.structured import Update
from loralens.errors import FormatError, ShapeError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.gguf_architectures import Heads, heads_in, unpermute
from loralens.formats.dialects.hugging_face_names import TORCHTUNE, target_of
from loralens.formats.dialects.pairs import (
    SAVE_AGAIN,
    Leaf,
    Parts,
    alpha_unknown,
    config_scaling,
    match_leaf,
    origin_of,
)
from loralens.formats.files.container import Stored

NAME = "torchtune"

_HALF = re.compile(r"^(?P<name>.+)\.lora_(?P<part>[ab])\.weight$")
# torchtune's GroupedExperts, whose tensors have no `.weight`
_EXPERTS = re.compile(r"^(?P<name>.+)\.lora_(?P<which>gate|up|down)_(?P<half>[ab])$")
# q and k of torchtune's own models
_ROTARY = re.compile(r"(^|\.)layers\.[0-9]+\.attn\.(?P<part>[qk])_proj$")


def torchtune_leaf(key: str) -> Leaf | None:
    """The module and the half that a key names; ``A3`` and ``B3`` are halves of a stack; None for any other key."""
    stack = _EXPERTS.match(key)
    if stack:
        return Leaf(f"{stack['name']}.{stack['which']}_proj", f"{stack['half'].upper()}3")
    return match_leaf(key, _HALF)


def detect(stored: Stored) -> bool:
    """Whether a file has keys of torchtune: halves in lower case with ``.weight``, or those of its expert stacks."""
    return any(torchtune_leaf(key) for key in stored.tensors)


def read(stored: Stored, base: ModelPath | None = None) -> Adapter:
    """The adapter of a torchtune file, with the names and the order of rows of a base of Hugging Face.

    Raises
    ------
    FormatError, ShapeError, MismatchError
        One half of a pair is missing, factors do not fit together, or modules have no name in the base.
    """
    groups, unpaired = pairs.group(stored.tensors, torchtune_leaf)
    modules = pairs.unfold(groups, lambda name, parts: _modules(name, parts, stored.config))
    extra = {}
    for key, tensor in unpaired.items():
        name, _, last = key.rpartition(".")
        # Its size is checked here, because any other tensor of this name is only carried along.
        is_magnitude = last == "magnitude" and name in modules and tensor.size == modules[name].shape[0]
        extra[key] = Extra("magnitude" if is_magnitude else "other", name, tensor)
    target = target_of(TORCHTUNE, groups, base)
    if target is None:
        return pairs.make_adapter(stored, NAME, modules, extra, _findings(modules))
    if target.permuted:
        modules = {name: _turned(name, module, target.heads) for name, module in modules.items()}
        extra = {key: _turned_magnitude(each, target.heads) for key, each in extra.items()}
    renamed = pairs.make_adapter(stored, NAME, modules, extra, []).renamed(target.names)
    return replace(renamed, findings=tuple(_findings(renamed.modules)))


def _turned(name: str, module: Update, heads: Heads) -> Update:
    """The module with the rows of q or k in Hugging Face's order; any other module is unchanged."""
    part = _ROTARY.search(name)
    if part is None:
        return module
    B, A = module.factors
    with place(name):
        count = heads_in(part["part"], heads, B.shape[0])
    turned = B.map(lambda rows: unpermute(rows, count), shape=B.shape)
    return LowRank(turned, A, module.scale, scaling=module.scaling, layout=module.layout)


def _turned_magnitude(extra: Extra, heads: Heads) -> Extra:
    """The magnitude of q or k, which has one number for each row, in the same order as the rows."""
    part = _ROTARY.search(extra.module)
    if part is None or extra.role != "magnitude":
        return extra
    count = heads_in(part["part"], heads, extra.tensor.size)
    return replace(extra, tensor=extra.tensor.map(lambda rows: unpermute(rows, count), shape=extra.tensor.shape))


def _modules(name: str, parts: Parts, config: Mapping[str, Any] | None) -> Iterator[tuple[str, LowRank]]:
    if {"A", "B"} & set(parts):
        # They would be the same module twice.
        if {"A3", "B3"} & set(parts):
            raise FormatError("a linear pair and a stack of experts have one name", fix=SAVE_AGAIN)
        yield name, pairs.read_pair(parts, NAME, lambda _, rank: config_scaling(config, rank, r="r"), conv=False)
        return
    b, a = pairs.tensors_of(parts, "B3", "A3")
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or not a.size or not b.size:
        raise ShapeError(f"lora_a {a.shape} and lora_b {b.shape} are not a stack of experts", fix=SAVE_AGAIN)
    origin, scaling = origin_of(NAME, parts, ("A3", "B3")), config_scaling(config, a.shape[2], r="r")
    yield from pairs.experts(name, b, a, scaling=scaling, origin=origin, turned=True)


def _findings(modules: Mapping[str, Update]) -> list[Finding]:
    findings = []
    if any(module.scaling.formula == "unknown" for module in modules.values()):
        findings.append(alpha_unknown("torchtune"))
    rotary = [name for name in modules if _ROTARY.search(name)]
    # The update is right for torchtune's own weights, so this is a note and not an error.
    if rotary:
        text = f"{rotary[0]} and {len(rotary) - 1} more have their rows in torchtune's order, not in Hugging Face's"
        fix = "for a model of Hugging Face, give it with --base"
        findings.append(Finding("note", "rotary-rows", text, fix))
    return findings
