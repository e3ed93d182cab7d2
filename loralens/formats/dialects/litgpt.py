"""Reading LitGPT: ``lit_model.pth.lora``, a pickle of ``<module>.lora_A`` and ``.lora_B`` under its own module names.

Query, key and value are one weight with the rows [q; k; v], and any of the three may be adapted. Then A (k·r, in) holds
k blocks of r rows, and B holds the rows of the adapted parts one after the other. The parts have different numbers of
rows if heads share keys and values::

    attn.qkv    rows in the order q, k, v
    attn.attn   LitGPT before 0.5: if not all three are adapted, rows go to q, k, v of each group of heads in turn

Which parts are adapted, and how many rows they have, is in LitGPT's recipe (hyperparameters.yaml, model_config.yaml)
and not in the file. An ``adapter_config.json`` beside the file may have it under LitGPT's names: lora_query, lora_key,
lora_value (or ``enable_lora``), n_head, n_query_groups, head_size. It may also have lora_alpha.

A base of Hugging Face states the numbers of heads. Its modules have other names, and q, k and v are three of them.
"""

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.model_in_memory import ModelPath
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects import pairs
from loralens.formats.dialects.hugging_face_names import LITGPT, OTHER_BASE, Target, target_of
from loralens.formats.dialects.loralib import are_litgpt_names, enabled_slices, loralib_leaf
from loralens.formats.dialects.pairs import SAVE_AGAIN, Fields, Parts, alpha_unknown, config_scaling
from loralens.formats.files.container import Stored

NAME = "litgpt"
# LitGPT's own names, in the order of the rows.
_FLAGS = ("lora_query", "lora_key", "lora_value")
_SAY = (
    'put an adapter_config.json beside the file: {"lora_query": true, "lora_key": false, "lora_value": true, '
    '"n_head": …, "n_query_groups": …, "head_size": …}'
)


def detect(stored: Stored) -> bool:
    """Whether a file is LitGPT's: loralib's leaves under LitGPT's module names."""
    return are_litgpt_names(found.name for found in map(loralib_leaf, stored.tensors) if found)


def read(stored: Stored, base: ModelPath | None = None) -> Adapter:
    """The adapter of a LitGPT file, with the names and the division of a base of Hugging Face.

    Raises
    ------
    FormatError, ShapeError, MismatchError
        One half of a pair is missing, factors do not fit together, the adapted parts of a fused weight are unknown, or
        modules have no name in the base.
    """
    groups, unpaired = pairs.group(stored.tensors, loralib_leaf)
    target = target_of(LITGPT, groups, base)
    config = _flags(stored)
    if target:
        heads = {"n_head": target.heads.q, "n_query_groups": target.heads.kv, "head_size": target.head_size}
        config |= heads
    modules = pairs.unfold(groups, lambda name, parts: _modules(name, parts, config, groups, target))
    # One finding for the file, because all its modules have the same source of α.
    unknown = any(module.scaling.formula == "unknown" for module in modules.values())
    findings = [alpha_unknown("LitGPT")] if unknown else []
    return pairs.make_adapter(stored, NAME, modules, pairs.unpaired_extras(unpaired), findings)


def _flags(stored: Stored) -> dict[str, Any]:
    """The fields of the configuration or the pickle, with ``enable_lora`` as a list of three flags, or None."""
    fields = {**stored.plain, **(stored.config or {})}
    enabled, _ = enabled_slices(stored)
    if enabled is None and any(flag in fields for flag in _FLAGS):
        enabled = [fields.get(flag, False) is True for flag in _FLAGS]
    if enabled is not None and (len(enabled) != 3 or not any(enabled)):
        raise FormatError("query, key and value need three flags, one at least true", fix=_SAY)
    return {**fields, "enable_lora": enabled}


