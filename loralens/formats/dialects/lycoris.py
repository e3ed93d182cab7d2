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

import numpy as np

from loralens.choices import Level
from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.base_model import image_models_of
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.matching import Shape, match
from loralens.core.model_in_memory import ModelPath
from loralens.core.structured import Dense, Form, Hadamard, Kronecker, Structured, Update
from loralens.core.weights import with_kernels
from loralens.errors import FormatError, MismatchError, ShapeError
from loralens.formats.dialects import kohya, pairs
from loralens.formats.dialects.pairs import SAVE_AGAIN, Leaf, Parts, match_leaf
from loralens.formats.files.container import Stored


def tucker(core: LazyArray, up: LazyArray, down: LazyArray) -> LowRank:
    """ΔW[o, i, k…] = Σ up[o, p] · core[p, q, k…] · down[q, i], as B (out, p) and A (p, in · k…)."""
    # The file may hold tensors of any shapes.
    if core.ndim < 2 or up.ndim != 2 or down.ndim != 2 or core.shape[:2] != (up.shape[1], down.shape[0]):
        what = f"core {core.shape} between {up.shape} and {down.shape} do not fit together"
        raise ShapeError(what, fix=SAVE_AGAIN)
    p, q = core.shape[:2]
    window, in_ = core.size // (p * q), down.shape[1]

    def product() -> Array:
        flat = core.read().astype(np.float64).reshape(p, q, window)
        matrix: Array = np.einsum("pqk,qi->pik", flat, *_wide(down)).reshape(p, in_ * window)
        return matrix

    return LowRank(up, _float32(product, (p, in_ * window)))


def hadamard(first: LowRank, second: LowRank) -> LowRank | Hadamard:
    """The product first ∘ second: B[:, (p, q)] = B₁[:, p] · B₂[:, q] and A[(p, q), :] = A₁[p, :] · A₂[q, :]."""
    if first.shape != second.shape:
        raise ShapeError(f"products {first.shape} and {second.shape} do not fit together", fix=SAVE_AGAIN)
    # The rank of a Hadamard product is at most the product of the ranks.
    (out, in_), rank = first.shape, first.rank * second.rank
    if not _narrow(rank, first.shape):
        return Hadamard(first, second)
    (B1, A1), (B2, A2) = first.factors, second.factors
    B = _float32(lambda: np.einsum("op,oq->opq", *_wide(B1, B2)).reshape(out, rank), (out, rank))
    A = _float32(lambda: np.einsum("pi,qi->pqi", *_wide(A1, A2)).reshape(rank, in_), (rank, in_))
    return LowRank(B, A)


def kronecker(first: LowRank | Dense, second: LowRank | Dense) -> LowRank | Kronecker:
    """kron(first, second) = kron(B₁, B₂) · kron(A₁, A₂); a full factor is itself times an identity."""
    first, second = _exact(first), _exact(second)
    # The Kronecker form knows the exact rank of the product.
    form = Kronecker(first, second)
    if not _narrow(form.rank, form.shape):
        return form
    (B1, A1), (B2, A2) = _split(first), _split(second)
    B = _float32(lambda: np.kron(*_wide(B1, B2)), (form.shape[0], form.rank))
    A = _float32(lambda: np.kron(*_wide(A1, A2)), (form.rank, form.shape[1]))
    return LowRank(B, A)


def _narrow(rank: int, shape: tuple[int, int]) -> bool:
    # A pair of a larger rank holds more numbers than the matrix: r·(out + in) against out·in, for a square one.
    return rank <= min(shape) / 2


def _exact(factor: LowRank | Dense) -> LowRank | Dense:
    """A factor whose nominal rank is not larger than its shape allows; a pair of a larger rank is multiplied out."""
    if isinstance(factor, Dense) or factor.rank <= min(factor.shape):
        return factor
    return Dense(LazyArray(factor.dense, shape=factor.shape, dtype=np.float64))


def _split(factor: LowRank | Dense) -> tuple[LazyArray, LazyArray]:
    if isinstance(factor, LowRank):
        return factor.factors
    matrix = factor.array.reshape(*factor.shape)
    identity = LazyArray.of(np.eye(factor.rank))
    # The identity is on the smaller side, where it is of the size of the factor's rank.
    return (matrix, identity) if factor.shape[1] == factor.rank else (identity, matrix)


