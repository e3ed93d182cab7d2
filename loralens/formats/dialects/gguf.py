"""GGUF adapters, which llama.cpp loads with ``--lora``.

=============  ======================================  =====================================================
kind           stored (shapes as NumPy has them)       here
=============  ======================================  =====================================================
linear         lora_a (r, in), lora_b (out, r)         the same; rows of q and k in Hugging Face's order
token_embd     lora_a (vocab, r), lora_b (dim, r)      A (r, vocab): out = dim, in = vocab
experts        lora_a (E, r, in), lora_b (E, out, r)   one module for each expert
=============  ======================================  =====================================================

There is one α for the whole file. The scale of a module is α/r, or 1 if α is 0 or missing (``get_scale`` in llama.cpp's
src/llama-adapter.h). If one α gives the scale of every module by α/r, it is written. Otherwise (rsLoRA,
``alpha_pattern``, mixed scales, a scale of 0) each scale is multiplied into B, and α is 0. B is then float32 and
rounded once: the error of an entry of ΔW is at most 2⁻²⁴ of Σ|B||A|, and a scale that is a power of two causes none.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import ml_dtypes
import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.base_model import text_config
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.names import expert
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, MismatchError, OptionError, ShapeError, place
from loralens.formats.dialects import pairs
from loralens.formats.dialects.gguf_architectures import (
    ARCHITECTURES,
    OWNER,
    Architecture,
    Heads,
    TensorPlace,
    architecture,
    architecture_in,
    architecture_of,
    heads_in,
    heads_of,
    module_of,
    named_in_file,
    permute,
    place_of,
    rotary,
    unpermute,
)
from loralens.formats.dialects.pairs import (
    SAVE_AGAIN,
    Fields,
    Parts,
    is_as_read,
    match_leaf,
    stack_matrices,
    translatable_extras,
)
from loralens.formats.files import gguf_file as gguf_values
from loralens.formats.files.container import Stored
from loralens.formats.files.gguf_file import Value
from loralens.formats.files.json_text import plain_text

NAME = "gguf"
ARCHITECTURE, ALPHA = "general.architecture", "adapter.lora.alpha"
# Keys of our own: llama.cpp ignores them, and a file that has them can be read without its base.
HEADS, HEADS_KV = "loralens.attention.head_count", "loralens.attention.head_count_kv"
LARGEST = float(np.finfo(np.float32).max)  # α is float32 in llama.cpp
# llama.cpp's name of the token embedding
EMBEDDING = "token_embd"
STACK = "_exps"  # the end of the names of expert stacks

_LEAF = re.compile(r"^(?P<name>.+?)(?:\.weight)?\.lora_(?P<part>[ab])$")
# The address that llama.cpp's converter writes for the base.
_HUB = re.compile(r"^https://huggingface\.co/(?P<name>[\w.-]+/[\w.-]+)")


def detect(stored: Stored) -> bool:
    """Whether a file is a GGUF adapter by its key-values."""
    return stored.plain.get("general.type") == "adapter" and stored.plain.get("adapter.type") == "lora"


def read(stored: Stored) -> Adapter:
    """The adapter of a GGUF file.

    ``stored.config`` may be the config.json of the base, which has the numbers of heads that the order of the rows of q
    and k depends on. A file that loralens wrote has these numbers itself.

    Raises
    ------
    FormatError, ShapeError, MismatchError
        One half of a pair is missing, factors do not fit together, or the base has another architecture.
    """
    # An adapter that is read again (`restore_rows`) has metadata only.
    plain = gguf_values.plain_values(stored.metadata) if stored.metadata else dict(stored.plain)
    base = base_model_config(stored.config)
    name = plain.get(ARCHITECTURE)
    arch, of_base = named_in_file(name), architecture_of(base)
    if of_base and of_base is not arch:
        what = f"the adapter is for {name!a:.40}, but the base is {of_base.name}"
        raise MismatchError(what, fix="give the base that the adapter was trained on")
    # Other architectures keep Hugging Face's order of rows, whatever their heads are.
    heads = stated_heads(plain, base) if arch and arch.permuted else None
    alpha = _stated_alpha(plain)
    groups, unpaired = pairs.group(stored.tensors, lambda key: match_leaf(key, _LEAF))
    modules = pairs.unfold(groups, lambda tensor, parts: _modules(tensor, parts, arch, heads, alpha))
    extra = {key: _extra(key, tensor, arch) for key, tensor in unpaired.items()}
    findings = _findings(plain, list(groups), arch, heads, unpaired)
    # The Hub id of the base if the file has its address, else the name in the file.
    url = plain.get("general.base_model.0.repo_url")
    hub = _HUB.match(url) if isinstance(url, str) else None
    base_model = hub["name"] if hub else plain_text(plain.get("general.base_model.0.name"))
    return pairs.make_adapter(replace(stored, config=base), NAME, modules, extra, findings, base_model=base_model)


def restore_rows(adapter: Adapter, other: Adapter) -> Adapter:
    """``adapter`` with the rows of q and k in Hugging Face's order, by the numbers of heads of ``other``.

    Both must be for the same base. The adapter is returned unchanged if its rows are in order already, or if ``other``
    is not a GGUF file of the same architecture, or does not have the numbers of heads either.
    """
    if not (has_permuted_rows(adapter) and other.format == NAME):
        return adapter
    values, other_values = (gguf_values.plain_values(one.metadata) for one in (adapter, other))
    heads = stated_heads(other_values, other.config)
    if heads is None or values.get(ARCHITECTURE) != other_values.get(ARCHITECTURE):
        return adapter
    # The stored tensors are read once more, as if the numbers of heads had been in the file.
    tensors = {key: extra.tensor for key, extra in adapter.extra.items()}
    for module in adapter.modules.values():
        tensors |= module.origin.tensors if module.origin else {}
    config = {"num_attention_heads": heads.q, "num_key_value_heads": heads.kv}
    return read(Stored(tensors, adapter.metadata, config))


def has_permuted_rows(adapter: Adapter) -> bool:
    """Whether the rows of q and k are in llama.cpp's order, because the numbers of heads are unknown."""
    return any(finding.code == "rows-permuted" for finding in adapter.findings)


