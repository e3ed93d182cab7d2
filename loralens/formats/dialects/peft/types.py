"""Reading AdaLoRA, LoHa and LoKr of PEFT, which have files and configurations of their own.

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
from collections.abc import Mapping

import numpy as np

from loralens.core.adapter import Finding
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.names import is_convolution_name
from loralens.core.structured import Dense, Form, Update
from loralens.errors import FormatError, ShapeError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.pairs import SAVE_AGAIN, Fields, Leaf, Modules, Parts, Tensors, single_number
from loralens.formats.dialects.peft.config import PREFIX, RESTORE, PeftConfig, is_pair, module_path
from loralens.formats.files.container import Stored

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
