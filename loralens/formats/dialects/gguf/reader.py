"""Reading GGUF adapters, which llama.cpp loads with ``--lora``.

=============  ======================================  =====================================================
kind           stored (shapes as NumPy has them)       here
=============  ======================================  =====================================================
linear         lora_a (r, in), lora_b (out, r)         the same; rows of q and k in Hugging Face's order
token_embd     lora_a (vocab, r), lora_b (dim, r)      A (r, vocab): out = dim, in = vocab
experts        lora_a (E, r, in), lora_b (E, out, r)   one module for each expert
=============  ======================================  =====================================================

There is one α for the whole file. The scale of a module is α/r, or 1 if α is 0 or missing (``get_scale`` in llama.cpp's
src/llama-adapter.h).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.errors import FormatError, MismatchError, ShapeError
from loralens.formats.dialects import pairs
from loralens.formats.dialects.gguf.architectures import (
    OWNER,
    Architecture,
    Heads,
    architecture_of,
    heads_in,
    heads_of,
    module_of,
    named_in_file,
    rotary,
    unpermute,
)
from loralens.formats.dialects.pairs import SAVE_AGAIN, Fields, Parts, match_leaf
from loralens.formats.files import gguf_file as gguf_values
from loralens.formats.files.container import Stored
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
    alpha = _alpha(plain)
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


def _alpha(plain: Fields) -> float:
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
        count = heads_in(tensor, heads, B.shape[0])
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
