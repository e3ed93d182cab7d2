"""Names of modules in transformers 5, for models whose checkpoints use other names.

An adapter that was extracted from checkpoints has the names of their files. PEFT looks for the names of the modules in
memory, and it silently leaves out what it does not find. PEFT joins single experts by itself only in the families of
Mixtral and Qwen2-MoE. The names are those of ``conversion_mapping.py`` in transformers 5.24.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.matching import EXPERT_PARTS
from loralens.core.structured import Update
from loralens.formats.dialects.gguf import EXPERTS

Rules = tuple[tuple[str, str], ...]


def _rules(text: str) -> Rules:
    """Lines of a regular expression and its replacement; later ones see the names that earlier ones made."""
    return tuple((old, new) for old, new in map(str.split, text.strip().splitlines()))


_VIT = _rules(r"""
    (^|\.)encoder\.layer\.(\d+)\.        \1layers.\2.
    \.attention\.attention\.query$      .attention.q_proj
    \.attention\.attention\.key$        .attention.k_proj
    \.attention\.attention\.value$      .attention.v_proj
    \.attention\.output\.dense$         .attention.o_proj
    \.intermediate\.dense$              .mlp.fc1
    \.output\.dense$                    .mlp.fc2
""")
_DINO: Rules = (*_VIT[1:5], (r"\.mlp\.weights_out$", ".mlp.down_proj"))
_LLAVA = _rules(r"""
    ^language_model\.lm_head$                      lm_head
    ^language_model\.model\.                       model.language_model.
    ^(vision_tower|multi_modal_projector)\.        model.\1.
""")
_QWEN_VL = _rules(r"""
    ^model\.(?!language_model\.|visual\.)          model.language_model.
    ^visual\.                                      model.visual.
""")
_PHIMOE = _rules(r"""
    \.block_sparse_moe\.gate$                      .mlp.router
    \.block_sparse_moe\.                           .mlp.
