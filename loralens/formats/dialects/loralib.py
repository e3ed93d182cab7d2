"""Reading microsoft/loralib: a state dict of ``<module>.lora_A`` and ``<module>.lora_B``.

=============  =============================================  ====================================================
layer          stored                                         here
=============  =============================================  ====================================================
Linear         A (r, in), B (out, r)                          the same
Embedding      A (r, vocab), B (dim, r)                       the same: out = dim, in = vocab
MergedLinear   A (k·r, in), B (out·k/n, r): k of n slices     one module, B block-diagonal (out, k·r)
Conv2d         A (k·r, in·k), B (out·k, k·r), k the kernel    A repeated k times on a diagonal: see below
=============  =============================================  ====================================================

The file has neither α nor r, nor ``enable_lora``, which says which slices a MergedLinear adapts. The latter is taken
from a configuration ``{"enable_lora": [true, false, true]}`` beside the file.

Conv2d adds ``(B @ A).view(out, in, k, k)``. Row o of this, flattened, consists of the k rows o·k … of B·A, so
ΔW (out, in·k²) = B.reshape(out, k·(k·r)) · diag(A, …, A), of rank k²·r. A file without the weight of a convolution does
not show that the module is one, and it is then read as linear. (Conv1d and Conv3d of loralib 0.1.2 fail in that view.)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, ShapeError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.diffusers import are_diffusers_keys as is_diffusers
from loralens.formats.dialects.pairs import (
    Leaf,
    Modules,
    Parts,
    Tensors,
    add_tensors,
    alpha_unknown,
    is_embedding_name,
    match_leaf,
    translatable_extras,
    unpack_merged,
)
from loralens.formats.files.container import Stored

NAME = "loralib"
ENABLED = "enable_lora"

_HALF = re.compile(r"^(?P<name>.+)\.lora_(?P<part>[AB])$")
# The names of LitGPT's modules, by which its files are told from loralib's: the leaves are the same.
_LITGPT = re.compile(
    r"^transformer\.h\.[0-9]+\.(attn\.(attn|qkv|proj)|mlp\.(fc|fc_1|fc_2|proj|gate|experts\.[0-9]+\.\w+))$"
)


def loralib_leaf(key: str) -> Leaf | None:
    """The module and the half that a key names; None for any other key."""
    return match_leaf(key, _HALF)


def are_litgpt_names(names: Iterable[str]) -> bool:
    """Whether all modules have names of LitGPT, and at least one is in a block."""
    # Both halves of a pair give its name.
    names = set(names)
    other_names = {name for name in names if not _LITGPT.match(name)}
    return other_names <= {"lm_head"} and len(names) > len(other_names)


def detect(stored: Stored) -> bool:
    """Whether a file is loralib's: its keys end in ``lora_A`` and ``lora_B``, and no other program uses its names."""
    names = [found.name for found in map(loralib_leaf, stored.tensors) if found]
    return (
        bool(names)
        and not are_litgpt_names(names)
        and not any(name.startswith(("diffusion_model.", "text_encoders.")) for name in names)
        and not is_diffusers(stored.tensors, declared="lora_adapter_metadata" in (stored.metadata or {}))
    )


def read(stored: Stored) -> Adapter:
    """The adapter of a loralib state dict.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or it is unknown which slices of fused projections
        are adapted.
    """
    enabled, config = enabled_slices(stored)
    groups, unpaired = pairs.group(stored.tensors, loralib_leaf)
    # AdaLoRA has the leaves of loralib and a diagonal between them, without which ΔW would be wrong.
    middle = next((key for key in unpaired if key.endswith(".lora_E")), None)
    if middle:
        what = f"{middle} stands between A and B: this is AdaLoRA, under names that are not PEFT's"
        raise FormatError(what, fix="save it with PEFT, under base_model.model. and beside its adapter_config.json")
    modules = pairs.unfold(groups, lambda name, parts: [(name, _module(name, parts, unpaired, enabled))])
    extra = {key: _extra(key, tensor, unpaired, modules) for key, tensor in unpaired.items()}
    findings = [alpha_unknown("loralib"), *_findings(modules, unpaired)]
    return pairs.make_adapter(replace(stored, config=config), NAME, modules, extra, findings)


