"""Pairs as most dialects store them: two tensors under one name, as factors of a linear layer or convolution."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isclose, isfinite, prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Origin, Scaling
from loralens.core.names import expert, weight_name
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, MismatchError, ShapeError, place
from loralens.formats.files.container import FLOATS, Stored
from loralens.formats.files.json_text import finite_number

SAVE_AGAIN = "the file is incomplete: save the adapter again"
# what programs call the halves of a pair → their parts here; every other part keeps its name
_HALVES = {"down": "A", "up": "B", "a": "A", "b": "B"}
STORED = ("A", "B", "alpha", "embedding_A", "embedding_B")  # the parts of one module


class Leaf(NamedTuple):
    """A key in two parts: the module's name in the file, and which of its tensors it is (``A``, ``B``, ``alpha`` …)."""

    name: str
    part: str


Fields = Mapping[str, Any]  # of a configuration or a record
Tensors = Mapping[str, LazyArray]
Modules = Mapping[str, Update]
Extras = Mapping[str, Extra]
Metadata = Mapping[str, str] | None
Parts = dict[str, tuple[str, LazyArray]]  # part → key and tensor


def match_leaf(key: str, *patterns: re.Pattern[str]) -> Leaf | None:
    """The groups ``name`` and ``part`` of the first pattern that fits a key; None if none of them does."""
    matches = (pattern.match(key) for pattern in patterns)
    return next((Leaf(match["name"], _HALVES.get(match["part"], match["part"])) for match in matches if match), None)


def group(tensors: Tensors, leaf: Callable[[str], Leaf | None]) -> tuple[dict[str, Parts], dict[str, LazyArray]]:
    """Group tensors by module and part; returns also the tensors whose keys ``leaf`` does not know.

    Raises
    ------
    FormatError
        Two keys mean the same part of the same module.
    """
    modules: dict[str, Parts] = {}
    unpaired: dict[str, LazyArray] = {}
    for key, tensor in tensors.items():
        parsed = leaf(key)
        if parsed is None:
            unpaired[key] = tensor
            continue
        parts = modules.setdefault(parsed.name, {})
        # Two spellings of one key, such as a doubled prefix and a plain one.
        if parsed.part in parts:
            raise FormatError(f"{key} and {parts[parsed.part][0]} are the same tensor of one module", fix=SAVE_AGAIN)
        parts[parsed.part] = key, tensor
    return modules, unpaired


def gather(
    tensors: Tensors,
    leaf: Callable[[str], Leaf | None],
    *,
    update: Callable[[str, Parts], Update | None],
    companions: Callable[[str, Parts, Update | None], Extras],
) -> tuple[dict[str, Update], dict[str, Extra]]:
    """Read the modules and the extras of a file with two functions of a dialect.

    ``update`` builds the update from the parts of a name, or returns None if they are not an update. ``companions``
    gives the extras among these parts.
    """
    groups, unpaired = group(tensors, leaf)
    modules: dict[str, Update] = {}
    extra: dict[str, Extra] = {}
    for name, parts in groups.items():
        with place(name):
            module = update(name, parts)
            if module is not None:
                modules[name] = module
            extra.update(companions(name, parts, module))
    return modules, extra | unpaired_extras(unpaired)


def unfold(
    groups: Mapping[str, Parts],
    modules: Callable[[str, Parts], Iterable[tuple[str, LowRank]]],
    label: Callable[[str], str] = str,
) -> dict[str, Update]:
    """Read the modules of a file in which one stored pair may hold several, such as the experts of a stack.

    ``modules`` gives the names and updates of the modules that the parts of one name hold, and ``label`` what messages
    call that name.

    Raises
    ------
    FormatError
        Two pairs hold the same module.
    """
    unfolded: dict[str, Update] = {}
    for name, parts in groups.items():
        with place(label(name)):
            for module_name, module in modules(name, parts):
                if module_name in unfolded:
                    raise FormatError(f"{module_name} is stored twice", fix=SAVE_AGAIN)
                unfolded[module_name] = module
    return unfolded


