"""Reading Apple's mlx-lm: ``adapters.safetensors`` beside ``adapter_config.json``.

===========  ==========================================  ===================================================
kind         stored                                      here
===========  ==========================================  ===================================================
linear       lora_a (in, r), lora_b (r, out)             both transposed
embedding    lora_a (vocab, r), lora_b (r, dim)          both transposed: out = dim, in = vocab
experts      lora_a (E, r, in) or (E·r, in),             one module per expert, ``name[e]``
             lora_b (E, out, r)
DoRA         m (out,) of a linear layer,                 ``magnitude`` (the output axis),
             m (vocab,) of an embedding                  ``magnitude_in``: one number per row of the table
===========  ==========================================  ===================================================

The scale is ``lora_parameters.scale`` itself and not α/r. The file of the weights does not contain it, so without a
configuration the scale is unknown. mlx-lm ignores an ``alpha`` beside it, which was among its defaults until April 2025
(mlx-lm pull request 65).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import frexp
from typing import Any

import ml_dtypes
import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.names import block
from loralens.core.structured import Update
from loralens.core.together import NORMS
from loralens.errors import LEAVE_OUT, FormatError, ShapeError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.conversion_record import carried_fields, valid_fields
from loralens.formats.dialects.pairs import (
    SAVE_AGAIN,
    Fields,
    Leaf,
    Modules,
    Parts,
    Stacks,
    check_all_dora,
    group_by_pair,
    is_as_read,
    is_embedding_name,
    magnitude_findings,
    match_leaf,
    missing_magnitudes,
    most_common,
    scale_tensor,
    stack_factors,
    translate_extras,
)
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import finite_number, plain_text

NAME = "mlx"
DORA = {"linear": "norms", "embedding": "norms_in"}  # in mlx-lm there is one length for each row of the stored weight

_HALF = re.compile(r"^(?P<name>.+)\.lora_(?P<part>[ab])$")
# Keys of full fine-tuning: weights of any module, also quantised ones, and nothing of LoRA.
_PLAIN = re.compile(r"^(?!.*lora).+\.(weight|bias|scales|biases)$")


def mlx_leaf(key: str) -> Leaf | None:
    """The module and the half that a key names; None for any other key."""
    return match_leaf(key, _HALF)


def detect(stored: Stored) -> bool:
    """Whether a file is mlx-lm's: it has ``lora_a`` and ``lora_b`` in its orientation, or beside its configuration.

    Full weights beside a configuration of full fine-tuning are mlx-lm's too; they are refused when they are read.
    """
    # torchtune's halves end in `.weight` and are not leaves here.
    groups, _ = pairs.group(stored.tensors, mlx_leaf)
    if not groups:
        full = (stored.config or {}).get("fine_tune_type") == "full"
        return full and bool(stored.tensors) and all(_PLAIN.match(key) for key in stored.tensors)
    if any(name.endswith(".weight") for name in groups):  # the names of llama.cpp
        return False
    return is_mlx_config(stored.config) or all(_fits(parts) for parts in groups.values())


def is_mlx_config(config: Fields | None) -> bool:
    """Whether a configuration is mlx-lm's."""
    return config is not None and ("fine_tune_type" in config or "lora_parameters" in config)


def lora_parameters(config: Fields | None) -> Fields:
    """The ``lora_parameters`` of a configuration; empty if it has none."""
    section = (config or {}).get("lora_parameters")
    return section if isinstance(section, dict) else {}


def stated_scale(config: Fields | None) -> float | None:
    """The scale in a configuration; None if it has none.

    Raises
    ------
    FormatError
        It is not a finite number.
    """
    scale = lora_parameters(config).get("scale")
    if scale is None:
        return None
    if finite_number(scale) is None:
        raise FormatError("lora_parameters.scale is not a finite number", fix="correct it in adapter_config.json")
    return float(scale)