def enabled_slices(stored: Stored) -> tuple[list[bool] | None, Mapping[str, Any] | None]:
    """``enable_lora`` of the configuration or of the values in the pickle, and a configuration that contains it.

    Raises
    ------
    FormatError
        It is not a list of true and false with at least one true.
    """
    source = stored.config if stored.config and ENABLED in stored.config else stored.plain
    if ENABLED not in source:
        return None, stored.config
    enabled = source[ENABLED]
    # A configuration is written by hand, so anything may be there.
    if not isinstance(enabled, list) or not all(isinstance(one, bool) for one in enabled) or not any(enabled):
        what = f"{ENABLED} is not a list of true and false"
        raise FormatError(what, fix=f"write it as {ENABLED}: [true, false, true]")
    return enabled, stored.config if source is stored.config else {**(stored.config or {}), ENABLED: enabled}


def _module(name: str, parts: Parts, unpaired: Tensors, enabled: list[bool] | None) -> LowRank:
    B, A = pairs.factors(parts)
    origin, rank = pairs.origin_of(NAME, parts), A.shape[0]
    # loralib's Conv2d keeps its convolution in a member called conv.
    weight = unpaired.get(f"{name}.conv.weight")
    if weight is not None and weight.ndim == 4:
        B, A, layout = _unpack_conv(B, A, weight.shape)
        rank //= layout.kernel[0]
    # With one enabled slice, the shapes fit a linear layer too. Only the configuration shows that the layer is fused.
    elif A.shape[0] != B.shape[1] or (enabled and len(enabled) > 1 and sum(enabled) == 1):
        # The shapes do not tell which slices they are, and a wrong guess would be a wrong update.
        if enabled is None:
            shapes = f"lora_A {A.shape} and lora_B {B.shape}"
            what = f"{shapes} are fused projections, and the file does not say which of them"
            fix = 'put an adapter_config.json with "enable_lora": [true, false, true] (query and value) beside the file'
            raise FormatError(what, fix=fix)
        B, layout = unpack_merged(B, A, enabled)
        rank //= layout.groups
    else:
        layout = Layout(_kind(name, (B.shape[0], A.shape[1]), unpaired.get(f"{name}.weight")))
    return LowRank(B, A, scaling=Scaling("unknown", rank=rank), layout=layout, origin=origin)


def _kind(name: str, shape: tuple[int, int], weight: LazyArray | None) -> str:
    """``embedding`` or ``linear``: by the base weight if the file has it and it is not square, else by the name."""
    # An embedding stores its weight as (vocab, dim), which is the transpose of the update.
    if weight is not None and shape[0] != shape[1] and weight.shape in (shape, shape[::-1]):
        return "linear" if weight.shape == shape else "embedding"
    return "embedding" if is_embedding_name(name) else "linear"


def _unpack_conv(B: LazyArray, A: LazyArray, weight: tuple[int, ...]) -> tuple[LazyArray, LazyArray, Layout]:
    """The factors of a Conv2d: A (k·r, in·k) and B (out·k, k·r) become A (k²·r, in·k²) and B (out, k²·r)."""
    out, channels, k, other = weight
    width = A.shape[0]
    # loralib's kernels are square, and a grouped convolution has another B.
    if k != other or not k or B.shape != (out * k, width) or A.shape[1] != channels * k or width % k:
        what = f"lora_A {A.shape} and lora_B {B.shape} do not fit the convolution {weight}"
        raise ShapeError(what, fix="loralens reads loralib's Conv2d of one group")

    wide = A.map(lambda array: np.kron(np.eye(k, dtype=array.dtype), array), shape=(k * width, k * A.shape[1]))
    return B.reshape(out, k * width), wide, Layout("conv", kernel=(k, k))


