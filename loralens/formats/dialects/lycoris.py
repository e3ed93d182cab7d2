"""LyCORIS: kohya's names, with several algorithms that build an update from more than a pair. It is only read.

=====================  ====================================================================  ===================
algorithm              tensors                                                               ΔW
=====================  ====================================================================  ===================
LoCon, Tucker          lora_up (out, r, 1…), lora_mid (r, r, k…), lora_down (r, in, 1…)      a pair of rank r
LoHa                   hada_w1_a (out, r), hada_w1_b (r, in·k…), hada_w2_a, hada_w2_b        (w1a·w1b) ∘ (w2a·w2b)
LoHa, Tucker           hada_t1, hada_t2 (r, r, k…); w1_a (r, out), w1_b (r, in), w2 alike    (t1·w1a·w1b) ∘ (t2·w2a·w2b)
LoKr                   lokr_w1 or _a·_b (a, c); lokr_w2 or _a·_b or _a, t2, _b (b, d, k…)    kron(w1, w2)
full                   diff (out, in, k…)                                                    diff, without an α
=====================  ====================================================================  ===================

The scale is α/r, where r is the inner dimension of a factored side, and 1 if LoKr has no factored side. For rsLoRA,
LyCORIS stores α·√r, so α/r of the file is right for it too. LyCORIS flattens the kernels in the factors of LoHa and
LoKr: such a module looks linear here, (out, in·k…), until its base is known.

Other tensors are kept as extras: the differences of biases and norms, which are added to those of the base without α,
the magnitudes of DoRA, and the tensors of algorithms whose update depends on the base weight.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from loralens.choices import Level
from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.structured import Dense, Form, Hadamard, Kronecker, Structured, Update
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects import pairs
from loralens.formats.dialects.kohya import reader as kohya
from loralens.formats.dialects.pairs import SAVE_AGAIN, Leaf, Parts, match_leaf
from loralens.formats.dialects.products import hadamard, kronecker, tucker
from loralens.formats.files.container import Stored

NAME = "lycoris"
PRODUCT = "lycoris-product"  # the dialect in the origins of updates whose tensors are no pair
LINEAR = Layout()

# All leaves of LyCORIS apart from LoCon's, which end like a pair.
_LEAF = re.compile(
    r"^(?P<name>.+)\.(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|w_norm|b_norm"
    r"|[ab][12]\.weight|bm\.weight|on_input|oft_blocks|rescale|[pq]_layer\.weight|lambda_layer"
    r"|bias_(?:indices|values|size))$"
)
_HALF = re.compile(r"^(?P<name>.+)[._]lora_(?P<part>mid|[AB])\.weight$")
# Leaves that only LyCORIS writes, and leaves that ComfyUI's dialect has under its own dotted names too.
_OWN = re.compile(r"[._](hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_blocks|on_input|lambda_layer|lora_mid\.weight)$")
_FLAT_OWN = re.compile(r"\.(diff|diff_b|[wb]_norm|[ab][12]\.weight|bias_(indices|values))$")
# Beginnings of names in LyCORIS files. PEFT has the same leaves for LoHa and LoKr under its own prefix.
_NAMES = (*kohya.PREFIXES, "diffusion_model.", "transformer.", "unet.", "text_encoder")
# Differences of norms and biases are added to the base's own, so they have the roles of full differences.
_ROLES = {"diff_b": ("diff_b", "bias"), "b_norm": ("diff_b", "bias"), "w_norm": ("diff", "weight")}
FOREIGN = {  # a part that identifies an algorithm → its name, and why it has no ΔW of its own
    "a1.weight": "GLoRA, whose update is a product with the base weight",
    "on_input": "(IA)³, which multiplies the base weight",
    "oft_blocks": "OFT or BOFT, which rotates the base weight",
    "lambda_layer": "T-LoRA, whose update is the difference to a start that the file does not hold",
    "bias_indices": "a sparse residual, which is added to the update",
}


def lycoris_leaf(key: str) -> Leaf | None:
    """The module and the part of a key; a doubled prefix is removed from the name."""
    leaf = match_leaf(key, _HALF, _LEAF)
    return Leaf(kohya.undouble_prefix(leaf.name), leaf.part) if leaf else kohya.kohya_leaf(key)


def detect(stored: Stored) -> bool:
    """Whether a file holds tensors that only LyCORIS writes, or, under kohya's names, ones that ComfyUI writes too."""
    return any(
        (_OWN.search(key) and key.startswith(_NAMES)) or (_FLAT_OWN.search(key) and key.startswith(kohya.PREFIXES))
        for key in stored.tensors
    )


