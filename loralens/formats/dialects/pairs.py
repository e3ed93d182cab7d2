"""Pairs as most dialects store them: two tensors under one name, as factors of a linear layer or convolution."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, isfinite, prod
from typing import Any, NamedTuple, TypeVar, final

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Origin, Scaling
from loralens.core.names import expert, some, weight_name
from loralens.core.structured import Update
from loralens.core.together import MAGNITUDES, NORMS
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
    rank, (out, width) = A.shape[0], B.shape[:2] if B.ndim == A.ndim else (0, 0)
    groups = rank // width if width else 0
    # B must be r/groups wide, and the groups must divide its rows.
    if not groups or B.size != out * width or rank % width or out % groups:
        raise ShapeError(f"convolution factors A {A.shape} and B {B.shape} do not fit together", fix=SAVE_AGAIN)
    # B of a grouped convolution sees only the r/groups channels of its own group.
    flat = B.reshape(out, width)
    if groups > 1:
        mask = np.kron(np.eye(groups, dtype=bool), np.ones((out // groups, width), bool))
        flat = flat.map(lambda array: np.where(mask, np.tile(array, groups), 0), shape=(out, rank))
    return flat, A.reshape(rank, A.size // rank), Layout("conv", kernel=A.shape[2:], groups=groups)


def unpack_merged(
    B: LazyArray, A: LazyArray, enabled: Sequence[bool], rows: Sequence[Array] | None = None
) -> tuple[LazyArray, Layout]:
    """The factor B of fused projections of which only some slices are adapted, with A (k·r, in).

    B holds the rows of the k enabled ones of n slices, without gaps. It becomes B (out, k·r): block i goes to the i-th
    r columns and to the rows of the i-th enabled slice. All other rows are zero. ``rows`` are the numbers of the rows
    of each slice; by default, the slices are equally high and follow each other.
    """
    count, (height, rank) = sum(enabled), B.shape
    if A.shape[0] != count * rank or (rows is None and height % count):
        what = f"fused lora_A {A.shape} and lora_B {B.shape} do not fit {count} adapted slices"
        raise ShapeError(what, fix="correct enable_lora, or save the adapter again")
    rows = rows or np.split(np.arange(height // count * len(enabled)), len(enabled))
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


DROP = "convert with --drop-extra to leave it out"


def translatable_extras(adapter: Adapter, roles: Collection[str], title: str) -> Extras:
    """The extras of an adapter from another dialect, after a check that ``title`` can hold all their roles.

    Raises
    ------
    FormatError
        It has extras of other roles. The message names them; they are never dropped silently.
    """
    norms = [extra.module for extra in adapter.extra.values() if extra.role in NORMS]
    # The norms have to be computed from the base, which the caller does with --base.
    if norms:
        raise FormatError(
            f"the magnitudes of {len(norms)} DoRA modules are not in the file (the first is {norms[0]}), but {title} "
            "needs them",
            fix="give --base, so that the lengths in its weights are written; or merge it into the base",
        )
    lost = [f"{key} ({extra.role})" for key, extra in adapter.extra.items() if extra.role not in roles]
    if lost:
        fix = "convert with --drop-extra to leave them out"
        # PEFT saves embeddings with every resized vocabulary, whether they were trained or not.
        if any(extra.role == "embedding" for extra in adapter.extra.values()):
            fix += "; --base leaves out embeddings that PEFT saved although they equal the base's"
        raise FormatError(f"{title} has no place for {some(lost)}", fix=fix)
    return adapter.extra


DORA = ("magnitude", "magnitude_in")  # roles of extras that are a dora_scale
KINDS = ("linear", "conv", "merged")  # the kinds of weights that the programs with lora_up and lora_down adapt


@final
@dataclass(frozen=True)
class UpDown:
    """How the files of a dialect hold lora_up, lora_down and alpha, under names that may have several spellings.

    Attributes
    ----------
    leaf
        Splits a key into the name in the file and the part.
    canonical
        Maps a name in the file to the name that the reader gives.
    scaling
        The scale of stored parts at a rank.
    alpha
        The α of a module in the file.
    adapts
        The beginning of the message about a kind of weight that the dialect's programs do not adapt.
    """

    form: str
    leaf: Callable[[str], Leaf | None]
    canonical: Callable[[str], str]
    scaling: Callable[[Parts, int], Scaling]
    alpha: Callable[[Update], np.float32]
    adapts: str

    def is_as_read(self, module: Update) -> bool:
        """Whether the stored tensors still describe the module, including its scale."""
        parts = stored_parts(module, self.form, self.leaf)
        return bool(parts) and self.scaling(parts, module.rank).value == module.scale

    def write(
        self,
        adapter: Adapter,
        named: Callable[[str], str],
        roles: Collection[str],
        title: str,
        translate: "Translate",
    ) -> Stored:
        """The tensors of a file. A module that was read from such a file keeps its keys.

        ``named`` gives the name in the file for a module of another dialect, or refuses it; the other parameters are
        those of `translate_extras`, where ``translate`` gives the leaf of a key.

        Raises
        ------
        FormatError
            Two modules would be read under one name, or two extras would have one key, or the file cannot hold one.
        """
        files: dict[str, str] = {}
        owners: dict[str, str] = {}
        tensors: dict[str, LazyArray] = {}
        for name, module in adapter.items():
            with place(name):
                parts = stored_parts(module, self.form, self.leaf)
                stored_leaf = self.leaf(parts["A"][0]) if parts else None
                files[name] = file = stored_leaf.name if stored_leaf else named(name)
                # Dots and underscores may become the same, or several spellings may stand for one layer of a pipeline.
                owner = owners.setdefault(self.canonical(file), name)
                if owner != name:
                    raise FormatError(f"{owner} would be called {self.canonical(file)} too", fix=LEAVE_OUT)
                as_read = module.origin if self.is_as_read(module) else None
                tensors |= as_read.tensors if as_read else self._tensors(file, module, parts)
        # Magnitudes of layers that were joined into one matrix have no key of this dialect yet.
        own = {
            key: extra
            for key, extra in adapter.extra.items()
            if adapter.format == self.form and (extra.role not in DORA or self.leaf(key))
        }
        self._keep(tensors, own, adapter, files, named)
        others = replace(adapter, extra={key: extra for key, extra in adapter.extra.items() if key not in own})

        def translated(extra: Extra, module: Update, channels: int) -> tuple[str, LazyArray]:
            leaf, tensor = translate(extra, module, channels)
            return f"{files[extra.module]}.{leaf}", tensor

        add_tensors(tensors, translate_extras(others, roles, title, translated))
        names = {self.canonical(file): name for name, file in files.items() if self.canonical(file) != name}
        return Stored(dict(sorted(tensors.items())), names=names)

    def _tensors(self, file: str, module: Update, parts: Parts) -> dict[str, LazyArray]:
        """The three tensors of a module. Halves that are only rescaled stay as they were stored."""
        if module.layout.kind not in KINDS:
            what = f"{self.adapts} linear layers and convolutions, but this is of kind {module.layout.kind!r}"
            raise FormatError(what, fix=LEAVE_OUT)
        alpha = self.alpha(module)
        B, A = (parts["B"][1], parts["A"][1]) if parts else pack_pair(module)
        # There is no α that means a scale of 0 in kohya's software, so lora_up is written as zeros.
        if module.scale == 0 and alpha:
            B = B.map(np.zeros_like, shape=B.shape)
        keys = {"A": f"{file}.lora_down.weight", "B": f"{file}.lora_up.weight", "alpha": f"{file}.alpha"}
        keys |= {part: key for part, (key, _) in parts.items()}
        return {keys["B"]: B, keys["A"]: A, keys["alpha"]: LazyArray.of(np.array(alpha))}

    def _keep(
        self,
        tensors: dict[str, LazyArray],
        extras: Extras,
        adapter: Adapter,
        files: Mapping[str, str],
        named: Callable[[str], str],
    ) -> None:
        """Add the extras of an adapter that is written in its own dialect, under keys that name their modules.

        A module may have been renamed. A key is unchanged if all modules are as they were read, or if it still contains
        the name that the file gives to the module. Otherwise the name in the key is replaced.
        """
        # One renamed module is enough to check every key.
        as_read = all(module.origin and module.origin.format == self.form for module in adapter.modules.values())
        for key, extra in extras.items():
            parts = self.leaf(key)
            # A key of unknown form begins with its module, as the reader assumed, or names none.
            stem = parts.name if parts else extra.module if key.startswith(f"{extra.module}.") else ""
            if stem and not as_read:
                file = files.get(extra.module) or named(extra.module)
                key = key if self.canonical(stem) == self.canonical(file) else file + key[len(stem) :]
            add_tensors(tensors, {key: extra.tensor})


def dora_scale(extra: Extra, module: Update, channels: int) -> LazyArray:
    """A magnitude in the shape of a ``dora_scale``, which broadcasts over the weight."""
    axes = (channels, 1) if extra.role == "magnitude" else (1, channels)
    return extra.tensor.reshape(*axes, *(1 for _ in module.layout.kernel))


# An extra, its module and the number of channels → the key and the tensor in the file.
Translate = Callable[[Extra, Update, int], tuple[str, LazyArray]]


def translate_extras(
    adapter: Adapter, roles: Collection[str], title: str, translate: Translate
) -> dict[str, LazyArray]:
    """The extras of an adapter from another dialect, which have one number for each channel of their module.

    Raises
    ------
    FormatError, ShapeError
        ``title`` cannot hold extras of other roles, an extra has no module or another size, or two have one key.
    """
    tensors: dict[str, LazyArray] = {}
    for key, extra in translatable_extras(adapter, roles, title).items():
        with place(key):
            if extra.module not in adapter:
                raise FormatError("the file does not contain its module", fix=DROP)
            module = adapter.modules[extra.module]
            # A magnitude by input has one number for each input channel, whatever the kernel is.
            by_input = extra.role == "magnitude_in"
            channels = module.shape[1] // prod(module.layout.kernel) if by_input else module.shape[0]
            if extra.tensor.size != channels:
                what = f"{extra.tensor.shape} is not one number for each of {channels} channels"
                raise ShapeError(what, fix=SAVE_AGAIN)
            add_tensors(tensors, dict([translate(extra, module, channels)]))
    return tensors


def check_all_dora(adapter: Adapter, title: str, *, part: Callable[[str], str] = lambda _: "") -> None:
    """Refuse an adapter in which only some modules are DoRA.

    The software ``title`` makes all modules DoRA or none, in each group of modules that ``part`` tells by their names.
    """
    dora = {extra.module for extra in adapter.extra.values() if extra.role in MAGNITUDES}
    parts = {part(name) for name in dora}
    plain = [name for name in adapter if name not in dora and part(name) in parts]
    if plain:
        which = f"{len(plain)} of {len(adapter)} modules (the first is {plain[0]})"
        what = f"{which} have no DoRA magnitude, but {title} makes all of them DoRA"
        raise FormatError(what, fix=f"for the modules of one of the two kinds, {LEAVE_OUT}")


def check_encoder(name: str) -> None:
    """Refuse a layer of a text encoder whose name does not say which encoder of the pipeline it belongs to."""
    from loralens.core.image_names import lone_encoder  # its expressions take 5 ms to compile

    # A pipeline may have three text encoders with layers of the same names.
    if lone_encoder((name,)):
        first = name.partition(".")[0]
        raise FormatError(
            "is a text encoder's layer, but nothing says which of the pipeline's text encoders that is",
            fix="give the pipeline's folder with --base, or say it with loralens convert: "
            f"--prefix {first}.=text_encoder.{first}.",
        )


def add_tensors(tensors: dict[str, LazyArray], additions: Mapping[str, LazyArray]) -> None:
    """Add tensors to those of a file; two with the same key are refused."""
    for key, tensor in additions.items():
        if key in tensors:
            raise FormatError(f"{key} would be written twice", fix="leave one of the two out")
        tensors[key] = tensor


# kind of layout → role of a missing magnitude. PEFT and diffusers have one length for each output.
PEFT_NORMS = {"linear": "norms", "conv": "norms", "embedding": "norms"}
NOTHING = LazyArray.of(np.zeros(0, np.float32))  # the tensor of an extra for which the file has no numbers


def missing_magnitudes(modules: Modules, extra: Extras, roles: Mapping[str, str], key: str) -> dict[str, Extra]:
    """Extras with the roles ``norms`` and ``norms_in`` for the modules of a DoRA adapter that have no magnitude.

    Parameters
    ----------
    modules, extra
        The modules and extras of the adapter.
    roles : mapping of str to str
        Kind of layout → role. A kind that is missing here is never DoRA.
    key : str
        The key that the magnitude of a module would have in a file, with ``{}`` for the module's name.
    """
    with_magnitude = {item.module for item in extra.values() if item.role in MAGNITUDES}
    return {
        key.format(name): Extra(roles[module.layout.kind], name, NOTHING)
        for name, module in modules.items()
        # A stack of experts, for example, is never DoRA in PEFT.
        if name not in with_magnitude and module.layout.kind in roles
    }


def magnitude_findings(extra: Extras, *, software: str) -> list[Finding]:
    """The warning about missing magnitudes, if there are any."""
    missing = [item.module for item in extra.values() if item.role in NORMS]
    if not missing:
        return []
    count = sum(item.role in MAGNITUDES for item in extra.values())
    text = (
        f"{len(missing)} of {count} DoRA modules have no magnitude in the file (the first is {missing[0]}): {software} "
        "uses the lengths in W, W' = ‖W‖ · (W+ΔW)/‖W+ΔW‖, and so do commands that are given the base; without a base, "
        "only ΔW = scale·B·A is measured"
    )
    fix = "save the adapter again from training if it trained magnitudes"
    return [Finding("warning", "dora-magnitudes-missing", text, fix)]