def _wide(*arrays: LazyArray) -> list[Array]:
    return [array.read().astype(np.float64) for array in arrays]


def _float32(product: Callable[[], Array], shape: tuple[int, ...]) -> LazyArray:
    """``product``, rounded to float32. Larger numbers become infinite, as in the software that trained the adapter."""

    def read() -> Array:
        with np.errstate(all="ignore"):
            return product().astype(np.float32)

    return LazyArray(read, shape=shape, dtype=np.float32)


NAME = "lycoris"
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
        update=lambda _, parts: _update(parts),
        companions=_companions,
    )
    leaves = filter(None, map(lycoris_leaf, stored.tensors))
    foreign = Counter(leaf.part for leaf in leaves if leaf.part in FOREIGN)
    if not modules and foreign:
        contents = "; ".join(f"{count} modules of {FOREIGN[part]}" for part, count in foreign.items())
        fix = "merge it with LyCORIS, and extract an adapter from the merged and the base model"
        raise FormatError(f"holds no update that is a sum: {contents}", fix=fix)
    if not modules:
        what = "holds no update of a weight matrix, only differences of biases and norms"
        raise FormatError(what, fix="check that it is an adapter")
    findings = _findings(modules, extra, foreign)
    return pairs.make_adapter(stored, NAME, modules, extra, findings, base_model=kohya.base_model(stored))


def _update(parts: Parts) -> Update | None:
    """The update of a module; None for parts without an algorithm."""
    algorithm = _algorithm(parts)
    if not algorithm:
        return None
    product, kernel, rank = ALGORITHMS[algorithm](parts)
    # Without a factored side there is no r, and LyCORIS then ignores α.
    scaling = Scaling("given", origin=UNSCALED[algorithm]) if rank is None else kohya.kohya_scaling(parts, rank)
    plain = algorithm == "pair" and "mid" not in parts
    return update_of(parts, product, scaling, kernel, NAME if plain else "lycoris-product")


Product = tuple[LowRank | Form, tuple[int, ...], int | None]


def _locon(parts: Parts) -> Product:
    up, down = _matrix(parts, "B"), _matrix(parts, "A")
    if "mid" not in parts:
        return LowRank(_flat(up), _flat(down)), down.shape[2:], down.shape[0]
    core = _matrix(parts, "mid")
    return tucker(core, _flat(up), _flat(down)), core.shape[2:], down.shape[0]


def loha(parts: Parts) -> Product:
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


def lokr(parts: Parts) -> Product:
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


def _full(parts: Parts) -> Product:
    difference = _matrix(parts, "diff")
    return Dense(difference), difference.shape[2:], None


# why the update of an algorithm has no scale of its own
UNSCALED = {"lokr": "both sides are full: LyCORIS takes the scale as 1", "diff": "a full difference has no α"}


# algorithm → the function that makes from its parts the product, its kernel if the shapes show it, and its r
ALGORITHMS: Mapping[str, Callable[[Parts], Product]] = {"pair": _locon, "hada": loha, "lokr": lokr, "diff": _full}


def _algorithm_of(part: str) -> str:
    """The algorithm that has a part; empty for α and the parts of extras."""
    if part in ("A", "B", "mid"):
        return "pair"
    return part if part == "diff" else part[:4] if part.startswith(("hada_", "lokr_")) else ""


def _algorithm(parts: Parts) -> str:
    """The algorithm of a module; empty if it has no update of a matrix, as for a norm."""
    keys = {name: parts[part][0] for part in reversed(parts) if (name := _algorithm_of(part))}
    # The parts decide which algorithm it is: a module that has parts of two of them is refused.
    if len(keys) > 1:
        several = ", ".join(keys[name] for name in ALGORITHMS if name in keys)
        raise FormatError(f"holds several updates of one weight: {several}", fix="leave all but one out of the file")
    # The difference of a norm is a vector, which is an extra and no update of a matrix.
    return "" if keys.keys() == {"diff"} and parts["diff"][1].ndim < 2 else next(iter(keys), "")


