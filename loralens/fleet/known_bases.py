"""Which base model names and shapes show: the table of known base models, and what fits it.

A style has the names of the modules in the blocks of a family of architectures, without the prefix of the model and
with ``#`` for every number, and their shapes in terms of a few sizes. A row of ``known_bases.csv`` has these sizes.
Models whose weights have equal names and shapes cannot be told apart from an adapter, so several rows may fit.
"""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, final

from loralens.core.adapter import Adapter
from loralens.core.base_model import FAMILIES, LONGEST, image_models_of
from loralens.core.image_models import likely_models
from loralens.core.names import normal_form
from loralens.fleet.catalogue import Signature

# Numbers that are whole parts of a name in normal form: those of blocks, layers and experts, and not the 1 of ``fc1``.
NUMBER = re.compile(r"(?<![^_])\d+(?![^_])")

# How people write families whose names are not simply capitalised.
SPELLINGS = {
    name.lower(): name
    for name in (
        "ALBERT", "BART", "BERT", "BLOOM", "CLIP", "DeBERTa", "DeepSeek", "DistilBERT", "DistilGPT", "ELECTRA", "ESM",
        "FLUX", "GLM", "GPT", "GPT-J", "InternLM", "LLaVA", "MiniCPM", "MiniLM", "MPNet", "MPT", "OLMo", "OPT",
        "PaliGemma", "RoBERTa", "SAM", "SigLIP", "SmolLM", "StableLM", "T5", "ViT", "XLM",
    )
}  # fmt: skip
# The name of a family, and its version, which is no number of parameters: llama-3-8b, qwen2.5-0.5b, but opt-125m.
_FAMILY = re.compile(
    rf"(?<![a-z])(?:tiny|code|open)?({'|'.join(sorted({*FAMILIES, 't5'}, key=len, reverse=True))})(?![a-z])"
    r"(?:[-v]?(\d(?:\.\d)?)(?![\d.]*[bm\d]))?"
)


@final
@dataclass(frozen=True, slots=True)
class Style:
    """Names and shapes of the modules in the blocks of a family of architectures.

    Attributes
    ----------
    prefix : str
        A regular expression of what may stand before the names: the parts that the class of a model adds.
    modules : mapping of str to str
        Name → its outputs and inputs, as two of the words h (hidden), m (MLP), q (all query heads), kv (all key
        heads), with a factor before the word if there is one.
    """

    prefix: str
    modules: Mapping[str, str]


def _style(prefix: str, **groups: str) -> Style:
    """A style from its shapes, each with the names that have it."""
    return Style(prefix, {name: shape for shape, names in groups.items() for name in names.split()})


