"""Pairs as most dialects store them: two tensors under one name, as factors of a linear layer or convolution."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Origin, Scaling
from loralens.errors import LEAVE_OUT, FormatError, MismatchError, ShapeError, place
from loralens.formats.files.container import FLOATS, Stored

if TYPE_CHECKING:
    from loralens.core.structured import Update

SAVE_AGAIN = "the file is incomplete: save the adapter again"
# what programs call the halves of a pair → their parts here; every other part keeps its name
_HALVES = {"down": "A", "up": "B", "a": "A", "b": "B"}


class Leaf(NamedTuple):
    """A key in two parts: the module's name in the file, and which of its tensors it is (``A``, ``B``, ``alpha`` …)."""

    name: str
    part: str


Parts = dict[str, tuple[str, LazyArray]]  # part → key and tensor


def match_leaf(key: str, *patterns: re.Pattern[str]) -> Leaf | None:
    """The groups ``name`` and ``part`` of the first pattern that fits a key; None if none of them does."""
    matches = (pattern.match(key) for pattern in patterns)
    return next((Leaf(match["name"], _HALVES.get(match["part"], match["part"])) for match in matches if match), None)


def group(
    tensors: Mapping[str, LazyArray], leaf: Callable[[str], Leaf | None]
) -> tuple[dict[str, Parts], dict[str, LazyArray]]:
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
    tensors: Mapping[str, LazyArray],
    leaf: Callable[[str], Leaf | None],
    *,
    update: Callable[[str, Parts], "Update | None"],
    companions: Callable[[str, Parts, "Update | None"], Mapping[str, Extra]],
) -> "tuple[dict[str, Update], dict[str, Extra]]":
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
    groups: Mapping[str, Parts], modules: Callable[[str, Parts], Iterable[tuple[str, LowRank]]]
) -> "dict[str, Update]":
    """Read the modules of a file in which one stored pair may hold several, such as the experts of a stack.

    ``modules`` gives the names and updates of the modules that the parts of one name hold.

    Raises
    ------
    FormatError
        Two pairs hold the same module.
    """
    unfolded: dict[str, Update] = {}
    for name, parts in groups.items():
        with place(name):
            for module_name, module in modules(name, parts):
                if module_name in unfolded:
                    raise FormatError(f"{module_name} is stored twice", fix=SAVE_AGAIN)
                unfolded[module_name] = module
    return unfolded


def unpaired_extras(unpaired: Mapping[str, LazyArray]) -> dict[str, Extra]:
    """Tensors without a known role as extras of the modules that their keys name."""
    return {key: Extra("other", key.rpartition(".")[0], tensor) for key, tensor in unpaired.items()}


def unread_findings(keys: Sequence[str]) -> list[Finding]:
    """The note about tensors that belong to no pair, if there are any."""
    text = f"{len(keys)} tensors belong to no pair and are kept unchanged: {', '.join(keys[:3])}"
    return [Finding("note", "tensor-unread", text)] if keys else []


def make_adapter(
    stored: Stored,
    form: str,
    modules: "Mapping[str, Update]",
    extra: Mapping[str, Extra],
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


def matrices(parts: Parts, *, names: tuple[str, str]) -> tuple[LazyArray, LazyArray]:
    """The tensors of parts ``B`` and ``A``, which must be matrices; ``names`` are those of the dialect, for messages.

    Raises
    ------
    FormatError
        One of them is missing, or is not floating point.
    ShapeError
        One of them is empty, or is not a matrix.
    """
    B, A = tensors_of(parts, "B", "A")
    # Whether the inner dimensions agree is checked where the pair is made.
    if A.ndim != 2 or B.ndim != 2 or not A.size or not B.size:
        what = f"{names[1]} {A.shape} and {names[0]} {B.shape} are not a pair of matrices"
        raise ShapeError(what, fix=SAVE_AGAIN)
    return B, A


def factors(parts: Parts, B: str = "B", A: str = "A") -> tuple[LazyArray, LazyArray]:
    """The tensors of parts ``B`` and ``A`` for `pair`; errors are those of `matrices`, but A may have more axes."""
    B_tensor, A_tensor = tensors_of(parts, B, A)
    # A vector could be neither factor.
    if A_tensor.ndim < 2 or not A_tensor.size or not B_tensor.size:
        raise ShapeError(f"B {B_tensor.shape} and A {A_tensor.shape} are not a pair", fix=SAVE_AGAIN)
    return B_tensor, A_tensor


def pair(B: LazyArray, A: LazyArray, *, scaling: Scaling, origin: Origin) -> LowRank:
    """The update of linear factors B (out, r), A (r, in) or convolution ones B (out, r/groups, 1…), A (r, in, k…)."""
    # A linear factor has two axes, and a convolution has those of its kernel as well.
    B, A, layout = unpack_conv(B, A) if A.ndim > 2 else (B, A, Layout())
    return LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)