def read(stored: Stored) -> Adapter:
    """The adapter of a LyCORIS file.

    Raises
    ------
    FormatError, ShapeError
        Tensors are missing or do not fit together, or nothing in the file is an update by a sum.
    """
    # Parts without an algorithm become extras.
    modules, extra = pairs.gather(
        stored.tensors,
        lycoris_leaf,
        update=lambda _, parts: algorithm.read(parts) if (algorithm := _algorithm(parts)) else None,
        companions=_companions,
    )
    leaves = filter(None, map(lycoris_leaf, stored.tensors))
    foreign = Counter(leaf.part for leaf in leaves if leaf.part in FOREIGN)
    if not modules:
        raise _no_update_error(foreign)
    findings = _findings(modules, extra, foreign)
    return pairs.make_adapter(stored, NAME, modules, extra, findings, base_model=kohya.base_model(stored))


def _locon(parts: Parts) -> Update:
    if "mid" not in parts:
        return kohya.read_pair(parts, NAME)
    up, core, down = (_matrix(parts, part) for part in ("B", "mid", "A"))
    update = tucker(core, _flat(up), _flat(down))
    return update_of(parts, update, kohya.kohya_scaling(parts, down.shape[0]), core.shape[2:])


def loha(parts: Parts) -> tuple[LowRank | Hadamard, tuple[int, ...], int]:
    """The product of LoHa's factors without its scale, its kernel if the shapes show it, and its r.

    Raises
    ------
    FormatError, ShapeError
        Tensors are missing or do not fit together.
    """
    # LoHa has two Tucker cores or none. If one core is missing, the two factors that belong to it have no meaning.
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise FormatError("one of hada_t1 and hada_t2 is missing", fix=SAVE_AGAIN)
    (first, kernel), (second, other) = (_product(parts, f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
    if kernel != other:
        raise ShapeError(f"kernels {kernel} and {other} do not fit together", fix=SAVE_AGAIN)
    return hadamard(first, second), kernel, parts["hada_w1_b"][1].shape[0]


def lokr(parts: Parts) -> tuple[LowRank | Kronecker, tuple[int, ...], int | None]:
    """The product of LoKr's factors without its scale, its kernel, and its r, which is None if both sides are full.

    Raises
    ------
    FormatError, ShapeError
        Tensors are missing or do not fit together.
    """
    (first, window), (second, kernel) = side(parts, 1), side(parts, 2)
    # LyCORIS gives the kernel to the second factor only.
    if prod(window) != 1:
        raise ShapeError(f"lokr_w1 has a kernel {window}, and only lokr_w2 may", fix=SAVE_AGAIN)
    ranks = {parts[key][1].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in parts}
    # LyCORIS uses one r for both sides when it trains.
    if len(ranks) > 1:
        what = f"its factored sides have the inner dimensions {sorted(ranks)}, so α/r could be either"
        raise ShapeError(what, fix="save the adapter again from its training code")
    return kronecker(first, second), kernel, ranks.pop() if ranks else None


def _loha(parts: Parts) -> Update:
    product, kernel, rank = loha(parts)
    return update_of(parts, product, kohya.kohya_scaling(parts, rank), kernel)


def _lokr(parts: Parts) -> Update:
    product, kernel, rank = lokr(parts)
    # Without a factored side there is no r, and LyCORIS then ignores α.
    full = Scaling("given", origin="both sides are full: LyCORIS takes the scale as 1")
    return update_of(parts, product, full if rank is None else kohya.kohya_scaling(parts, rank), kernel)


def _full(parts: Parts) -> Update:
    difference, scaling = _matrix(parts, "diff"), Scaling("given", origin="a full difference has no α")
    return update_of(parts, Dense(difference), scaling, difference.shape[2:])


class Algorithm(NamedTuple):
    """The parts of an algorithm's update, without α, and the function that builds the update from them."""

    parts: tuple[str, ...]
    read: Callable[[Parts], Update]


# The parts decide which algorithm it is: a module that has parts of two of them is refused.
ALGORITHMS = (
    Algorithm(("A", "B", "mid"), _locon),
    Algorithm(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), _loha),
    Algorithm(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), _lokr),
    Algorithm(("diff",), _full),
)


def _algorithm(parts: Parts) -> Algorithm | None:
    """The algorithm of a module; None if it has no update of a matrix, as for a norm."""
    algorithms = [algorithm for algorithm in ALGORITHMS if parts.keys() & set(algorithm.parts)]
    if len(algorithms) > 1:
        keys = ", ".join(next(parts[part][0] for part in one.parts if part in parts) for one in algorithms)
        raise FormatError(f"holds several updates of one weight: {keys}", fix="leave all but one out of the file")
    # The difference of a norm is a vector, which is an extra and no update of a matrix.
    if algorithms and algorithms[0].read is _full and parts["diff"][1].ndim < 2:
        return None
    return algorithms[0] if algorithms else None


def update_of(
    parts: Parts,
    product: LowRank | Form,
    scaling: Scaling,
    kernel: tuple[int, ...],
    form: str = PRODUCT,
    *,
    flat: Layout = LINEAR,
) -> Update:
    """An update with its scale and layout, and with the tensors of the dialect ``form`` that it was read from.

    Factors may hold flattened kernels, which their shapes do not show; ``flat`` is the layout of factors without one.
    """
    layout = Layout("conv", kernel=kernel) if kernel else flat
    stored = [part for algorithm in ALGORITHMS for part in algorithm.parts if part in parts]
    origin = pairs.origin_of(form, parts, [*stored, "alpha"])
    # A product that is too wide for a pair stays in its own form.
    if not isinstance(product, LowRank):
        return Structured(product, scaling.value, scaling, layout, origin)
    B, A = product.factors
    return LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)