def base_model_config(config: Fields | None) -> Fields | None:
    """The configuration if it is one of a base model; None if it is PEFT's, which may lie beside the file."""
    return config if config and "peft_type" not in config and heads_of(config) else None


def stated_heads(plain: Fields, base: Fields | None) -> Heads | None:
    """The numbers of heads that loralens wrote into the file, else those of the base.

    Raises
    ------
    OptionError
        They are not positive whole numbers.
    """
    if HEADS in plain:
        fields = {"num_attention_heads": plain[HEADS], "num_key_value_heads": plain.get(HEADS_KV)}
        return heads_of(fields, source=f"{HEADS} and {HEADS_KV}")
    return heads_of(base)


def _stated_alpha(plain: Fields) -> float:
    alpha = plain.get(ALPHA, 0.0)
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= LARGEST
    # llama.cpp reads a float32. It would round any other number, and the scale would change.
    if not number or float(np.float32(alpha)) != alpha:
        raise FormatError(f"{ALPHA} is {alpha!r:.40}, not a finite float32", fix="convert the adapter again")
    return float(alpha)


def _modules(
    tensor: str, parts: Parts, arch: Architecture | None, heads: Heads | None, alpha: float
) -> Iterator[tuple[str, LowRank]]:
    """The modules that one stored pair holds: one module, or the experts of a stack."""
    B, A = pairs.tensors_of(parts, "B", "A")
    if not B.size or not A.size:
        raise ShapeError(f"lora_a {A.shape} or lora_b {B.shape} holds no numbers", fix=SAVE_AGAIN)
    if B.ndim != A.ndim or B.ndim != (3 if tensor.endswith(STACK) else 2):
        raise ShapeError(f"lora_a {A.shape} and lora_b {B.shape} do not have the shapes of a pair", fix=SAVE_AGAIN)
    origin = pairs.origin_of(NAME, parts)
    # get_scale of llama.cpp takes 0 as "no alpha".
    without_alpha = Scaling("given", origin=f"{ALPHA} is 0 or missing: 1")
    scaling = Scaling("alpha/r", alpha, B.shape[-1], ALPHA) if alpha else without_alpha
    if B.ndim == 3:
        if A.shape[0] != B.shape[0]:
            raise ShapeError(f"lora_a {A.shape} and lora_b {B.shape} have different numbers of experts", fix=SAVE_AGAIN)
        for e, (name, expert) in enumerate(pairs.experts(tensor, B, A, scaling=scaling, origin=origin)):
            # A listed name is that of a single expert's own linear layer.
            if listed := module_of(tensor, arch, e):
                name, expert = listed, LowRank(*expert.factors, expert.scale, scaling=scaling, origin=expert.origin)
            yield name, expert
        return
    layout = Layout()
    # llama.cpp looks rows of lora_a up by token, so the vocabulary is its first axis.
    if tensor == EMBEDDING:
        A, layout = A.T, Layout("embedding")
    if heads and rotary(tensor):
        count = heads_in(rotary(tensor), heads, B.shape[0])
        B = B.map(lambda rows: unpermute(rows, count), shape=B.shape)
    elif _stays_permuted(tensor, arch, heads):
        layout = Layout(rows=OWNER)
    name = module_of(tensor, arch) or tensor
    yield name, LowRank(B, A, scaling.value, scaling=scaling, layout=layout, origin=origin)