_LLAMA = r"(?:(?:model|language_model|text_model|transformer)_)*"
STYLES: Mapping[str, Style] = {
    "llama": _style(
        _LLAMA,
        q_h="layers_#_self_attn_q_proj",
        kv_h="layers_#_self_attn_k_proj layers_#_self_attn_v_proj",
        h_q="layers_#_self_attn_o_proj",
        m_h="layers_#_mlp_gate_proj layers_#_mlp_up_proj",
        h_m="layers_#_mlp_down_proj",
    ),
    "phi3": _style(
        _LLAMA,
        qkv_h="layers_#_self_attn_qkv_proj",
        h_q="layers_#_self_attn_o_proj",
        mm_h="layers_#_mlp_gate_up_proj",
        h_m="layers_#_mlp_down_proj",
    ),
    "phi": _style(
        _LLAMA,
        h_h="layers_#_self_attn_q_proj layers_#_self_attn_k_proj layers_#_self_attn_v_proj layers_#_self_attn_dense",
        m_h="layers_#_mlp_fc1",
        h_m="layers_#_mlp_fc2",
    ),
    "gpt2": _style(
        r"(?:(?:model|transformer)_)*",
        qkv_h="h_#_attn_c_attn",
        h_h="h_#_attn_c_proj",
        m_h="h_#_mlp_c_fc",
        h_m="h_#_mlp_c_proj",
    ),
    "gpt-neo": _style(
        r"(?:(?:model|transformer)_)*",
        h_h="h_#_attn_attention_q_proj h_#_attn_attention_k_proj h_#_attn_attention_v_proj h_#_attn_attention_out_proj",
        m_h="h_#_mlp_c_fc",
        h_m="h_#_mlp_c_proj",
    ),
    "gpt-j": _style(
        r"(?:(?:model|transformer)_)*",
        h_h="h_#_attn_q_proj h_#_attn_k_proj h_#_attn_v_proj h_#_attn_out_proj",
        m_h="h_#_mlp_fc_in",
        h_m="h_#_mlp_fc_out",
    ),
    "gpt-neox": _style(
        r"(?:(?:model|gpt_neox)_)*",
        qkv_h="layers_#_attention_query_key_value",
        h_h="layers_#_attention_dense",
        m_h="layers_#_mlp_dense_h_to_4h",
        h_m="layers_#_mlp_dense_4h_to_h",
    ),
    "bloom": _style(
        r"(?:(?:model|transformer)_)*",
        qkv_h="h_#_self_attention_query_key_value",
        h_h="h_#_self_attention_dense",
        m_h="h_#_mlp_dense_h_to_4h",
        h_m="h_#_mlp_dense_4h_to_h",
    ),
    "opt": _style(
        r"(?:model_)*decoder_",
        h_h="layers_#_self_attn_q_proj layers_#_self_attn_k_proj layers_#_self_attn_v_proj layers_#_self_attn_out_proj",
        m_h="layers_#_fc1",
        h_m="layers_#_fc2",
    ),
    "bart": _style(
        r"(?:model_)*(?:encoder|decoder)_",
        h_h="layers_#_self_attn_q_proj layers_#_self_attn_k_proj layers_#_self_attn_v_proj "
        "layers_#_self_attn_out_proj layers_#_encoder_attn_q_proj layers_#_encoder_attn_k_proj "
        "layers_#_encoder_attn_v_proj layers_#_encoder_attn_out_proj",
        m_h="layers_#_fc1",
        h_m="layers_#_fc2",
    ),
    **{
        name: _style(
            f"(?:{name}_)?",
            h_h="encoder_layer_#_attention_self_query encoder_layer_#_attention_self_key "
            "encoder_layer_#_attention_self_value encoder_layer_#_attention_output_dense",
            m_h="encoder_layer_#_intermediate_dense",
            h_m="encoder_layer_#_output_dense",
        )
        for name in ("bert", "roberta", "electra")
    },
    "deberta": _style(
        r"(?:deberta_)?",
        h_h="encoder_layer_#_attention_self_query_proj encoder_layer_#_attention_self_key_proj "
        "encoder_layer_#_attention_self_value_proj encoder_layer_#_attention_output_dense",
        m_h="encoder_layer_#_intermediate_dense",
        h_m="encoder_layer_#_output_dense",
    ),
    "distilbert": _style(
        r"(?:(?:distilbert|transformer)_)*",
        h_h="layer_#_attention_q_lin layer_#_attention_k_lin layer_#_attention_v_lin layer_#_attention_out_lin",
        m_h="layer_#_ffn_lin1",
        h_m="layer_#_ffn_lin2",
    ),
    # The second names are those of transformers 5.
    "vit": _style(
        r"(?:vit_)?",
        h_h="encoder_layer_#_attention_attention_query encoder_layer_#_attention_attention_key "
        "encoder_layer_#_attention_attention_value encoder_layer_#_attention_output_dense "
        "layers_#_attention_q_proj layers_#_attention_k_proj layers_#_attention_v_proj layers_#_attention_o_proj",
        m_h="encoder_layer_#_intermediate_dense layers_#_mlp_fc1",
        h_m="encoder_layer_#_output_dense layers_#_mlp_fc2",
    ),
    # The second number of a name counts the parts of a block; `wi` has one only where the MLP is gated.
    **{
        name: _style(
            r"(?:transformer_)?(?:encoder|decoder)_",
            q_h="block_#_layer_#_SelfAttention_q block_#_layer_#_SelfAttention_k "
            "block_#_layer_#_SelfAttention_v block_#_layer_#_EncDecAttention_q "
            "block_#_layer_#_EncDecAttention_k block_#_layer_#_EncDecAttention_v",
            h_q="block_#_layer_#_SelfAttention_o block_#_layer_#_EncDecAttention_o",
            m_h=f"block_#_layer_#_DenseReluDense_{wi}",
            h_m="block_#_layer_#_DenseReluDense_wo",
        )
        for name, wi in (("t5", "wi"), ("t5-gated", "wi_#"))
    },
}