def read(stored: Stored) -> Adapter:
    """The adapter of an mlx-lm file.

    Raises
    ------
    FormatError, ShapeError
        The file is of full fine-tuning, one half of a pair is missing, factors do not fit together, or the scale is not
        a number.
    """
    groups, unpaired = pairs.group(stored.tensors, mlx_leaf)
    if not groups:
        what = "fine_tune_type full: the file holds whole weights, not a LoRA"
        raise FormatError(what, fix="loralens reads LoRA and DoRA adapters: lora_a and lora_b matrices")
    scale = stated_scale(stored.config)
    # An unknown scale counts as 1 in ΔW, and every result says that it is unknown.
    scaling = Scaling("unknown") if scale is None else Scaling("given", origin="lora_parameters.scale")
    unscaled = pairs.unfold(groups, lambda name, parts: _modules(name, parts, unpaired.get(f"{name}.m")))
    modules = {name: module.rescaled(1.0 if scale is None else scale, scaling) for name, module in unscaled.items()}
    extra = {key: _extra(key, tensor, modules) for key, tensor in unpaired.items()}
    # Without this field the file is a plain LoRA, and has no magnitudes that could be missing.
    if (stored.config or {}).get("fine_tune_type") == "dora":
        extra |= missing_magnitudes(modules, extra, DORA, "{}.m")
    findings = _findings(stored.config, scale, modules) + magnitude_findings(extra, software="mlx-lm")
    base_model = plain_text((stored.config or {}).get("model"))
    adapter = pairs.make_adapter(stored, NAME, modules, extra, findings, base_model=base_model)
    return replace(adapter, peft_fields=valid_fields({"lora_dropout": lora_parameters(stored.config).get("dropout")}))


def _fits(parts: Parts) -> bool:
    """Whether a pair can have mlx-lm's orientation; true for a half without the other."""
    if not {"A", "B"} <= set(parts):
        return True
    a, b = parts["A"][1].shape, parts["B"][1].shape
    # mlx-lm has had two layouts of lora_a for a stack: with an axis of experts, and with their rows in sequence.
    if len(b) == 3:
        return a[:2] == (b[0], b[2]) if len(a) == 3 else len(a) == 2 and a[0] == b[0] * b[2]
    return len(a) == len(b) == 2 and a[1] == b[0]


def _modules(name: str, parts: Parts, m: LazyArray | None) -> Iterator[tuple[str, LowRank]]:
    """The modules that one stored pair holds, without their scale: one module, or the experts of a stack."""
    b, a = pairs.tensors_of(parts, "B", "A")
    if not _fits(parts) or not a.size or not b.size:
        raise ShapeError(f"lora_a {a.shape} and lora_b {b.shape} do not multiply as mlx-lm has them", fix=SAVE_AGAIN)
    origin = pairs.origin_of(NAME, parts)
    # A pair of matrices is one module; three axes are a stack.
    if b.ndim == 2:
        yield name, LowRank(b.T, a.T, layout=Layout(_kind(name, (b.shape[1], a.shape[0]), m)), origin=origin)
        return
    count, _, rank = b.shape
    yield from pairs.experts(name, b, a.reshape(count, rank, a.shape[-1]), scaling=Scaling(), origin=origin)


def _kind(name: str, shape: tuple[int, int], m: LazyArray | None) -> str:
    """``embedding`` or ``linear``: by the size of a DoRA magnitude if that is conclusive, else by the name."""
    out, in_ = shape
    # The size of a magnitude tells the axis only if both axes differ.
    if m is not None and out != in_ and m.size in shape:
        return "embedding" if m.size == in_ else "linear"
    return "embedding" if is_embedding_name(name) else "linear"


def _extra(key: str, tensor: LazyArray, modules: Modules) -> Extra:
    """A DoRA magnitude, or a tensor without a known role."""
    name, _, last = key.rpartition(".")
    if last != "m" or name not in modules:
        return Extra("other", name, tensor)
    (out, in_), kind = modules[name].shape, modules[name].layout.kind
    # mlx-lm normalises the rows of the stored weight, and an embedding stores its vocabulary as rows.
    role, size = ("magnitude_in", in_) if kind == "embedding" else ("magnitude", out)
    if tensor.shape != (size,):
        raise ShapeError(f"{key} {tensor.shape} is not one number for each of {size} rows", fix=SAVE_AGAIN)
    return Extra(role, name, tensor)