def _extra(key: str, tensor: LazyArray, arch: Architecture | None) -> Extra:
    """A tensor that is not half of a pair: a norm trained in full, as mergekit extracts them, or an unknown tensor."""
    name = key.removesuffix(".weight")
    role = "saved" if name.endswith("_norm") and tensor.dtype in (np.float32, np.float16) else "other"
    return Extra(role, module_of(name, arch) or name, tensor)


def _findings(
    plain: Fields,
    tensors: list[str],
    arch: Architecture | None,
    heads: Heads | None,
    unpaired: Mapping[str, LazyArray],
) -> Iterator[Finding]:
    # Names of llama.cpp can be compared with each other, but not with those of a Hugging Face model.
    strange = [tensor for tensor in tensors if not any(module_of(tensor, arch, e) for e in (None, 0))]
    if strange:
        text = f"{len(strange)} modules (the first is {strange[0]}) keep llama.cpp's names: for the architecture "
        text += f"{plain.get(ARCHITECTURE)!a:.40}, their Hugging Face names are not known"
        yield Finding("note", "names-unknown", text)
    turned = [tensor for tensor in tensors if _stays_permuted(tensor, arch, heads)]
    if turned:
        text = (
            f"the rows of {len(turned)} q and k projections are in llama.cpp's order, because the number of heads is "
            "not known: norms and singular values are right, but the rows of B and ΔW are not in the order of the model"
        )
        yield Finding("warning", "rows-permuted", text, "give the base's folder with --base")
    # The update depends on the text, so no single weight has it.
    if "adapter.alora.invocation_tokens" in plain:
        yield Finding("warning", "alora", "works only after its invocation tokens (aLoRA)", "do not merge it")
    norms = [key for key in unpaired if key.endswith("_norm.weight")]
    if norms:
        text = f"{len(norms)} norms were trained in full (the first is {norms[0]}), and llama.cpp ignores them"
        yield Finding("note", "norms-ignored", text)


def _stays_permuted(tensor: str, arch: Architecture | None, heads: Heads | None) -> bool:
    """Whether the rows of a tensor stay in llama.cpp's order; assumed if the architecture is unknown."""
    return rotary(tensor) is not None and heads is None and (arch is None or arch.permuted)


# GGUF has float64 as well, but llama.cpp cannot multiply with it.
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # the fields of config.json for their number
CLOSE = 1e-6  # relative; rounding α to float32 changes it by up to 6e-8

Stacks = Mapping[str, Mapping[int | None, str]]  # tensor → number of the expert → module


class _Target(NamedTuple):
    """The base model that the file is for.

    Attributes
    ----------
    arch
        llama.cpp's name of the architecture.
    family
        The entry of the architecture in `ARCHITECTURES`, if it has one.
    heads
        The heads of the base, if the rows of q and k have another order in llama.cpp's files.
    metadata
        The metadata of the GGUF file that the adapter was read from, if it is written for the same architecture.
    config
        The content of the base's config.json.
    """

    arch: str
    family: Architecture | None
    heads: Heads | None
    metadata: Mapping[str, str] | None
    config: Fields | None