def _extra(key: str, tensor: LazyArray, unpaired: Tensors, modules: Modules) -> Extra:
    """A trained bias, a head trained in full, or the base weight of an adapted module."""
    name, _, last = key.rpartition(".")
    inner = name.removesuffix(".conv")
    if name in modules or inner in modules:
        return Extra("bias" if last == "bias" else "other", inner if inner in modules else name, tensor, last)
    # loralib stores trained biases alone. A bias beside its weight belongs to a layer trained in full.
    if last == "bias" and f"{name}.weight" not in unpaired:
        return Extra("bias", name, tensor, last)
    return Extra("saved" if last in ("weight", "bias") else "other", name, tensor, last)


def _findings(modules: Modules, unpaired: Tensors) -> list[Finding]:
    findings = []
    bases = [name for name in modules if f"{name}.weight" in unpaired or f"{name}.conv.weight" in unpaired]
    # In eval mode, loralib merges the update into the weight.
    if bases:
        text = (
            f"holds base weights too, {bases[0]}'s among them; if they were saved in eval mode, they already contain "
            "the update"
        )
        findings.append(Finding("warning", "base-included", text, "take the base model from its own source"))
    convs = [n for n, m in modules.items() if m.layout.kind == "linear" and "conv" in n.rpartition(".")[2]]
    if convs:
        text = f"{convs[0]} may be a convolution: nothing in the file says so, and it is read as linear"
        findings.append(Finding("warning", "conv-unknown", text, "save the convolution's own weight with the adapter"))
    return findings


KINDS = ("linear", "embedding", "merged")  # a merged pair of another dialect is written as a wider linear one


def write(adapter: Adapter) -> Stored:
    """The adapter as loralib's layers store it.

    The scale of a module is not written, as loralib stores none, and it is not folded into the factors. The code that
    makes the layers must give ``lora_alpha`` = scale · r.

    Raises
    ------
    FormatError
        The file could not tell a kind of weight from another, or cannot hold an extra.
    ShapeError, MismatchError
        A changed module does not fit into the layer that it came from, or an update is not a pair.
    """
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            tensors.update(_tensors(name, module, adapter))
    # Base weights and heads that were in the file go with it again.
    if adapter.format == NAME:
        tensors.update({key: extra.tensor for key, extra in adapter.extra.items()})
        return Stored(tensors, adapter.metadata, adapter.config)
    for extra in translatable_extras(adapter, ("bias",), "loralib").values():
        add_tensors(tensors, {f"{extra.module}.bias": extra.tensor})
    return Stored(dict(sorted(tensors.items())))


def _tensors(name: str, module: Update, adapter: Adapter) -> Tensors:
    if module.origin and module.origin.format == NAME:
        return module.origin.tensors
    B, A = module.factors
    kind = module.layout.kind
    # Only a file that had the weight of the convolution can be read back.
    if kind == "conv" and adapter.format == NAME:
        # Row o·k+a of the stored B·A is part a of row o of ΔW, so the product is exactly the same.
        (out, width), k = B.shape, module.layout.kernel[0]
        B = B.map(lambda array: np.kron(array, np.eye(k, dtype=array.dtype)), shape=(out * k, width * k))
        A = A.reshape(width * k, A.shape[1] // k)
    # The leaves are the same for every kind of layer.
    elif kind not in KINDS:
        what = f"a loralib file does not say what a {kind} weight is, so it would be read as linear"
        raise FormatError(what, fix=f"choose another format; or {LEAVE_OUT}")
    if kind == "merged" and adapter.format == NAME and sum((adapter.config or {}).get(ENABLED, [])) == 1:
        what = "a changed update of one slice of a fused weight would be read as an update of the whole weight"
        raise ShapeError(what, fix="convert it to PEFT first")
    return {f"{name}.lora_A": A, f"{name}.lora_B": B}