def update_of(
    parts: Parts,
    product: LowRank | Form,
    scaling: Scaling,
    kernel: tuple[int, ...],
    form: str = "lycoris-product",
    *,
    flat: Layout = LINEAR,
) -> Update:
    """An update with its scale and layout, and with the tensors of the dialect ``form`` that it was read from.

    Factors may hold flattened kernels, which their shapes do not show; ``flat`` is the layout of factors without one.
    """
    layout = Layout("conv", kernel=kernel) if kernel else flat
    origin = pairs.origin_of(form, parts, [*filter(_algorithm_of, parts), "alpha"])
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
    # An α without an update is carried along, too.
    used = () if module is None else [*filter(_algorithm_of, parts), "alpha"]
    extra = kohya.kohya_extras(name, parts, module, used)
    # The difference of a norm, which `_algorithm` does not take.
    roles = {**_ROLES, "diff": ("diff", "weight")} if module is None else _ROLES
    for part in roles.keys() & parts.keys():
        key, (role, parameter) = parts[part][0], roles[part]
        extra[key] = replace(extra[key], role=role, parameter=parameter)
    return extra


def _findings(
    modules: Mapping[str, Update], extra: Mapping[str, Extra], foreign: Mapping[str, int]
) -> Iterator[Finding]:
    yield from kohya.about_scales(modules)
    yield from kohya.about_extras(extra)
    forms = Counter(module.form.name for module in modules.values() if isinstance(module, Structured))
    if forms:
        forms_text = ", ".join(f"{count} as {name}" for name, count in forms.items())
        text = f"{forms_text}: of more than half the full rank, so kept in this form, without B and A"
        yield Finding("note", "structured", text, "make pairs of them: loralens convert --to kohya --rank R")
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


# The names of layers that read the input of a model.
_FIRST = re.compile(
    r"(^|[._])(conv_?(in|1|first|stem)|stem|patch_?embed\w*|embed\w*|input\w*|features\.0)([._]|$)", re.IGNORECASE
)
# The dialects in the origins of such modules.
FLAT = ("lycoris-product", "peft-adalora", "peft-loha", "peft-lokr")


def with_known_kernels(adapter: Adapter, base: ModelPath | None) -> Adapter:
    """The adapter with the kernels of its convolutions, as far as they are known.

    The shape of a weight does not say whether the convolution has groups. It probably has if no other tensor of the
    base has as many rows as the weight reads channels, and it is not the first layer. A pair cannot be the update of
    such a weight, so the number of groups becomes 0, with which writers refuse it.
    """
    flat = {name: module for name, module in adapter.items() if module.origin and module.origin.format in FLAT}
    if not flat:
        return adapter
    known: Mapping[str, Shape] = {}
    grouped: list[str] = []
    if base is None:
        models = image_models_of(adapter) if adapter.format == "peft" else []
        if len(models) == 1:
            known = {name: models[0].find(name, module.shape)[0].shape for name, module in adapter.items()}
    else:
        from loralens.formats.models.checkpoint import shapes  # reading a base takes 6 ms to import

        stored = shapes(base)
        try:
            keys = match({name: module.shape for name, module in flat.items()}, stored, allow_missing=True).keys
        except MismatchError:  # of another model, which the verb says
            return adapter
        known = {name: stored[key] for name, key in keys.items()}
        grouped = [name for name, key in keys.items() if _may_be_grouped(key, stored)]
    modules: dict[str, Update] = {}
    for name, module in with_kernels(adapter, known).items():
        layout = replace(module.layout, groups=0) if name in grouped else module.layout
        # Nothing writes these dialects, so the tensors that were read stay, for what is said about the file.
        origin = adapter[name].origin
        if isinstance(module, LowRank):
            scaling = module.scaling
            modules[name] = LowRank(*module.factors, module.scale, scaling=scaling, layout=layout, origin=origin)
        else:
            modules[name] = replace(module, layout=layout, origin=origin)
    return replace(adapter, modules=modules)


def _may_be_grouped(key: str, stored: Mapping[str, Shape]) -> bool:
    """Whether a weight of the base is one of a convolution that probably has groups."""
    out, *inside = stored[key]
    if len(inside) < 2 or out % inside[0] or out == inside[0]:
        return False
    others = [shape for other, shape in stored.items() if other != key]
    # Of the input's channels there is no other convolution, while groups come in many blocks.
    is_first = _FIRST.search(key) and not any(len(shape) > 2 and shape[1] == inside[0] for shape in others)
    return not (is_first or any(shape[:1] == (inside[0],) for shape in others))