def unpaired_extras(unpaired: Tensors) -> dict[str, Extra]:
    """Tensors without a known role as extras of the modules that their keys name."""
    return {key: Extra("other", key.rpartition(".")[0], tensor) for key, tensor in unpaired.items()}


def unread_findings(keys: Sequence[str]) -> list[Finding]:
    """The note about tensors that belong to no pair, if there are any."""
    text = f"{len(keys)} tensors belong to no pair and are kept unchanged: {', '.join(keys[:3])}"
    return [Finding("note", "tensor-unread", text)] if keys else []


def make_adapter(
    stored: Stored,
    form: str,
    modules: Modules,
    extra: Extras,
    findings: Iterable[Finding],
    *,
    base_model: str | None = None,
) -> Adapter:
    """The adapter of a file of the dialect ``form``, which keeps the file's configuration and metadata."""
    return Adapter(
        modules=modules,
        extra=extra,
        config=stored.config,
        metadata=stored.metadata,
        format=form,
        base_model=base_model,
        findings=tuple(findings),
    )


def check_float(key: str, tensor: LazyArray) -> None:
    """Refuse a tensor whose numbers are not floating point, such as the codes of a quantised adapter."""
    if tensor.dtype not in FLOATS:
        raise FormatError(f"{key} is {tensor.dtype}, not floating point", fix="save the adapter unquantised")


def check_not_empty(key: str, tensor: LazyArray) -> None:
    """Refuse a tensor without numbers. DeepSpeed ZeRO-3 leaves such tensors where parameters were not gathered."""
    if not tensor.size:
        fix = "save it again; under DeepSpeed ZeRO-3, gather first"
        raise ShapeError(f"{key} {tensor.shape} holds no numbers", fix=fix)


def tensors_of(parts: Parts, *names: str) -> tuple[LazyArray, ...]:
    """The tensors of these parts, of which at least one is there.

    Raises
    ------
    FormatError
        One of them is missing, or is not floating point.
    """
    for name in names:
        if name not in parts:
            # The message names a part that is there, by which the user finds the module in the file.
            key, tensor = next(parts[other] for other in names if other in parts)
            raise FormatError(f"{key} {tensor.shape} has no {name} beside it", fix=SAVE_AGAIN)
        check_float(*parts[name])
    return tuple(parts[name][1] for name in names)


def factors(parts: Parts, B: str = "B", A: str = "A", *, conv: bool = False) -> tuple[LazyArray, LazyArray]:
    """The tensors of parts ``B`` and ``A``: matrices, or with ``conv`` also tensors of more axes.

    Raises
    ------
    FormatError
        One of them is missing, or is not floating point.
    ShapeError
        One of them is empty, or they do not have the axes of a pair.
    """
    left, right = tensors_of(parts, B, A)
    # Whether the inner dimensions agree is checked where the pair is made.
    if not (right.ndim == 2 or (conv and right.ndim > 2)) or left.ndim != right.ndim or not left.size or not right.size:
        raise ShapeError(f"{parts[B][0]} {left.shape} and {parts[A][0]} {right.shape} are not a pair", fix=SAVE_AGAIN)
    return left, right


def read_pair(
    parts: Parts, form: str, scaling: Callable[[Parts, int], Scaling], B: str = "B", A: str = "A", *, conv: bool = True
) -> LowRank:
    """The update of linear factors B (out, r), A (r, in) or convolution ones B (out, r/groups, 1…), A (r, in, k…)."""
    left, right = factors(parts, B, A, conv=conv)
    found, origin = scaling(parts, right.shape[0]), origin_of(form, parts)
    # A linear factor has two axes, and a convolution has those of its kernel as well.
    left, right, layout = unpack_conv(left, right) if right.ndim > 2 else (left, right, Layout())
    return LowRank(left, right, found.value, scaling=found, layout=layout, origin=origin)