class KnownBase(NamedTuple):
    """A base model, or several whose weights have the same names and shapes.

    Attributes
    ----------
    name : str
        What people call it, in lower case.
    style : str
        The key of its `Style`.
    called : str
        A regular expression that the names of such models match, in lower case and without their organisation.
    blocks, hidden, mlp : int
    q, kv, qkv : int
        Outputs of the projections of queries, of keys, and of all three together. 0 stands for ``hidden``, for ``q``,
        and for q + 2 kv.
    """

    name: str
    style: str
    called: str
    blocks: int
    hidden: int
    mlp: int
    q: int
    kv: int
    qkv: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name of a module in a block → (out, in)."""
        q = self.q or self.hidden
        kv = self.kv or q
        sizes = {"h": self.hidden, "m": self.mlp, "mm": 2 * self.mlp, "q": q, "kv": kv, "qkv": self.qkv or q + 2 * kv}
        shapes = {}
        for name, words in STYLES[self.style].modules.items():
            out, _, in_ = words.partition("_")
            shapes[name] = sizes[out], sizes[in_]
        return shapes

    def is_called(self, base: str) -> bool:
        """Whether this is the base of that name."""
        return re.search(self.called, bare_base_name(base)) is not None


def bare_base_name(base: str) -> str:
    """The name of a base in lower case, without its organisation or folder, and with dashes between its parts."""
    return re.sub(r"[\s_]+", "-", re.split(r"[/\\]", base.rstrip("/\\"))[-1].lower())


@cache
def known_bases() -> tuple[KnownBase, ...]:
    """The table, from the published configurations of the models."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as stream:
        _, *rows = csv.reader(stream)
    return tuple(
        KnownBase(name, style, called, *(int(size or 0) for size in sizes)) for name, style, called, *sizes in rows
    )


class BlockModule(NamedTuple):
    """A module in a block: its name with ``#`` for numbers, the number of its block, and its shape."""

    pattern: str
    block: int
    shape: tuple[int, int]


def fitting_bases(signature: Signature) -> tuple[str, tuple[str, ...]]:
    """The base model of names and shapes, or "" if none or several fit, and every base that fits, best first.

    A base fits if it has every module of the adapter that is in a block, with its shape. It is the base only if it
    alone of those that fit has its last block among those of the adapter. An adapter with no module in the last block
    could also be for a larger base that the table does not have.
    """
    image = likely_models(dict(zip(signature.names, signature.shapes, strict=True)))
    modules = block_modules(signature)
    last = _last_block(modules)
    fitting = [] if image else [base for base in known_bases() if fits(base, modules)]
    best = [model.name for model in image] or [base.name for base in fitting if base.blocks == last + 1]
    larger = [base.name for base in fitting if base.blocks > last + 1]
    return best[0] if len(best) == 1 else "", (*best, *larger)


def block_modules(signature: Signature) -> list[BlockModule]:
    """The modules that are in blocks; heads and embeddings are not, as their sizes depend on task and vocabulary."""
    modules = []
    for name, shape in zip(signature.names, signature.shapes, strict=True):
        number = NUMBER.search(name)
        if number:
            modules.append(BlockModule(NUMBER.sub("#", name), int(number[0][:9]), shape))
    return modules


def fits(base: KnownBase, modules: list[BlockModule]) -> bool:
    """Whether a base has all these modules, with their shapes; no module fits no base."""
    return bool(modules) and all(
        module.block < base.blocks and base_shape(base, module.pattern) == module.shape for module in modules
    )


@cache
def base_shape(base: KnownBase, pattern: str) -> tuple[int, int] | None:
    """The shape that a module has in a base; None if the base has no such module."""
    return base.shapes().get(re.sub(f"^{STYLES[base.style].prefix}", "", pattern, count=1))


