"""Reading Hugging Face PEFT: ``adapter_model.safetensors`` beside ``adapter_config.json``.

The canonical form of each kind of pair (ΔW is always (out, in)):

===========  =======================================  ==================================================
kind         stored                                   here
===========  =======================================  ==================================================
linear       A (r, in), B (out, r)                    the same; GPT-2's Conv1D too (``transposed`` hint)
conv         A (r, in, k…), B (out, r/groups, 1…)     A (r, in·k…), B (out, r), block-diagonal if grouped
embedding    A (r, vocab), B (dim, r)                 the same: out = dim, in = vocab
experts      A (E·r, in), B (out, r·E) interleaved    one module for each expert, ``name[e]``
merged       A (k·r, in), B (k·o, r, 1)               one module, B block-diagonal (out, k·r)
===========  =======================================  ==================================================

AdaLoRA, LoHa and LoKr have files and configurations of their own:

========  ======================================================  ==================================================
type      stored under ``base_model.model.``                      ΔW, (out, in)
========  ======================================================  ==================================================
ADALORA   lora_A (r, in), lora_E (r, 1), lora_B (out, r)          lora_alpha/(ranknum + 1e-5) · B · diag(E) · A
LOHA      hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, t1, t2      alpha/r · (w1_a·w1_b) ∘ (w2_a·w2_b)
LOKR      lokr_w1 or _a·_b, lokr_w2 or _a·_b or _a, t2, _b        alpha/r · kron(w1, w2)
========  ======================================================  ==================================================

AdaLoRA: ranknum is ``init_r``, the rank before pruning; old files hold it as a tensor. A ``lora_alpha`` of 0 or less
counts as ``init_r``. ``rank_pattern`` says for each module which of its ``init_r`` directions remained, as a list of
true and false. A file contains only the directions that remained. A module without any has no update.

LoHa and LoKr: the algebra is that of LyCORIS, but the scale is not. It is alpha/r of the configuration, also for full
factors of LoKr. For a Conv1d with a full w2 (b, d, k), PEFT 0.21.2 orders LoKr's product differently than LyCORIS: it
takes the Kronecker product of w1, as (1, a, c), and w2. The result has the shape (b, a·d, c·k), and PEFT reshapes it to
(out, in, k). PEFT trains and merges in this order, so it is read in this order here.

All three flatten the kernels of convolutions in some of their factors, (r, in·k…), and plain LoRA does not. So a module
with the name of a convolution is one, without a kernel, until its base is known (`loralens.formats.dialects.lycoris`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.lowrank import Layout, LowRank, Origin, Scaling
from loralens.core.names import is_convolution_name
from loralens.core.structured import Dense, Form, Update
from loralens.errors import FormatError, ShapeError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.pairs import (
    PEFT_NORMS,
    SAVE_AGAIN,
    Fields,
    Leaf,
    Modules,
    Parts,
    Tensors,
    magnitude_findings,
    missing_magnitudes,
    single_number,
)
from loralens.formats.dialects.peft.config import (
    HALVES,
    OUT_PROJ,
    PREFIX,
    RESTORE,
    PeftConfig,
    is_pair,
    module_path,
    parse_peft_key,
)
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import plain_text

NAME = "peft"
# role of a tensor → the field of the configuration without which PEFT has no parameter for it, and passes over it
SWITCHES = {
    "magnitude": "use_dora",
    "lora_bias": "lora_bias",
    "tokens": "trainable_token_indices",
    "diagonal": "kasa_config",
}
EMBEDDINGS = ("embed_tokens", "lm_head")  # saved in full by PEFT where they are adapted or were resized
_OUT_PROJ = f".{OUT_PROJ}"
# Each one object for all modules, of which a file may have very many.
_LINEAR, _TRANSPOSED = Layout("linear"), Layout("linear", transposed=True)


def detect(stored: Stored) -> bool:
    """Whether a file is PEFT's: it has pairs under ``base_model.model.``, or pairs beside PEFT's configuration."""
    # diffusers writes this entry. A PEFT configuration beside such a file belongs to another adapter.
    if "lora_adapter_metadata" in (stored.metadata or {}):
        return False
    # The other types have tensors of their own under PEFT's prefix.
    if type_of(stored) != PLAIN:
        return True
    keys = [key for key in stored.tensors if is_pair(key)]
    declared = (stored.config or {}).get("peft_type") == "LORA"
    return bool(keys) and (declared or all(key.startswith(PREFIX) for key in keys))


def read(stored: Stored) -> Adapter:
    """The adapter of a PEFT file.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or the configuration is not valid.
    """
    names = {found.adapter for found in map(parse_peft_key, stored.tensors) if found and found.role in HALVES}
    if len(names) > 1:
        raise FormatError(f"holds several adapters: {', '.join(sorted(names))}", fix="save each one to its own folder")
    kind = type_of(stored)
    config = PeftConfig(stored.config and lora_fields(stored.config))
    # The stored blocks are not the factors of the whole weight.
    if config.fields.get("use_bdlora"):
        raise FormatError("use_bdlora: factors are stored as compact blocks", fix="merge or convert it with PEFT first")
    findings: list[Finding] = []
    if not config.known:
        text = "no adapter_config.json beside the file, so α is unknown and the scale is taken as 1"
        fix = "put the configuration beside the file, or give --alpha or --scale"
        findings.append(Finding("warning", "alpha-unknown", text, fix))
    # AdaLoRA has a meaning of its own for 0.
    elif kind == PLAIN and config.fields.get("lora_alpha") == 0:
        text = "lora_alpha is 0, so PEFT adds nothing; verl's model merger writes 0 because it does not know α"
        findings.append(Finding("warning", "alpha-zero", text, "give --alpha, or write the α of the training there"))
    plain = kind == PLAIN
    modules, unpaired, paths, about = _plain(stored, config) if plain else read_other_type(stored, kind, config)
    findings += about
    extra = {key: _extra(key, tensor, stored, config, modules) for key, tensor in unpaired.items()}
    if config.known:
        if config.fields.get("use_dora"):
            extra |= missing_magnitudes(modules, extra, PEFT_NORMS, PREFIX + "{}.lora_magnitude_vector")
        missing = magnitude_findings(extra, software="PEFT")
        # The setting itself is only reported if magnitudes are there; missing ones have a warning of their own.
        silent = {"use-dora"} if missing and not any(item.role == "magnitude" for item in extra.values()) else ()
        findings += [finding for finding in config.variants() if finding.code not in silent] + missing
        findings += _target_findings(config, paths, modules)
        findings += _ignored_findings(stored, config, extra)
    base_model = plain_text((stored.config or {}).get("base_model_name_or_path"))
    adapter = pairs.make_adapter(stored, NAME, modules, extra, findings, base_model=base_model)
    return adapter if plain or len(paths) == len(modules) else replace(adapter, narrowed=True)


def _plain(stored: Stored, config: PeftConfig) -> tuple[Modules, Tensors, set[str], list[Finding]]:
    """The modules of a file of type LORA, its other tensors, the paths that are targets of PEFT, and findings."""
    groups, unpaired = _group(stored.tensors)
    # A base that stores experts one by one needs both stacks of a layer in turn, so two of them are kept in memory.
    recent = Recent(2)
    modules = pairs.unfold(groups, lambda path, _: _modules(path, groups, config, recent), module_path)
    findings = []
    for name, module in modules.items():
        configured, width = module.scaling.rank, module.rank // module.layout.blocks
        if configured not in (None, width):
            text = f"{name}: the configuration says r = {configured} and lora_A has {width} rows"
            fix = "correct r or rank_pattern in adapter_config.json: the scale depends on it"
            findings.append(Finding("error", "rank-disagrees", text, fix))
    for path in groups:
        if f"{path}.{OUT_PROJ}" in groups:
            text = (
                f"{module_path(path)}: PEFT up to 0.21.2 adds the update of this attention's out_proj twice, in "
                "training too (peft pull request 3774), so its ΔW is twice scale·B·A here, and in what is merged"
            )
            fix = "use --once (load(…, once=True)) if the adapter was trained with software that adds it once"
            findings.append(Finding("warning", "out-proj-twice", text, fix))
    return modules, unpaired, {_target(path, groups) for path in groups}, findings


def _group(tensors: Tensors) -> tuple[dict[str, Parts], dict[str, LazyArray]]:
    """Pairs by their stored path, with the diagonal of KaSA, and every tensor that is not half of a pair."""
    copies = {key: tensor for key, tensor in tensors.items() if (plain := _plain_key(key)) != key and plain in tensors}
    groups, unpaired = pairs.group({key: tensor for key, tensor in tensors.items() if key not in copies}, _half)
    unpaired |= copies
    for key, tensor in unpaired.items():
        parts = parse_peft_key(key)
        if parts and parts.role == "diagonal" and parts.path in groups:
            groups[parts.path]["diagonal"] = (key, tensor)
    return groups, unpaired


def _plain_key(key: str) -> str:
    """A key without the parts under which old PEFT saved a module twice: as it was, and as it was trained."""
    return key.replace(".modules_to_save.", ".").replace(".original_module.", ".")


def _half(key: str) -> Leaf | None:
    """The stored path of a pair, and which half of it a key names; the factors of an embedding are halves, too."""
    parts = parse_peft_key(key)
    return Leaf(parts.path, f"lora_{parts.half}") if parts and parts.role in HALVES else None


def _modules(
    path: str, groups: Mapping[str, Parts], config: PeftConfig, recent: Recent
) -> Iterator[tuple[str, LowRank]]:
    """The modules that one stored pair holds: one module, or the experts of a stack."""
    parts = groups[path]
    A, B = pairs.tensors_of(parts, "lora_A", "lora_B")
    origin = pairs.origin_of(NAME, parts, ("lora_A", "lora_B"))
    for key, tensor in origin.tensors.items():
        pairs.check_not_empty(key, tensor)
    parameter = parameter_path(path, groups, config)
    if parameter:
        yield from _expert_modules(parameter, B, A, config, origin, recent)
        return
    # r and α of an out_proj are those of its attention.
    scaling = config.scaling(_target(path, groups))
    name = module_path(path)
    if f"{path}.{OUT_PROJ}" in groups:
        name = f"{name}.in_proj_weight"  # the pair of an nn.MultiheadAttention itself adapts its fused projections
    module = _module(name, parts, config, scaling, origin)
    # PEFT wraps the attention and its out_proj, and both wrappers add the update of out_proj.
    twice = path.endswith(_OUT_PROJ) and path.removesuffix(_OUT_PROJ) in groups
    yield name, module.rescaled(2 * module.scale, scaling.doubled()) if twice else module


def _target(path: str, groups: Mapping[str, Parts]) -> str:
    """The module that was a target of PEFT: ``path``, or the nn.MultiheadAttention whose out_proj it is."""
    if not path.endswith(_OUT_PROJ):
        return module_path(path)
    owner = path.removesuffix(_OUT_PROJ)
    return module_path(owner if owner in groups else path)


def _module(name: str, parts: Parts, config: PeftConfig, scaling: Scaling, origin: Origin) -> LowRank:
    A, B = parts["lora_A"][1], parts["lora_B"][1]
    # The leaf tells an embedding from a linear layer; the shapes do not.
    if any((key := parse_peft_key(stored)) and key.role == "embedding" for stored in origin.tensors):
        layout = Layout("embedding")
    elif A.ndim == 2 and B.ndim == 3:
        # Old PEFT stored the factors of its grouped Conv1d, whose kernel is 1, for its fused projections.
        if B.shape[2] != 1:
            raise ShapeError(f"fused lora_A {A.shape} and lora_B {B.shape} are not a pair", fix=SAVE_AGAIN)
        B, layout = pairs.unpack_merged(B.reshape(*B.shape[:2]), A, config.enabled)
    # Of a Conv1d, the kernel of B is 1; the axis of experts may be 1 where they share a factor.
    elif A.ndim == B.ndim == 3 and A.shape[1] == B.shape[2] and (B.shape[2] > 1 or ".experts" in name):
        what = f"lora_A {A.shape} and lora_B {B.shape} have an axis for the experts, as Tinker stores them, not PEFT"
        raise FormatError(what, fix="convert the adapter to PEFT's format with tinker-cookbook, or merge it there")
    elif A.ndim > 2:
        B, A, layout = pairs.unpack_conv(B, A)
    elif name.endswith(".in_proj_weight"):
        layout = Layout("parameter")
    else:
        layout = _TRANSPOSED if config.fields.get("fan_in_fan_out") else _LINEAR
    # This comes after unpacking, so that the diagonal scales the columns of B (out, r).
    if "diagonal" in parts:
        diagonal = parts["diagonal"][1]
        if diagonal.shape != (B.shape[1],):
            raise ShapeError(f"lora_diag {diagonal.shape} does not fit rank {B.shape[1]}", fix=SAVE_AGAIN)
        B = B.map(lambda array: array.astype(np.float64) * diagonal.read(), shape=B.shape, dtype=np.float64)
    return LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)


def _target_findings(config: PeftConfig, paths: set[str], modules: Modules) -> list[Finding]:
    """Findings about differences between ``target_modules`` and the modules in the file."""
    fix = "if such a module was meant to be trained, correct its name and train again"
    findings = [
        Finding(
            "note", "target-unmatched", f"target_modules names {target!r} and no module of the file matches it", fix
        )
        for target in config.unmatched_targets(paths)
    ]
    strangers = config.unmatched_modules(config.path(path) for path in sorted(paths) if path in modules)
    excluded = config.excluded_modules(sorted(paths))
    if excluded:
        text = f"{len(excluded)} modules (the first is {excluded[0]}) are in exclude_modules: PEFT drops them"
        findings.append(Finding("warning", "module-excluded", text, "correct exclude_modules in adapter_config.json"))
    # Without `target_modules`, the configuration does not say which modules PEFT adapts.
    if strangers and (config.fields.get("target_modules") or config.parameters):
        text = f"{len(strangers)} modules (the first is {strangers[0]}) are not in target_modules: PEFT drops them"
        findings.append(Finding("warning", "module-untargeted", text, "correct target_modules in adapter_config.json"))
    return findings


def _ignored_findings(stored: Stored, config: PeftConfig, extra: Mapping[str, Extra]) -> list[Finding]:
    """Findings about tensors that PEFT passes over without an error, and that are applied here."""
    findings = []
    pairs_of_file = [key for key in stored.tensors if is_pair(key)]
    bare = [key for key in pairs_of_file if not key.startswith(PREFIX)]
    if bare:
        text = (
            f"{len(bare)} of {len(pairs_of_file)} factors are stored without the prefix {PREFIX} (the first is "
            f"{bare[0]}): PEFT passes over them, and loralens applies them"
        )
        findings.append(Finding("warning", "prefix-missing", text, "loralens convert … --to peft writes the prefix"))
    for role, field in SWITCHES.items():
        keys = [key for key, each in extra.items() if each.role == role and config.fields.get(field) in (None, False)]
        if keys:
            text = (
                f"adapter_config.json does not set {field}, and {len(keys)} tensors belong to it (the first is "
                f"{keys[0]}): PEFT ignores them, and loralens applies them"
            )
            fix = f"set {field} as in training, or take the tensors out of the file"
            findings.append(Finding("warning", "switched-off", text, fix))
    return findings


def _extra(key: str, tensor: LazyArray, stored: Stored, config: PeftConfig, modules: Modules) -> Extra:
    """A tensor that is not half of a pair, with its role and its module."""
    parts, plain = parse_peft_key(key), _plain_key(key)
    if parts and (plain == key or plain not in stored.tensors):
        return Extra(parts.role, module_path(parts.path), tensor)
    path, _, parameter = module_path(key.removeprefix(PREFIX)).rpartition(".")
    # PEFT's trainable tokens: rows of an embedding, and no full tensor.
    if path.endswith(".token_adapter"):
        return Extra("tokens", path.removesuffix(".token_adapter"), tensor)
    if plain != key:
        path = ".".join(part for part in path.split(".") if part not in ("modules_to_save", "original_module"))
        return Extra("copy" if plain in stored.tensors else "saved", path, tensor, parameter)
    # As in PEFT, an entry also covers what is inside of a module whose path contains it.
    if any(f"{saved}." in f"{path}." for saved in config.saved):
        return Extra("saved", path, tensor, parameter)
    if parameter == "bias":
        return Extra("bias", path, tensor, parameter)
    embedding = path in modules and modules[path].layout.kind == "embedding"
    # A resized vocabulary saves both, whether they are adapted or not.
    embedding = embedding or path.rpartition(".")[2] in EMBEDDINGS
    return Extra("embedding" if embedding and parameter == "weight" else "other", path, tensor, parameter)


# The order in which the models of transformers define these parameters.
REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2")
# Unsloth's name for B expert by expert
GROUPED = "grouped_by_expert"
SWAPPED = (0, 19)  # the first version of PEFT in which (E, out, in) is the rule


def parameter_path(path: str, groups: Mapping[str, Any], config: PeftConfig) -> str | None:
    """The path of the parameter that a stored pair adapts; None if it adapts the weight of a module.

    ``target_parameters`` holds paths or ends of paths. An end may be only the parameter's own name, which then fits
    every module that is not in ``target_modules``.
    """
    module, targets = module_path(path), config.parameters
    if not targets or config.targets(module):
        return None
    # A path that fits is more specific than a bare name.
    owned = (target.rpartition(".") for target in targets)
    names = [name for owner, _, name in owned if owner and f".{module}".endswith(f".{owner}")]
    names = names or [target for target in targets if "." not in target]
    if not names:
        return None
    # The depth of a pair, the number of wrappers around it, is its place in the order, so the names must be as many.
    depths = {other: other.count("base_layer") for other in groups if module_path(other) == module}
    if len(names) != len(depths):
        what = f"target_parameters names {len(names)} parameters here and the file holds {len(depths)} pairs"
        raise FormatError(what, fix="correct target_parameters in adapter_config.json")
    if len(names) > 1 and not set(names) <= set(REGISTERED):
        raise FormatError(
            f"which of {', '.join(names)} is the outer one depends on the model's code, and the file does not say",
            fix="train or save one parameter at a time, or report the model so that its order can be added",
        )
    outermost_first = sorted(names, key=registration_order, reverse=True)
    return f"{module}.{outermost_first[sorted(depths.values()).index(depths[path])]}"


def registration_order(name: str) -> int:
    """The position of a parameter among those of its module, in the order in which models register them."""
    return REGISTERED.index(name) if name in REGISTERED else 0


def _expert_modules(
    name: str, B: LazyArray, A: LazyArray, config: PeftConfig, origin: Origin, recent: Recent
) -> Iterator[tuple[str, LowRank]]:
    """The modules of a stored pair: ``name[e]`` for each expert, or one module for a 2-D parameter."""
    scaling, rank = config.scaling(name), config.rank(name)
    # The number of experts is not stored: it follows from r and the rows of A.
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % rank:
        what = f"lora_A {A.shape} and lora_B {B.shape} are not a stack of experts of rank {rank}"
        raise ShapeError(what, fix="correct r or rank_pattern in adapter_config.json, or save the adapter again")
    count = A.shape[0] // rank
    # a parameter of two axes, which is not a stack
    if count == 1:
        plain = name.removesuffix(".weight")
        layout = Layout("linear" if plain != name else "parameter")
        yield plain, LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)
        return
    shared = replace(origin, share=count)
    # Only two parts of the version count; development versions have more.
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.fields.get("peft_version")))
    # Whether the PEFT that saved the adapter treats every stack as (E, in, out).
    transposed = version is None or (int(version[1]), int(version[2])) < SWAPPED
    layout = Layout("experts", transposed=transposed)
    grouped = config.fields.get("lora_B_layout") == GROUPED
    # Every expert needs some columns of B, which are scattered over the whole tensor.
    cached_B = recent.keep(B)
    for e in range(count):
        # The columns of one expert are read when they are needed, from the copy of B in memory.
        columns = slice(e * rank, (e + 1) * rank) if grouped else slice(e, None, count)
        B_e = cached_B.map(itemgetter((..., columns)), shape=(B.shape[0], rank))
        A_e = A.rows(e * rank, (e + 1) * rank)
        yield f"{name}[{e}]", LowRank(B_e, A_e, scaling.value, scaling=scaling, layout=layout, origin=shared)


PLAIN = "LORA"
DEFAULT_INIT_RANK = 12  # AdaLoRA's init_r
EPSILON = 1e-5  # added to ranknum in PEFT's code

# Leaves of the three types. An adapter's name may follow, as in PEFT's pairs.
_ADALORA = re.compile(r"^(?P<path>.+)\.(?P<part>lora_[ABE]|ranknum)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?$")
_LOHA = re.compile(r"^(?P<path>.+)\.(?P<part>hada_w[12]_[ab]|hada_t[12])(?:\.(?P<adapter>[^.]+))?$")
_LOKR = re.compile(r"^(?P<path>.+)\.(?P<part>lokr_w[12](?:_[ab])?|lokr_t2)(?:\.(?P<adapter>[^.]+))?$")
_LEAVES = {"ADALORA": _ADALORA, "LOHA": _LOHA, "LOKR": _LOKR}
_OWN = {"ADALORA": "lora_E", "LOHA": "hada_", "LOKR": "lokr_"}  # the beginning of parts that only one type has

TYPES = (PLAIN, *_LEAVES)

# Fields that only the configuration of one type has, and that mean nothing for a plain LoRA.
_FIELDS = {
    "ADALORA": "init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
    "LOHA": "alpha rank_dropout module_dropout use_effective_conv2d init_weights",
    "LOKR": "alpha rank_dropout module_dropout use_effective_conv2d init_weights decompose_both decompose_factor "
    "rank_dropout_scale",
}


def type_of(stored: Stored) -> str:
    """The ``peft_type`` of a file by its configuration and its keys; ``LORA`` if it is none of the other types.

    Raises
    ------
    FormatError
        The configuration names another type than the tensors have.
    """
    declared = (stored.config or {}).get("peft_type")
    own = [key for key in stored.tensors if key.startswith(PREFIX)]
    # The first key that only files of a type have. A pair counts only if nothing of another type is there: AdaLoRA has
    # pairs as well.
    holds = {kind: next((k for k in own if part in k and _leaf(k, kind)), "") for kind, part in _OWN.items()}
    holds = {kind: key for kind, key in holds.items() if key}
    if not holds and (pair := next(filter(is_pair, own), "")):
        holds = {PLAIN: pair}
    # The configuration counts if the tensors agree with it. Without a configuration, the tensors show the type.
    if declared in (None, *holds):
        return str(declared or next(iter(holds), PLAIN))
    if holds and declared in TYPES:
        kind, key = next(iter(holds.items()))
        what = f"adapter_config.json says {declared}, and the file holds {key}, which is {kind}'s"
        raise FormatError(what, fix="correct peft_type, or put the configuration of this file beside it")
    return PLAIN


def lora_fields(fields: Fields) -> Fields:
    """The configuration of a plain LoRA with the same targets, heads and scales; ``fields`` itself if it is one.

    For AdaLoRA, α belongs to ``init_r``. Its masks of directions are left out, because the tensors are already pruned.
    """
    kind = fields.get("peft_type")
    if kind not in _FIELDS:
        return fields
    # A plain LoRA does not have these fields.
    common = {name: value for name, value in fields.items() if name not in _FIELDS[kind].split()}
    if kind == "ADALORA":
        rank = fields.get("init_r", DEFAULT_INIT_RANK)
        return {**common, "peft_type": PLAIN, "r": rank, "rank_pattern": {}, "alpha_pattern": {}}
    lora = {"lora_dropout": 0.0, "bias": "none", "init_lora_weights": True}
    # Without an α in the file, PEFT's default is the same for all types.
    alpha = {"lora_alpha": fields["alpha"]} if "alpha" in fields else {}
    return {**lora, **common, "peft_type": PLAIN, **alpha}


def read_other_type(stored: Stored, kind: str, config: PeftConfig) -> tuple[Modules, Tensors, set[str], list[Finding]]:
    """The modules of a file of another type than LORA, its other tensors, the paths of all its modules, and findings.

    Raises
    ------
    FormatError, ShapeError
        Tensors are missing or do not fit together, or masks are not valid.
    """
    groups, unpaired = pairs.group(stored.tensors, lambda key: _leaf(key, kind))
    adalora = kind == "ADALORA"
    # rank_pattern has another meaning in every other type.
    masks = _masks(stored.config or {}) if adalora else {}
    modules: dict[str, Update] = {}
    pruned: list[str] = []  # without remaining directions, so they have no update
    for path, parts in groups.items():
        name = module_path(path)
        with place(name):
            if name in modules:
                raise FormatError("is stored twice", fix=SAVE_AGAIN)
            for key, tensor in parts.values():
                pairs.check_float(key, tensor)
                # Only AdaLoRA prunes modules, whose tensors then have no rows.
                if not adalora:
                    pairs.check_not_empty(key, tensor)
            if not adalora:
                modules[name] = _product(name, parts, kind, config)
            elif parts.get("lora_E", parts[next(iter(parts))])[1].size:
                modules[name] = _adalora(name, parts, config, masks.get(name))
            else:
                pruned.append(name)
    text = f"this is {kind}, which only PEFT reads; loralens writes it as a plain LoRA"
    rank = "" if all(isinstance(module, LowRank) for module in modules.values()) else " --rank R"
    fix = f"loralens convert --to peft{rank}, for all other programs; with --base if it adapts convolutions"
    findings = [Finding("note", "peft-type", text, fix)]
    if pruned:
        text = f"{len(pruned)} modules (the first is {pruned[0]}) were pruned to rank 0 by AdaLoRA: they have no update"
        findings.append(Finding("note", "pruned-away", text))
    return modules, unpaired, {*modules, *pruned}, findings


def _leaf(key: str, kind: str) -> Leaf | None:
    match = _LEAVES[kind].match(key)
    return Leaf(match["path"].removeprefix(PREFIX), match["part"]) if match else None


def _flat_layout(name: str) -> Layout:
    """The layout of factors that do not show a kernel: they may have one all the same, flattened to (r, in·k…)."""
    return Layout("conv") if is_convolution_name(name) else Layout()


def _adalora(name: str, parts: Parts, config: PeftConfig, mask: list[bool] | None) -> LowRank:
    """B · diag(E) · A with E multiplied into A, which is rounded to float32 once, as PEFT computes it."""
    A, B, E = pairs.tensors_of(parts, "lora_A", "lora_B", "lora_E")
    if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0] or E.shape != (A.shape[0], 1):
        what = f"lora_A {A.shape}, lora_E {E.shape} and lora_B {B.shape} do not fit together"
        raise ShapeError(what, fix=SAVE_AGAIN)
    # If the counts differ, the file and the configuration are of different checkpoints.
    if mask is not None and sum(mask) != A.shape[0]:
        what = f"rank_pattern keeps {sum(mask)} directions and lora_A has {A.shape[0]}"
        raise ShapeError(what, fix="correct rank_pattern in adapter_config.json, or save the adapter again")
    scaling, scale = _adalora_scale(parts, config)
    fan_in = config.fields.get("fan_in_fan_out")
    layout = Layout("linear", transposed=True) if fan_in else _flat_layout(name)

    def weigh(rows: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(rows.astype(np.float64) * E.read().astype(np.float64)).astype(np.float32)

    weighted = A.map(weigh, shape=A.shape, dtype=np.float32)
    # Another name than PEFT's keeps writers from taking these tensors for a pair.
    origin = pairs.origin_of("peft-adalora", parts, ("lora_A", "lora_B", "lora_E", "ranknum"))
    return LowRank(B, weighted, scale, scaling=scaling, layout=layout, origin=origin)


def _adalora_scale(parts: Parts, config: PeftConfig) -> tuple[Scaling, float]:
    """The scale lora_alpha/(ranknum + 1e-5); unknown without a configuration."""
    terms = config.scaling("")
    if terms.alpha is None or terms.rank is None:
        return terms, 1.0
    ranknum = single_number(*parts["ranknum"]) if "ranknum" in parts else float(terms.rank)
    if ranknum <= 0:
        raise FormatError(f"{parts['ranknum'][0]} is {ranknum:g}, not above 0", fix=SAVE_AGAIN)
    # As in PEFT's update_layer of AdaLoRA.
    alpha = terms.alpha if terms.alpha > 0 else float(terms.rank)
    origin = f"AdaLoRA: lora_alpha/(ranknum + 1e-5) = {alpha:g}/({ranknum:g} + 1e-5)"
    if "lora_alpha" not in config.fields:
        origin += f"; {terms.origin}"
    return Scaling("given", origin=origin), alpha / (ranknum + EPSILON)


def _masks(fields: Fields) -> Mapping[str, list[bool]]:
    """``rank_pattern`` of AdaLoRA: module → whether each of its directions remained."""
    pattern = fields.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise FormatError("rank_pattern is not a mapping", fix=RESTORE)
    masks = {}
    for key, mask in pattern.items():
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            raise FormatError(f"rank_pattern {key!r:.80} is not a list of true and false", fix=RESTORE)
        # Its keys are those of the tensors lora_E, and not expressions.
        masks[module_path(key.partition(".lora_E")[0].removeprefix(PREFIX))] = mask
    return masks


def _product(name: str, parts: Parts, kind: str, config: PeftConfig) -> Update:
    """The update of one module of LoHa or LoKr."""
    from loralens.formats.dialects import lycoris  # few adapters of PEFT are of these types

    scaling = config.scaling(name)
    product: LowRank | Form
    rank: int | None = None
    if kind == "LOHA":
        product, kernel, rank = lycoris.loha(parts)
    elif "lokr_w2" in parts and parts["lokr_w2"][1].ndim == 3:
        product, kernel = _conv1d(lycoris.side(parts, 1)[0], parts["lokr_w2"][1])
    else:
        product, kernel, rank = lycoris.lokr(parts)
    # LoKr with two full factors has no inner dimension that could disagree.
    if rank is not None and scaling.rank not in (None, rank):
        what = f"the configuration says r = {scaling.rank}, and the factors have {rank} inner dimensions"
        raise ShapeError(what, fix="correct r or rank_pattern in adapter_config.json: the scale depends on it")
    return lycoris.update_of(parts, product, scaling, kernel, f"peft-{kind.lower()}", flat=_flat_layout(name))


def _conv1d(first: LowRank | Dense, w2: LazyArray) -> tuple[Dense, tuple[int, ...]]:
    """The product of LoKr for a Conv1d with a full w2 (b, d, k), with its numbers in PEFT's order, and its kernel."""
    (a, c), (b, d, k) = first.shape, w2.shape
    shape = a * b, c * d, k

    def product() -> Array:
        return np.kron(first.dense()[None], w2.read().astype(np.float64)).reshape(shape)

    return Dense(LazyArray(product, shape=shape, dtype=np.float64)), (k,)