def unpack_conv(B: LazyArray, A: LazyArray) -> tuple[LazyArray, LazyArray, Layout]:
    """The factors of a convolution as matrices.

    A (r, in, k…) and B (out, r/groups, 1…) become A (r, in·k…) and B (out, r). B is block-diagonal if the convolution
    is grouped.
    """
    rank, out, width = A.shape[0], B.shape[0], B.shape[1] if B.ndim > 1 else 0
    groups = rank // width if width else 0
    # B must be r/groups wide, and the groups must divide its rows.
    if not groups or B.ndim != A.ndim or B.size != out * width or rank % width or out % groups:
        raise ShapeError(f"convolution factors A {A.shape} and B {B.shape} do not fit together", fix=SAVE_AGAIN)
    # B of a grouped convolution sees only the r/groups channels of its own group.
    flat = B.reshape(out, width)
    if groups > 1:
        mask = np.kron(np.eye(groups, dtype=bool), np.ones((out // groups, width), bool))
        flat = flat.map(lambda array: np.where(mask, np.tile(array, groups), 0), shape=(out, rank))
    return flat, A.reshape(rank, A.size // rank), Layout("conv", kernel=A.shape[2:], groups=groups)


def unpack_merged(
    B: LazyArray, enabled: Sequence[bool], rows: Sequence[Array] | None = None
) -> tuple[LazyArray, Layout]:
    """The factor B of fused projections of which only some slices are adapted.

    B holds the rows of the k enabled ones of n slices, without gaps. It becomes B (out, k·r): block i goes to the i-th
    r columns and to the rows of the i-th enabled slice. All other rows are zero. ``rows`` are the numbers of the rows
    of each slice; by default, the slices are equally high and follow each other.
    """
    count, rank = sum(enabled), B.shape[1]
    rows = rows or np.split(np.arange(B.shape[0] // count * len(enabled)), len(enabled))
    shape = sum(map(len, rows)), count * rank
    adapted = [numbers for numbers, on in zip(rows, enabled, strict=True) if on]

    def spread(array: Array) -> Array:
        full, start = np.zeros(shape, array.dtype), 0
        for i, numbers in enumerate(adapted):
            full[numbers, i * rank : (i + 1) * rank] = array[start : start + len(numbers)]
            start += len(numbers)
        return full

    return B.map(spread, shape=shape), Layout("merged", groups=count)


def pack_pair(module: Update) -> tuple[LazyArray, LazyArray]:
    """B and A as the factors of a linear layer or a convolution are stored; the inverse of `pair`.

    Raises
    ------
    ShapeError, MismatchError
        It is a changed update of a grouped convolution, which is no longer block-diagonal; or the kernel or the groups
        of the convolution are not known.
    """
    B, A = module.factors
    if module.layout.kind != "conv":
        return B, A
    kernel = module.layout.kernel
    if not kernel:
        raise MismatchError(
            "this is a convolution, and the file does not say its kernel, which its factors need",
            fix="give --base (in Python: load(…, base=…))",
        )
    if not module.layout.groups:
        raise MismatchError(
            "this may be a grouped convolution, which a pair cannot change as this update does: its weight reads "
            f"{module.shape[1] // prod(kernel)} channels, and no other tensor of the base has as many rows",
            fix="merge the adapter into its base: loralens merge",
        )
    # The stored B of a grouped convolution holds only the blocks, and a changed update has entries outside of them.
    if module.layout.groups > 1:
        what = "a changed update of a grouped convolution is no longer block-diagonal, and no dialect has another form"
        raise ShapeError(what, fix=LEAVE_OUT)
    # The canonical A has the kernel in its columns.
    channels = A.shape[1] // prod(kernel)
    return B.reshape(*B.shape, *(1 for _ in kernel)), A.reshape(A.shape[0], channels, *kernel)


def scale_tensor(tensor: LazyArray, scale: float, *, dtype: np.dtype[Any]) -> LazyArray:
    """``scale`` times a tensor, in float64 and rounded once to ``dtype``."""
    return tensor.map(lambda array: (array.astype(np.float64) * scale).astype(dtype), shape=tensor.shape, dtype=dtype)


def experts(
    name: str, B: LazyArray, A: LazyArray, *, scaling: Scaling, origin: Origin, turned: bool = False
) -> Iterator[tuple[str, LowRank]]:
    """The experts ``name[e]`` of a stack with B (E, out, r) and A (E, r, in); ``turned`` if both have the axes swapped.

    All experts have the same origin, whose tensors are written again if all are unchanged.
    """
    shared = replace(origin, share=B.shape[0])
    for e in range(B.shape[0]):
        B_e, A_e = (half.rows(e, e + 1).reshape(*half.shape[1:]) for half in (B, A))
        B_e, A_e = (B_e.T, A_e.T) if turned else (B_e, A_e)
        layout = Layout("experts")
        yield f"{name}[{e}]", LowRank(B_e, A_e, scaling.value, scaling=scaling, layout=layout, origin=shared)


def origin_of(form: str, parts: Parts, used: Iterable[str] = STORED) -> Origin:
    """The origin of a module: the stored tensors of the parts that it was read from."""
    return Origin(form, dict(parts[part] for part in used if part in parts))


def stored_parts(module: Update, form: str, leaf: Callable[[str], Leaf | None]) -> Parts:
    """The parts that a module was read from, if that was a file of the dialect ``form``; otherwise none."""
    if module.origin is None or module.origin.format != form:
        return {}
    return {found.part: (key, tensor) for key, tensor in module.origin.tensors.items() if (found := leaf(key))}


_NAMED = re.compile(r"(^|\.)(wte|wpe|\w*embed(ding|dings|_tokens|_in|_out)?|embed_\w+)$")


def is_embedding_name(name: str) -> bool:
    """Whether a module is an embedding by its name: ``embed_tokens``, ``wte``, ``word_embeddings`` …"""
    return bool(_NAMED.search(name))


MISSING = "no alpha in the file: scale 1"
WRITE_ALPHA = "save the adapter again with an alpha for every module"


def stored_scaling(parts: Parts, rank: int) -> Scaling:
    """α/r by the tensor ``alpha`` of a module; scale 1 if it has none."""
    if "alpha" not in parts:
        return Scaling("given", origin=MISSING)
    return Scaling("alpha/r", single_number(*parts["alpha"]), rank, "alpha in the file")


def single_number(key: str, tensor: LazyArray) -> float:
    """The number in a stored tensor, which must hold a single finite one."""
    # Trainers store it with no axes or with one of length 1.
    if tensor.size != 1:
        raise ShapeError(f"{key} has the shape {tensor.shape}, but one number is expected", fix=SAVE_AGAIN)
    # A bool or a complex number would be converted without an error.
    if tensor.dtype not in FLOATS and tensor.dtype.kind not in "iu":
        raise FormatError(f"{key} has the dtype {tensor.dtype}, which is not that of a number", fix=SAVE_AGAIN)
    value = float(tensor.read().reshape(-1)[0])
    if not isfinite(value):
        raise FormatError(f"{key} is {value}, not a finite number", fix="train or save the adapter again")
    return value


def alpha_for_file(module: Update) -> np.float32:
    """The α that a file has to hold so that α/r is the scale of a module.

    Raises
    ------
    FormatError
        No float32 gives this scale at this rank.
    """
    # The check below reports what float32 cannot hold.
    with np.errstate(all="ignore"):
        alpha = np.float32(module.scaling.alpha_for(module.scale, module.rank, "alpha/r"))
    # Rounding to float32 changes α by a relative 6e-8 at most; a larger difference is an overflow or an underflow.
    if not isclose(float(alpha) / module.rank, module.scale, rel_tol=1e-6):
        what = f"a scale of {module.scale:g} at rank {module.rank} has no α in float32"
        raise FormatError(what, fix="change the strength of the adapter first: loralens scale")
    return alpha


def alpha_findings(modules: Modules, metadata: Metadata) -> list[Finding]:
    """Findings about modules without an α: whether a scale of 1 is assumed or certain.

    ai-toolkit folds α into the factors and writes none, so there it is certain.
    """
    missing = [name for name, module in modules.items() if module.scaling.origin == MISSING]
    # A file without any α is common, and every program reads it at scale 1. Only a mixed file is doubtful.
    if 0 < len(missing) < len(modules):
        text = (
            f"{len(missing)} of {len(modules)} modules have no alpha (the first is {missing[0]}), and are taken at "
            "scale 1; programs disagree about such files"
        )
        return [Finding("warning", "alpha-missing", text, WRITE_ALPHA)]
    if missing and "ai-toolkit" in (metadata or {}).get("software", ""):
        return [Finding("note", "alpha-folded", "made by ai-toolkit, whose factors hold α already: the scale is 1")]
    return []


def alpha_unknown(title: str) -> Finding:
    """The finding for a file without an α, of a dialect that stores none."""
    text = f"{title} stores no α with its weights, so the scale is unknown and taken as 1"
    return Finding("warning", "alpha-unknown", text, "give --alpha (the scale is then α/r) or --scale")


def config_scaling(config: Fields | None, rank: int, *, r: str) -> Scaling:
    """α/r by ``lora_alpha`` of the configuration; ``r`` is the name of its field for the rank.

    A configuration with another rank belongs to another file, so the scale is then unknown.
    """
    fields = config or {}
    alpha = finite_number(fields.get("lora_alpha"))
    if alpha is None or fields.get(r, rank) != rank:
        return Scaling("unknown", rank=rank)
    return Scaling("alpha/r", alpha, rank, "adapter_config.json")


Stacks = Mapping[str, Modules]
Value = TypeVar("Value")


def group_by_pair(adapter: Adapter) -> Stacks:
    """Modules by the name of the weight that they adapt; the experts of a stack are in one group, in their order."""
    stacks: dict[str, dict[str, Update]] = {}
    for name, module in adapter.items():
        stacks.setdefault(weight_name(name) if module.layout.kind == "experts" else name, {})[name] = module
    return stacks


def is_as_read(modules: Collection[Update], form: str) -> bool:
    """Whether all modules of a stored pair of the dialect ``form`` are there and unchanged, apart from their scales."""
    first, *origins = (module.origin for module in modules)
    # One shared origin and as many modules as it had: nothing was removed, and nothing was changed.
    unchanged = first is not None and first.format == form and first.share == len(modules)
    return unchanged and all(origin == first for origin in origins)


def most_common(values: Iterable[Value], default: Value) -> Value:
    """The value that occurs most often; ``default`` if there are none."""
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else default


def stack_matrices(matrices: Sequence[LazyArray]) -> LazyArray:
    """Matrices of one shape as one array (E, m, n), in their dtype, or in float32 if their dtypes differ."""
    dtypes = {matrix.dtype for matrix in matrices}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    shape = (len(matrices), *matrices[0].shape)
    return LazyArray(lambda: np.stack([m.read().astype(dtype) for m in matrices]), shape=shape, dtype=dtype)


def stack_factors(modules: Modules, holder: str) -> tuple[LazyArray, LazyArray]:
    """B (E, out, r) and A (E, r, in) of the experts of a stack.

    Raises
    ------
    ShapeError
        The experts differ in shape, rank or dtype, or some are missing, so that they do not fit into one pair.
    """
    kinds = {(m.shape, m.rank, *(factor.dtype for factor in m.factors)) for m in modules.values()}
    if len(kinds) > 1:
        what = f"the experts of this stack differ in rank or dtype, but {holder} holds one for all"
        raise ShapeError(what, fix="give them one rank (--uniform)")
    # The numbers must be 0, 1, 2 … in order, and as many as in the file that the experts came from.
    numbers = [found.number for found in map(expert, modules) if found]
    shares = {module.origin.share for module in modules.values() if module.origin}
    if numbers != list(range(len(modules))) or shares - {len(modules)}:
        what = f"some experts of this stack are missing, but {holder} holds all"
        raise ShapeError(what, fix="keep all of them, or none")
    B, A = zip(*(module.factors for module in modules.values()), strict=True)
    return stack_matrices(B), stack_matrices(A)