def _findings(config: Fields | None, scale: float | None, modules: Modules) -> list[Finding]:
    section, ranks = lora_parameters(config), sorted({module.rank for module in modules.values()})
    findings = []
    if scale is None:
        without_scale = "lora_parameters in adapter_config.json holds no scale"
        reason = without_scale if is_mlx_config(config) else "the file stands alone"
        text = f"{reason}, so the scale is unknown and taken as 1 (mlx-lm's default is 20, and α plays no part)"
        fix = "put the adapter_config.json of the training beside the file, or give --scale"
        findings.append(Finding("warning", "alpha-unknown", text, fix))
    # mlx-lm makes its layers by this rank, and then cannot load the tensors.
    if "rank" in section and ranks != [section["rank"]]:
        stated, actual = ascii(section["rank"])[:20], ", ".join(map(str, ranks))
        text = f"lora_parameters says rank {stated} and the file holds {actual}"
        findings.append(Finding("warning", "rank-disagrees", text, "mlx-lm cannot load it: correct lora_parameters"))
    if "alpha" in section and scale is not None and "fine_tune_type" not in (config or {}):
        text = f"lora_parameters has an alpha beside the scale {scale:g}: versions of early 2024 multiplied by α/r too"
        fix = "if one of these versions trained the adapter, write scale · α/r as the scale into adapter_config.json"
        findings.append(Finding("warning", "alpha-beside-scale", text, fix))
    return findings


# the kinds of weights that mlx-lm can adapt
KINDS = ("linear", "embedding", "experts", "merged")
# dtypes whose range of exponents is large enough for a power of two to be multiplied in exactly; float16's is not.
_WIDE = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
# kind of layout → the role of a magnitude along the rows of the stored weight
_MAGNITUDES = {"linear": "magnitude", "merged": "magnitude", "embedding": "magnitude_in"}


def write(adapter: Adapter) -> Stored:
    """The adapter as mlx-lm stores it, whose experts `loralens.formats.dialects.expert_layouts` has already renamed.

    Raises
    ------
    FormatError
        mlx-lm does not adapt a kind of weight, or cannot hold an extra, or only some modules are DoRA.
    ShapeError, MismatchError
        Modules have several ranks, experts are missing, or an update is not a pair.
    """
    stacks = group_by_pair(adapter)
    # The scale is one for the whole file, so it is chosen before any module is written.
    config, scale = _config(adapter, stacks)
    tensors: dict[str, LazyArray] = {}
    for name, modules in stacks.items():
        with place(name):
            tensors.update(_tensors(name, modules, scale))
    tensors.update(_extras(adapter))
    if adapter.format == NAME:
        return Stored(tensors, adapter.metadata, config)
    return Stored(dict(sorted(tensors.items())), {"format": "mlx"}, config)


def _tensors(name: str, modules: Modules, scale: float) -> Mapping[str, LazyArray]:
    first = next(iter(modules.values()))
    own, *others = {module.scale for module in modules.values()}
    # All experts are in one tensor, which has one scale.
    if others:
        raise ShapeError("the experts of this stack differ in scale, but mlx-lm holds one", fix="give them one scale")
    ratio = 1.0 if own == scale else own / scale  # both may be 0
    if is_as_read(modules.values(), NAME) and ratio == 1:
        assert first.origin
        return first.origin.tensors
    if first.layout.kind not in KINDS:
        raise FormatError(f"mlx-lm has no LoRA for a {first.layout.kind} weight", fix=LEAVE_OUT)
    if first.layout.kind == "experts":
        b, a = stack_factors(modules, "mlx-lm")
    else:
        b, a = (factor.T for factor in first.factors)
    if ratio != 1:
        # In the dtype of b if that is exact, so for a power of two, whose mantissa is 0.5; otherwise rounded once.
        exact = abs(frexp(ratio)[0]) == 0.5 and b.dtype in _WIDE
        b = scale_tensor(b, ratio, dtype=b.dtype if exact else np.dtype(np.float32))
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