def infer_bases(signatures: Mapping[str, Signature], named: Mapping[str, Counter[str]]) -> Mapping[str, str]:
    """Digest of a signature → the base model that it shows; signatures that show none are left out.

    The table of known bases comes first. Where it does not decide, the neighbours do: adapters that name their base,
    have the same last block, and have a module in common by name (with the prefix of the model) and shape. They decide
    if they name exactly one base. If bases of the table fit, only these count.

    Parameters
    ----------
    signatures : mapping of str to Signature
        By their digests.
    named : mapping of str to Counter of str
        Digest → how many adapters with this signature name each base.
    """
    # An adapter with another last block is for another size of the model, or for another part of the same one.
    named_by: dict[tuple[int, BlockModule], set[str]] = defaultdict(set)
    modules = {digest: block_modules(signature) for digest, signature in signatures.items()}
    for digest, names in named.items():
        # A name that the modules contradict says nothing about them.
        bases = {base_name(base) for base in names if not contradicts(base, signatures[digest])}
        for module in modules[digest]:
            named_by[_last_block(modules[digest]), module] |= bases
    inferred = {}
    for digest, signature in signatures.items():
        name, candidates = fitting_bases(signature)
        last = _last_block(modules[digest])
        neighbours = {base for module in modules[digest] for base in named_by.get((last, module), ())}
        if candidates:
            neighbours &= {*candidates}
        if name or len(neighbours) == 1:
            inferred[digest] = name or neighbours.pop()
    return inferred


def _last_block(modules: Sequence[BlockModule]) -> int:
    return max((module.block for module in modules), default=-1)


@cache
def base_name(base: str) -> str:
    """The name of a base in the table, if exactly one row is called so; otherwise its plain name."""
    rows = [row.name for row in known_bases() if row.is_called(base)]
    return rows[0] if len(rows) == 1 else bare_base_name(base)


def contradicts(base: str, signature: Signature) -> str:
    """Why an adapter with these names and shapes cannot belong to the base of this name; empty if it can.

    Only bases that the table knows can be contradicted.
    """
    rows = [row for row in known_bases() if row.is_called(base)]
    modules = block_modules(signature)
    if not rows or not modules or any(fits(row, modules) for row in rows):
        return ""
    row = rows[0]
    for module in modules:
        own = base_shape(row, module.pattern)
        if own is None:
            return f"{row.name} has no module {module.pattern}"
        if own != module.shape:
            return f"{module.pattern} is {module.shape[0]} × {module.shape[1]}, and {own[0]} × {own[1]} in {row.name}"
    return f"it has block {_last_block(modules)}, and {row.name} has {row.blocks} blocks"


def family_of_base(base: str) -> str:
    """The family of models in the name of a base, with its version: ``Qwen2.5``, ``Llama3``; empty if it has none."""
    # Of several the last: DeepSeek-R1-Distill-Qwen-7B is a Qwen.
    found: list[tuple[str, str]] = _FAMILY.findall(bare_base_name(base[-LONGEST:]))
    name, version = found[-1] if found else ("", "")
    point = "." if name == "flux" and version else ""
    return SPELLINGS.get(name, name.capitalize()) + point + version


def family_of(adapter: Adapter) -> str:
    """The family of models that an adapter is for; several with "or" between them, and empty if nothing shows it.

    Names and shapes of image models come first, because some trainers write a name that they copied from a template.
    The name of the base comes next, then the known bases that fit names and shapes.
    """
    if models := image_models_of(adapter):
        return " or ".join(model.name for model in models)
    if family := family_of_base(adapter.base_model or ""):
        return family
    names, shapes = tuple(map(normal_form, adapter)), tuple(module.shape for module in adapter.modules.values())
    fitting = fitting_bases(Signature((), names, shapes))[1]
    # Versions of a family have the same shapes, such as Qwen2 and Qwen2.5.
    families = dict.fromkeys(filter(None, (family_of_base(name).rstrip(".0123456789") for name in fitting)))
    return next(iter(families)) if len(families) == 1 else ""