def _matrix(parts: Parts, part: str) -> LazyArray:
    """A part as a tensor, which must be floating point, have at least two axes and not be empty."""
    if part not in parts:
        raise FormatError(f"{next(iter(parts.values()))[0]} has no {part} beside it", fix=SAVE_AGAIN)
    key, tensor = parts[part]
    pairs.check_float(key, tensor)
    # Vectors of biases have leaves of their own.
    if tensor.ndim < 2 or not tensor.size:
        raise ShapeError(f"{key} {tensor.shape} is not a matrix", fix=SAVE_AGAIN)
    return tensor


def _flat(tensor: LazyArray) -> LazyArray:
    """(m, n, k…) as (m, n · k…)."""
    return tensor.reshape(tensor.shape[0], tensor.size // tensor.shape[0]) if tensor.ndim > 2 else tensor


def _product(parts: Parts, stem: str, core: str) -> tuple[LowRank, tuple[int, ...]]:
    """``<stem>_a`` · ``<stem>_b``, with the Tucker core between them if there is one, and the kernel if it is known."""
    a, b = _matrix(parts, f"{stem}_a"), _matrix(parts, f"{stem}_b")
    if core not in parts:
        return LowRank(_flat(a), _flat(b)), b.shape[2:]
    middle = _matrix(parts, core)
    return tucker(middle, _flat(a).T, _flat(b)), middle.shape[2:]


def side(parts: Parts, number: int) -> tuple[LowRank | Dense, tuple[int, ...]]:
    """One factor of a Kronecker product, full or as a product, and its kernel."""
    stem = f"lokr_w{number}"
    if stem not in parts:
        return _product(parts, stem, f"lokr_t{number}")
    # Only one of them is used, and the file does not say which.
    if f"{stem}_a" in parts or f"{stem}_b" in parts:
        raise FormatError(f"{parts[stem][0]} is stored both in full and in factors", fix=SAVE_AGAIN)
    factor = _matrix(parts, stem)
    return Dense(factor), factor.shape[2:]


def _companions(name: str, parts: Parts, module: Update | None) -> dict[str, Extra]:
    """The extras of a module: differences of biases and norms, magnitudes, tensors of other algorithms."""
    algorithm = _algorithm(parts)
    # An α without an update is carried along, too.
    used = (*algorithm.parts, "alpha") if algorithm else ()
    extra = kohya.kohya_extras(name, parts, module, used)
    # The difference of a norm, which `_algorithm` does not take.
    roles = _ROLES if algorithm else {**_ROLES, "diff": ("diff", "weight")}
    for part in roles.keys() & parts.keys():
        key, (role, parameter) = parts[part][0], roles[part]
        extra[key] = replace(extra[key], role=role, parameter=parameter)
    return extra


def _no_update_error(foreign: Mapping[str, int]) -> FormatError:
    if foreign:
        contents = "; ".join(f"{count} modules of {FOREIGN[part]}" for part, count in foreign.items())
        fix = "merge it with LyCORIS, and extract an adapter from the merged and the base model"
        return FormatError(f"holds no update that is a sum: {contents}", fix=fix)
    return FormatError(
        "holds no update of a weight matrix, only differences of biases and norms", fix="check that it is an adapter"
    )


def _findings(
    modules: Mapping[str, Update], extra: Mapping[str, Extra], foreign: Mapping[str, int]
) -> Iterator[Finding]:
    yield from kohya.about_scales(modules)
    yield from kohya.about_extras(extra)
    forms = Counter(module.form.name for module in modules.values() if isinstance(module, Structured))
    if forms:
        forms_text = ", ".join(f"{count} as {name}" for name, count in forms.items())
        text = f"{forms_text}: of more than half the full rank, so kept in this form, without B and A"
        yield Finding("note", "structured", text, "make pairs of them: loralens convert --rank R")
    added = [key for key, one in extra.items() if one.role in ("diff", "diff_b")]
    if added:
        text = f"{len(added)} tensors are differences of biases and norms, to be added: {', '.join(added[:3])}"
        yield Finding("note", "bias-differences", text)
    # What is left out changes the result, so every algorithm that is not read is named.
    for part, count in foreign.items():
        # The residual is only a part of an update. The rest of that update is read, and is wrong without the residual.
        # Of all other algorithms, whole updates are left out.
        level: Level = "error" if part == "bias_indices" else "warning"
        text = f"{count} modules hold {FOREIGN[part]}; loralens does not read it"
        yield Finding(level, "algorithm-unread", text, "merge the file with LyCORIS to have all of it")