def _extras(adapter: Adapter) -> dict[str, LazyArray]:
    """The extras: unchanged in mlx-lm's own dialect; from other dialects, DoRA magnitudes as ``m``."""
    if adapter.format == NAME:
        return {key: extra.tensor for key, extra in adapter.extra.items() if extra.role not in NORMS}

    def translate(extra: Extra, module: Update, rows: int) -> tuple[str, LazyArray]:
        # A convolution, for example, has no DoRA in mlx-lm.
        if _MAGNITUDES.get(module.layout.kind) != extra.role:
            what = "mlx-lm keeps a DoRA magnitude for each row of a stored weight, but this one has another axis"
            raise FormatError(what, fix="convert with --drop-extra to leave it out")
        return f"{extra.module}.m", extra.tensor.reshape(rows)

    tensors = translate_extras(adapter, set(_MAGNITUDES.values()), "mlx-lm", translate)
    # mlx-lm makes either LoRA or DoRA layers, by one field of the configuration.
    check_all_dora(adapter, "mlx-lm")
    return tensors


def _config(adapter: Adapter, stacks: Stacks) -> tuple[Fields | None, float]:
    """The configuration and its scale: the old one if it still describes the adapter, otherwise a new one.

    If the scale was unknown, the new configuration has none, and it stays unknown.
    """
    old = adapter.config if adapter.format == NAME else None
    modules = adapter.modules.values()
    stated = stated_scale(old)
    unsaid = adapter.format == NAME and stated is None
    unsaid = unsaid and all(m.scaling.formula == "unknown" and m.scale == 1 for m in modules)
    untouched = all(is_as_read(stack.values(), NAME) for stack in stacks.values())
    # Nothing that the old configuration says has changed.
    if untouched and unsaid:
        return old, 1.0
    if untouched and stated is not None and all(module.scale == stated for module in modules):
        return old, stated
    ranks = {module.rank for module in modules}
    if len(ranks) > 1:
        what = f"mlx-lm has one rank for all modules, and these have {', '.join(map(str, sorted(ranks)))}"
        raise ShapeError(what, fix="give them one rank: loralens compress --uniform")
    rank = max(ranks, default=8)  # mlx-lm's default, if there are no modules
    if unsaid:
        if old is not None and "rank" in lora_parameters(old):
            old = {**old, "lora_parameters": {**lora_parameters(old), "rank": rank}}
        return old, 1.0
    # A scale other than 0, because the other scales are divided by it.
    scale = most_common((module.scale for module in modules if module.scale), 1.0)
    # Other fields, such as the number of layers, are kept.
    base = dict(old) if old is not None and is_mlx_config(old) else _new_config(adapter, stacks)
    base["lora_parameters"] = {**lora_parameters(base), "rank": rank, "scale": scale}
    return base, scale


def _new_config(adapter: Adapter, stacks: Stacks) -> dict[str, Any]:
    """A configuration with which mlx-lm makes these modules.

    It may make more modules by the same keys. Their lora_b stays 0, so they change nothing.
    """
    dora = any(extra.role in _MAGNITUDES.values() for extra in adapter.extra.values())
    dropout = carried_fields(adapter).get("lora_dropout", 0.0)
    # A module's path within its block, or its full path outside of blocks.
    keys = {
        name.removeprefix(f"{position.stack}.{position.number}.") if (position := block(name)) else name
        for name in stacks
    }
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"rank": 8, "scale": 1.0, "dropout": dropout, "keys": sorted(keys)},
        "model": adapter.base_model,
        "num_layers": -1,  # all
    }