""")
_GRANITE = _rules(r"""
    \.block_sparse_moe\.input_linear(\[|$)         .block_sparse_moe.experts.gate_up_proj\1
    \.block_sparse_moe\.output_linear(\[|$)        .block_sparse_moe.experts.down_proj\1
    \.block_sparse_moe\.router\.layer$             .block_sparse_moe.router
""")
_IN_MEMORY = {
    "vit deit beit vit_mae vit_msn ijepa vivit audio-spectrogram-transformer": _VIT,
    "dinov2 dinov2_with_registers": _DINO,
    "llava aya_vision gemma3 got_ocr2 internvl mistral3 paligemma vipllava": _LLAVA,
    "qwen2_vl qwen2_5_vl": _QWEN_VL,
    "phimoe": _PHIMOE,
    "granitemoe granitemoeshared granitemoehybrid": _GRANITE,
}
# model type → its rules
IN_MEMORY = {kind: rules for kinds, rules in _IN_MEMORY.items() for kind in kinds.split()}
JOINED = ("phimoe", "jamba", "lfm2_moe")  # model types with single experts in files that PEFT does not join
# a single expert of a checkpoint: ….experts.3.w1
_SINGLE = re.compile(r"^(?P<stack>.+\.experts)\.(?P<number>\d{1,9})\.(?P<part>\w+)$")
_SWIGLU = ".mlp.weights_in"


def use_memory_names(adapter: Adapter, config: Mapping[str, Any] | None) -> Adapter:
    """Rename the modules of an adapter from the names in checkpoints to those in the memory of transformers 5.

    Parameters
    ----------
    adapter : Adapter
    config : mapping or None
        The content of the model's config.json, which has the model type.
    """
    kind = str((config or {}).get("model_type"))
    rules = IN_MEMORY.get(kind, ())
    # Only names that differ, so that an adapter without any is returned as it is.
    new = {name: other for name in adapter if (other := _apply_rules(name, rules)) != name}
    if new:
        adapter = adapter.renamed(new)
    saved = (adapter.config or {}).get("modules_to_save")
    if isinstance(saved, list):
        names = [_apply_rules(str(name), rules) for name in saved]
        adapter = replace(adapter, config={**(adapter.config or {}), "modules_to_save": names})
    adapter = replace(adapter, extra=_rename_extras(adapter.extra, rules))
    # This comes after renaming, because the stacks have their names in memory.
    if kind in JOINED:
        count = next((n for n in map((config or {}).get, EXPERTS) if type(n) is int), 0)
        adapter = replace(adapter, modules=_join_experts(adapter.modules, count))
    if rules is _DINO:
        adapter = replace(adapter, modules=dict(_split_swiglu(adapter.modules)))
    return adapter


def _rename_extras(extras: Mapping[str, Extra], rules: Rules) -> dict[str, Extra]:
    """Extras with the names of memory in their keys."""
    renamed: dict[str, Extra] = {}
    for key, extra in extras.items():
        name = _apply_rules(extra.module, rules)
        renamed[key.replace(extra.module, name) if extra.module else key] = replace(extra, module=name)
    return renamed


def _apply_rules(name: str, rules: Rules) -> str:
    for expression, new in rules:
        name = re.sub(expression, new, name)
    return name


def _split_swiglu(modules: Mapping[str, Update]) -> Iterable[tuple[str, Update]]:
    """Split the stored matrix ``weights_in`` of DINOv2 with SwiGLU into two modules, which share A."""
    for name, module in modules.items():
        if not name.endswith(_SWIGLU):
            yield name, module
            continue
        B, A = module.factors
        # The gate comes first in weights_in.
        size = B.shape[0] // 2
        for start, part in ((0, "gate_proj"), (size, "up_proj")):
            half = LowRank(B.rows(start, start + size), A, module.scale, scaling=module.scaling)
            yield name.removesuffix("weights_in") + part, half


def _join_experts(modules: Mapping[str, Update], count: int) -> dict[str, Update]:
    """Join single experts to the stacks in memory, with gate above up; a missing expert gets an update of 0."""
    stacks: dict[str, dict[int, dict[str, Update]]] = {}
    joined: dict[str, Update] = {}
    for name, module in modules.items():
        single = _SINGLE.match(name)
        if not single:
            joined[name] = module
            continue
        # Mixtral's w1, w2 and w3 have other names in the stacks.
        part = EXPERT_PARTS.get(single["part"], single["part"])
        # transformers 5 holds gate and up of all experts in one parameter.
        joint = "down_proj" if part == "down_proj" else "gate_up_proj"
        stacks.setdefault(f"{single['stack']}.{joint}", {}).setdefault(int(single["number"]), {})[part] = module
    for stack, experts in stacks.items():
        parts = ("down_proj",) if stack.endswith("down_proj") else ("gate_proj", "up_proj")
        shape = next(module.shape for parts_of_expert in experts.values() for module in parts_of_expert.values())
        # All experts of a stack need the same rank: that of the expert whose joined pairs have the most columns.
        rank = max(sum(module.rank for module in parts_of_expert.values()) for parts_of_expert in experts.values())
        for e in range(max(count, max(experts) + 1)):
            joined[f"{stack}[{e}]"] = _stack_pairs(experts.get(e, {}), parts, shape, rank)
    return joined


def _stack_pairs(updates: Mapping[str, Update], parts: tuple[str, ...], shape: tuple[int, int], rank: int) -> LowRank:
    """Join pairs whose updates are stacked by rows: B is block-diagonal with the scales in it, A is stacked."""
    out, in_ = shape
    present = [(i * out, updates[part]) for i, part in enumerate(parts) if part in updates]
    # The first column of B, and row of A, of each pair.
    starts = list(accumulate((module.rank for _, module in present), initial=0))
    shape_B, shape_A = (len(parts) * out, rank), (rank, in_)

    def B() -> Array:
        stacked = np.zeros(shape_B, np.float32)
        for (row, module), column in zip(present, starts, strict=False):
            block = module.scale * module.B.astype(np.float64)
            stacked[row : row + out, column : column + module.rank] = block
        return stacked

    def A() -> Array:
        stacked = np.zeros(shape_A, np.float32)
        for (_, module), row in zip(present, starts, strict=False):
            stacked[row : row + module.rank] = module.A
        return stacked

    lazy_B, lazy_A = (LazyArray(read, shape=s, dtype=np.float32) for read, s in ((B, shape_B), (A, shape_A)))
    return LowRank(lazy_B, lazy_A, layout=Layout("experts"))