def _modules(
    name: str, parts: Parts, config: Fields, groups: Mapping[str, Parts], target: Target | None
) -> Iterator[tuple[str, LowRank]]:
    """The module of a pair; of a fused projection, for a ``target``, the modules of its adapted parts."""
    B, A = pairs.factors(parts)
    origin, new = pairs.origin_of(NAME, parts), target.names[name] if target else name
    if not name.endswith((".attn.attn", ".attn.qkv")):
        scaling = config_scaling(config, A.shape[0], r="lora_r")
        yield new, LowRank(B, A, scaling.value, scaling=scaling, origin=origin)
        return
    enabled = _adapted_parts(B, A, config)
    sizes = _sizes(B, A, enabled, config, groups.get(f"{name.rpartition('.')[0]}.proj"), in_base=target is not None)
    in_order = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    # If all three parts are adapted, the rows of B are those of the weight, in their order.
    old, in_blocks = name.endswith(".attn.attn"), all(enabled)
    weight_rows = _interleaved_rows(sizes, config) if old and (target or not in_blocks) else in_order
    B, layout = pairs.unpack_merged(B, A, enabled, in_order if in_blocks else weight_rows)
    rank = A.shape[0] // layout.blocks
    scaling = config_scaling(config, rank, r="lora_r")
    if target is None:
        yield name, LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)
        return
    adapted = [(part, rows) for part, rows, own in zip("qkv", weight_rows, enabled, strict=True) if own]
    for i, (part, rows) in enumerate(adapted):
        # In the old layout with all three, the rows of a part may lie in every block, so it keeps all columns of B.
        start, stop = (0, A.shape[0]) if old and in_blocks else (i * rank, (i + 1) * rank)
        share = B.map(itemgetter((rows, slice(start, stop))), shape=(len(rows), stop - start))
        module = LowRank(share, A.rows(start, stop), scaling.value, scaling=scaling)
        yield new.replace("qkv", part), module


def _adapted_parts(B: LazyArray, A: LazyArray, config: Fields) -> list[bool]:
    """Whether query, key and value are adapted, each."""
    count, over = divmod(A.shape[0], B.shape[1])
    if over or not 1 <= count <= 3:
        raise ShapeError(f"lora_A {A.shape} is not one to three blocks of rank {B.shape[1]}", fix=SAVE_AGAIN)
    # Three blocks leave no choice; of one or two only a configuration tells which they are.
    enabled = config["enable_lora"] or [True] * (3 if count == 3 else 0)
    if not enabled:
        raise FormatError(f"{count} of query, key and value are adapted, and the file does not say which", fix=_SAY)
    if sum(enabled) != count:
        raise ShapeError(f"{sum(enabled)} parts are said to be adapted, but lora_A has {count} blocks", fix=_SAY)
    return list(enabled)


def _sizes(
    B: LazyArray, A: LazyArray, enabled: list[bool], config: Fields, proj: Parts | None, *, in_base: bool
) -> tuple[int, int, int]:
    """The numbers of rows of query, key and value in the base weight; ``in_base``: the base states its heads."""
    heads, height = _count(config, "n_head"), B.shape[0]
    if heads:
        size = _count(config, "head_size") or A.shape[1] // heads
        query, other = size * heads, size * (_count(config, "n_query_groups") or heads)
    elif all(enabled) and proj and "A" in proj and proj["A"][1].ndim == 2:
        query = proj["A"][1].shape[1]  # the inputs of the output projection are the outputs of the query's heads
        # Key and value have the same number of rows.
        other = (height - query) // 2
    else:
        raise FormatError("the file does not state the numbers of rows of query, key and value", fix=_SAY)
    adapted = sum(n for n, on in zip((query, other, other), enabled, strict=True) if on)
    if adapted != height or query < 1 or other < 1:
        what = f"lora_B has {height} rows, and query, key and value of {query}, {other}, {other} rows give {adapted}"
        raise ShapeError(what, fix=OTHER_BASE if in_base else _SAY)
    return query, other, other


def _count(config: Fields, name: str) -> int | None:
    value = config.get(name)
    if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
        raise FormatError(f"{name} is not a number of heads or rows", fix="correct adapter_config.json")
    return value


def _interleaved_rows(sizes: tuple[int, int, int], config: Fields) -> list[Array]:
    """The row numbers of query, key and value if each group of heads has its own rows of all three."""
    groups = _count(config, "n_query_groups") or _count(config, "n_head")
    # Without n_query_groups every head is a group of its own.
    if groups is None or sizes[0] % groups or sizes[1] % groups:
        raise FormatError(
            "this old layout stores rows group by group, and the file does not state the number of groups", fix=_SAY
        )
    heights = [size // groups for size in sizes]
    table = np.arange(sum(sizes)).reshape(groups, sum(heights))
    return [part.reshape(-1) for part in np.split(table, np.cumsum(heights)[:-1], axis=1)]
