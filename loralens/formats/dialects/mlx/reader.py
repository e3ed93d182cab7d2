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
from typing import Any

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.structured import Update
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects import dora, pairs
from loralens.formats.dialects.pairs import SAVE_AGAIN, Leaf, Parts, is_embedding_name, match_leaf
from loralens.formats.dialects.peft.fields import valid_fields
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


def is_mlx_config(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration is mlx-lm's."""
    return config is not None and ("fine_tune_type" in config or "lora_parameters" in config)


def lora_parameters(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The ``lora_parameters`` of a configuration; empty if it has none."""
    section = (config or {}).get("lora_parameters")
    return section if isinstance(section, dict) else {}


def stated_scale(config: Mapping[str, Any] | None) -> float | None:
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
        extra |= dora.missing_magnitudes(modules, extra, DORA, lambda name: f"{name}.m")
    findings = _findings(stored.config, scale, modules) + dora.magnitude_findings(extra, software="mlx-lm")
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
    count, out, rank = b.shape
    # All experts came from the same two tensors, which are written again if all are unchanged.
    shared = replace(origin, share=count)
    for e in range(count):
        B = b.rows(e, e + 1).reshape(out, rank)
        A = a.rows(e * rank, (e + 1) * rank) if a.ndim == 2 else a.rows(e, e + 1).reshape(rank, a.shape[2])
        yield f"{name}[{e}]", LowRank(B, A, layout=Layout("experts"), origin=shared)


def _kind(name: str, shape: tuple[int, int], m: LazyArray | None) -> str:
    """``embedding`` or ``linear``: by the size of a DoRA magnitude if that is conclusive, else by the name."""
    out, in_ = shape
    # The size of a magnitude tells the axis only if both axes differ.
    if m is not None and out != in_ and m.size in shape:
        return "embedding" if m.size == in_ else "linear"
    return "embedding" if is_embedding_name(name) else "linear"


def _extra(key: str, tensor: LazyArray, modules: Mapping[str, Update]) -> Extra:
    """A DoRA magnitude, or a tensor without a known role."""
    name, _, last = key.rpartition(".")
    module = modules.get(name) if last == "m" else None
    if module is None:
        return Extra("other", name, tensor)
    out, in_ = module.shape
    # mlx-lm normalises the rows of the stored weight, and an embedding stores its vocabulary as rows.
    role, size = ("magnitude_in", in_) if module.layout.kind == "embedding" else ("magnitude", out)
    if tensor.shape != (size,):
        raise ShapeError(f"{key} {tensor.shape} is not one number for each of {size} rows", fix=SAVE_AGAIN)
    return Extra(role, name, tensor)


def _findings(config: Mapping[str, Any] | None, scale: float | None, modules: Mapping[str, Update]) -> list[Finding]:
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
        findings.append(
            Finding(
                "warning",
                "alpha-beside-scale",
                text,
                "if one of these versions trained the adapter, write scale · α/r as the scale into adapter_config.json",
            )
        )
    return findings