def write(adapter: Adapter, arch: str | None = None, base_config: Fields | None = None) -> Stored:
    """The adapter as llama.cpp loads it.

    Parameters
    ----------
    adapter : Adapter
    arch : str, optional
        llama.cpp's name of the base's architecture, or Hugging Face's class; by default that of ``base_config``.
    base_config : mapping, optional
        The content of the base's config.json, with its architecture and its numbers of heads.

    Raises
    ------
    OptionError
        The architecture is unknown or contradictory, or the numbers of heads are needed and unknown.
    FormatError, ShapeError
        A GGUF adapter cannot hold something, which the message names.
    """
    target = _target(adapter, arch, base_config)
    if target.metadata is None:
        translatable_extras(adapter, (), "a GGUF adapter")
    stacks = _stacks(adapter, target)
    alpha = _common_alpha(adapter, target)
    heads = _required_heads(stacks, target)
    tensors: dict[str, LazyArray] = {}
    for tensor, modules in stacks.items():
        with place(next(iter(modules.values()))):
            updates = {number: adapter.modules[name] for number, name in modules.items()}
            tensors.update(_tensors(tensor, updates, target, alpha, heads))
    if target.metadata is not None:
        tensors.update((key, extra.tensor) for key, extra in adapter.extra.items())
    metadata = _metadata(adapter, target, alpha, heads)
    names = _names(stacks, target.family)
    return Stored(tensors, metadata, target.config, plain=gguf_values.plain_values(metadata), names=names)


def _target(adapter: Adapter, arch: str | None, config: Fields | None) -> _Target:
    requested = _requested_architecture(arch, config)
    if adapter.format == NAME:
        plain = gguf_values.plain_values(adapter.metadata)
        own = plain.get(ARCHITECTURE)
        # An adapter that was GGUF stays for its architecture, unless the user names another.
        if requested is None or requested.name == own:
            family = named_in_file(own)
            heads = stated_heads(plain, adapter.config) if family and family.permuted else None
            return _Target(str(own or ""), family, heads, adapter.metadata or {}, adapter.config)
    if requested is None:
        what = "a GGUF adapter has to state the architecture of its base, which is not known here"
        named = architecture_in(adapter.base_model or "")
        example = f"{named.name}, by the name of the base, {adapter.base_model}" if named else "llama, qwen2 …"
        raise OptionError(what, fix=f"give --arch ({example}) or the base's folder with --base")
    heads = stated_heads({}, base_model_config(config)) if requested.permuted else None
    return _Target(requested.name, requested, heads, None, config)


def _requested_architecture(arch: str | None, config: Fields | None) -> Architecture | None:
    """The architecture that the options name, checked for contradictions."""
    named, of_base = architecture(arch), architecture_of(config)
    choices = ", ".join(found.name for found in ARCHITECTURES)
    # A name that is not known gives no tensor names, and llama.cpp would load nothing.
    if arch is not None and named is None:
        raise OptionError(f"the architecture {arch[:40]!a} is none of those known here", fix=f"choose one of {choices}")
    if named and of_base and named is not of_base:
        raise OptionError(f"--arch says {named.name}, but the base is {of_base.name}", fix="leave out --arch")
    if config is not None and not named and not of_base:
        described = config.get("architectures") or config.get("model_type")
        what = f"the base's architecture {described!a:.60} is none of those known here: {choices}"
        raise OptionError(what, fix="give --arch if it is one of them under another name")
    return named or of_base