def unpack_conv(B: LazyArray, A: LazyArray) -> tuple[LazyArray, LazyArray, Layout]:
    """The factors of a convolution as matrices.

    A (r, in, k…) and B (out, r/groups, 1…) become A (r, in·k…) and B (out, r). B is block-diagonal if the convolution
    is grouped.
    """
    rank, width = A.shape[0], B.shape[1] if B.ndim > 1 else 0
    # B must be r/groups wide, and the groups must divide its rows.
    if (
        not rank
        or B.ndim != A.ndim
        or B.size != B.shape[0] * width
        or not width
        or rank % width
        or B.shape[0] % (rank // width)
    ):
        raise ShapeError(f"convolution factors A {A.shape} and B {B.shape} do not fit together", fix=SAVE_AGAIN)
    # B of a grouped convolution sees only the r/groups channels of its own group.
    groups = rank // width
    flat = B.reshape(B.shape[0], width)
    if groups > 1:
        flat = flat.map(lambda array: block_diagonal(array, groups), shape=(B.shape[0], rank))
    return flat, A.reshape(rank, A.size // rank), Layout("conv", kernel=A.shape[2:], groups=groups)


def unpack_merged(B: LazyArray, enabled: Sequence[bool]) -> tuple[LazyArray, Layout]:
    """The factor B of fused projections of which only some slices are adapted.

    B (k·o, r) holds the k enabled ones of n slices. It becomes B (n·o, k·r): block i, B[i·o : (i+1)·o], goes to the
    i-th r columns and to the rows of the i-th enabled slice. All other rows are zero.
    """
    count = sum(enabled)
    rows, width = B.shape[0] // count, count * B.shape[1]

    def spread(array: Array) -> Array:
        full = np.zeros((len(enabled), rows, width), array.dtype)
        # A boolean mask selects the enabled slices in their order.
        full[list(enabled)] = block_diagonal(array, count).reshape(count, rows, width)
        return full.reshape(-1, width)

    return B.map(spread, shape=(rows * len(enabled), width)), Layout("merged", groups=count)


def pack_pair(module: "Update") -> tuple[LazyArray, LazyArray]:
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
            fix="merge the adapter into its base, or leave this module out first: loralens drop",
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


def block_diagonal(blocks: Array, groups: int) -> Array:
    """The blocks of a matrix (groups · o, c) on the diagonal of a matrix (groups · o, groups · c) of zeros."""
    rows, width = blocks.shape[0] // groups, blocks.shape[1]
    full = np.zeros((groups, rows, groups, width), blocks.dtype)
    for i in range(groups):
        full[i, :, i] = blocks[i * rows : (i + 1) * rows]
    return full.reshape(groups * rows, groups * width)


def origin_of(form: str, parts: Parts, used: Iterable[str] = ("A", "B")) -> Origin:
    """The origin of a module: the stored tensors of the parts that it was read from."""
    return Origin(form, dict(parts[part] for part in used if part in parts))


def stored_parts(module: "Update", form: str, leaf: Callable[[str], Leaf | None]) -> Parts:
    """The parts that a module was read from, if that was a file of the dialect ``form``; otherwise none."""
    if module.origin is None or module.origin.format != form:
        return {}
    return {found.part: (key, tensor) for key, tensor in module.origin.tensors.items() if (found := leaf(key))}


_NAMED = re.compile(r"(^|\.)(wte|wpe|\w*embed(ding|dings|_tokens|_in|_out)?|embed_\w+)$")


def is_embedding_name(name: str) -> bool:
    """Whether a module is an embedding by its name: ``embed_tokens``, ``wte``, ``word_embeddings`` …"""
    return bool(_NAMED.search(name))