def _stacks(adapter: Adapter, target: _Target) -> Stacks:
    """Modules by the tensor that they belong to; a kind of weight or a dtype that llama.cpp cannot use is refused."""
    # Whether the head of the base is its embedding, by its configuration or else by its family.
    stated, family = (target.config or {}).get("tie_word_embeddings"), target.family
    tied = stated is True or (stated is None and family is not None and "lm_head" not in family.outside)
    stacks: dict[str, dict[int | None, str]] = {}
    for name, module in adapter.items():
        with place(name):
            spot, kind = place_of(name, target.arch), module.layout.kind
            # A file of an unknown architecture was read under llama.cpp's own names, and is written under them again.
            if spot is None and target.metadata is not None:
                spot = TensorPlace(*(expert(name) or (name, None)))
            if tied and (spot.tensor == "output" if spot else name.rpartition(".")[2] == "lm_head"):
                raise tied_head_error()
            if spot is None:
                raise FormatError(f"{target.arch} has no tensor of that name in llama.cpp", fix=LEAVE_OUT)
            # llama.cpp applies adapters to matrices only.
            if kind == "conv":
                raise FormatError("a GGUF adapter has no convolutions", fix=LEAVE_OUT)
            if (kind == "embedding") != (spot.tensor == EMBEDDING):
                raise FormatError(f"llama.cpp cannot adapt {spot.tensor} as {kind}", fix=LEAVE_OUT)
            for factor in module.factors:
                if factor.dtype not in DTYPES:
                    raise FormatError(f"llama.cpp cannot use factors of {factor.dtype}", fix="give --dtype float32")
            modules = stacks.setdefault(spot.tensor, {})
            # Several spellings of one weight have one tensor.
            if spot.expert in modules:
                raise FormatError(f"has the same place in a GGUF file as {modules[spot.expert]}", fix=LEAVE_OUT)
            modules[spot.expert] = name
    return stacks


def tied_head_error() -> FormatError:
    """The error for a pair of a head that is tied to the embedding."""
    return FormatError(
        "the base's head is its embedding, and llama.cpp has no output tensor of its own there to adapt",
        fix=f"{LEAVE_OUT}; or merge it into the base, which gives the head a weight of its own, and convert that model",
    )


def _common_alpha(adapter: Adapter, target: _Target) -> float:
    """The α that gives every scale by α/r; 0 if there is none, so that each scale has to be multiplied into B."""
    modules = adapter.modules.values()
    unscaled = all(module.scale == 1 for module in modules)
    if target.metadata is not None and unscaled and not gguf_values.plain_values(target.metadata).get(ALPHA):
        return 0.0  # as it was read
    exact = [module.scaling.alpha_for(module.scale, module.rank, "alpha/r") for module in modules]
    # The exact values of α may differ in the last bits of a float64, but round to the same float32.
    with np.errstate(over="ignore"):
        rounded = {float(np.float32(alpha)) for alpha in exact}
    alpha = rounded.pop() if len(rounded) == 1 else 0.0
    return alpha if isfinite(alpha) and all(abs(alpha - one) <= CLOSE * abs(one) for one in exact) else 0.0


def _required_heads(stacks: Stacks, target: _Target) -> Heads | None:
    """The numbers of heads if rows have to be permuted; otherwise None."""
    turned = [name for tensor, modules in stacks.items() if rotary(tensor) for name in modules.values()]
    if not turned or target.family is None or not target.family.permuted:
        return None
    # Rows of an adapter that was GGUF may stay in llama.cpp's order.
    if target.heads is None and target.metadata is None:
        order = f"llama.cpp has the rows of {turned[0]} in another order, head by head"
        what = f"{order}, but the number of heads is not known"
        raise OptionError(what, fix="give the base's folder with --base")
    return target.heads


def _tensors(
    tensor: str, modules: Mapping[int | None, Update], target: _Target, alpha: float, heads: Heads | None
) -> Mapping[str, LazyArray]:
    """The tensors lora_a and lora_b for one tensor of the base."""
    keys = f"{tensor}.weight.lora_a", f"{tensor}.weight.lora_b"
    if target.metadata is not None and _is_as_read(tensor, modules, alpha):
        origin = next(iter(modules.values())).origin
        assert origin
        return origin.tensors
    # Keys of experts are numbers; None is a tensor that is not a stack.
    if None not in modules:
        return dict(zip(keys, _stack(modules, target, alpha), strict=True))
    module = modules[None]
    B, A = _fold_scale(module, alpha), module.factors[1]
    if heads and rotary(tensor) and not module.layout.rows:
        count = heads_in(rotary(tensor), heads, B.shape[0])
        B = B.map(lambda rows: permute(rows, count), shape=B.shape)
    return dict(zip(keys, (A.T if tensor == EMBEDDING else A, B), strict=True))


def _is_as_read(tensor: str, modules: Mapping[int | None, Update], alpha: float) -> bool:
    """Whether the stored tensors still hold all modules of a tensor, at the scale that the file's α gives."""
    first = next(iter(modules.values())).origin
    scaled = alpha != 0 or all(module.scale == 1 for module in modules.values())
    # A renamed module belongs to another tensor.
    own = first and all(key.startswith((f"{tensor}.weight.", f"{tensor}.lora_")) for key in first.tensors)
    return bool(own) and scaled and is_as_read(modules.values(), NAME)


def _fold_scale(module: Update, alpha: float) -> LazyArray:
    """B for the file: times the scale and in float32 if the file's α does not give the scale."""
    B, scale = module.factors[0], module.scale
    if alpha or scale == 1:
        return B

    def fold(array: Array) -> Array:
        wide = array.astype(np.float64)
        with np.errstate(over="ignore"):
            scaled = (scale * wide).astype(np.float32)
        # An adapter that is infinite already is written as it is; only a new overflow is an error.
        if np.isfinite(wide).all() and not np.isfinite(scaled).all():
            raise FormatError(
                f"the scale {scale:g} cannot be multiplied into B: float32 overflows",
                fix="make the adapter weaker first: loralens scale",
            )
        return scaled

    return B.map(fold, shape=B.shape, dtype=np.float32)


def _stack(modules: Mapping[int | None, Update], target: _Target, alpha: float) -> tuple[LazyArray, LazyArray]:
    """The experts of a stack as lora_a (E, r, in) and lora_b (E, out, r)."""
    numbers = sorted(e for e in modules if e is not None)
    ordered = [modules[e] for e in numbers]
    # The number of experts: of the base, else of the file that they were read from, else all given.
    stated = (n for n in map(text_config(target.config).get, EXPERTS) if isinstance(n, int))
    shares = (module.origin.share for module in ordered if module.origin and module.origin.format == NAME)
    count = next(stated, None) or max((len(modules), *shares))
    if numbers != list(range(count)):
        what = f"{len(modules)} experts of this stack are adapted, but llama.cpp needs all, 0 to {count - 1}"
        raise ShapeError(what, fix=LEAVE_OUT)
    # One tensor holds all experts, so they need one shape and one rank.
    if len({(module.shape, module.rank) for module in ordered}) > 1:
        raise ShapeError("the experts of this stack differ in rank", fix="give them one rank (--uniform)")
    A = stack_matrices([module.factors[1] for module in ordered])
    return A, stack_matrices([_fold_scale(module, alpha) for module in ordered])


def _metadata(adapter: Adapter, target: _Target, alpha: float, heads: Heads | None) -> dict[str, str]:
    """The key-values: those of the file that was read with the new α, or those of a new file."""
    values: dict[str, Value] = {}
    if target.metadata is None:
        identity = {ARCHITECTURE: target.arch, "general.type": "adapter", "adapter.type": "lora"}
        named = {"general.base_model.count": 1, "general.base_model.0.name": adapter.base_model}
        new = identity | (named if adapter.base_model else {})
        new |= {HEADS: heads.q, HEADS_KV: heads.kv} if heads else {}
        kinds = {str: "str", int: "u32"}
        values = {key: Value(kinds[type(value)], array=False, value=value) for key, value in new.items()}
    carried = dict(target.metadata or {})
    # α is the only value that a change of the adapter changes.
    if target.metadata is None or gguf_values.plain_values(carried).get(ALPHA, 0.0) != alpha:
        carried = {key: text for key, text in carried.items() if gguf_values.from_text(key, text)[0] != ALPHA}
        values[ALPHA] = Value("f32", array=False, value=alpha)
    return {**carried, **dict(gguf_values.to_text(key, value) for key, value in values.items())}


def _names(stacks: Stacks, arch: Architecture | None) -> dict[str, str]:
    """The names that the reader will give to modules → their names here, where they differ."""
    names = {
        module_of(tensor, arch, number) or (tensor if number is None else f"{tensor}[{number}]"): name
        for tensor, modules in stacks.items()
        for number, name in modules.items()
    }
    return {read: name for read, name in names.items() if read != name}
