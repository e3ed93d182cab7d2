"""llama.cpp's architectures: their names, the weights of their models, and whether rows of q and k are permuted."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from loralens.core.base_model import text_config
from loralens.core.lazy import Array
from loralens.errors import MismatchError, OptionError

# The weights of most families: attention, gated MLP, routed and shared experts, and Mixtral's experts.
_QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_ATTENTION = f"{_QKV} self_attn.o_proj"
_EXPERTS = "mlp.experts.{e}.gate_proj mlp.experts.{e}.up_proj mlp.experts.{e}.down_proj"
_SHARED = "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj"
_MIXTRAL = "block_sparse_moe.gate " + " ".join(f"block_sparse_moe.experts.{{e}}.w{i}" for i in (1, 2, 3))
_TIED = "model.embed_tokens"  # no lm_head: in these families the head is the embedding
# All norms of those families, and the attention sinks of gpt-oss: tensors that an adapter has no pair for.
_NORMS = (
    "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm "
    "self_attn.q_norm self_attn.k_norm self_attn.sinks"
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of models in llama.cpp, and the names of their weights in Hugging Face's models.

    Attributes
    ----------
    name
        ``general.architecture`` of the base's GGUF file.
    classes, types
        The values of ``architectures`` and ``model_type`` in config.json.
    permuted
        Whether the rows of q and k have another order in llama.cpp's files.
    block
        The path of a block, with ``{bid}`` for its number.
    kinds
        The weights of a block; ``{e}`` is the number of an expert.
    outside
        The weights outside the blocks.
    norms, outside_norms
        Norms and other tensors without a matrix product, in a block and outside. A family need not have all of them.
    shift
        The constant that llama.cpp's files add to the weights of norms.
    """

    name: str
    classes: tuple[str, ...]
    types: tuple[str, ...]
    permuted: bool
    block: str
    shift: float
    kinds: tuple[str, ...]
    outside: tuple[str, ...]
    norms: tuple[str, ...]
    outside_norms: tuple[str, ...]


def _family(
    name: str,
    classes: str,
    types: str,
    *,
    permuted: bool = False,
    block: str = "model.layers.{bid}.",
    shift: float = 0.0,
    kinds: str = f"{_ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj",
    outside: str = "model.embed_tokens lm_head",
    norms: str = _NORMS,
    outside_norms: str = "model.norm",
) -> Architecture:
    """An architecture, with its names in texts."""
    names = (tuple(text.split()) for text in (kinds, outside, norms, outside_norms))
    return Architecture(name, tuple(classes.split()), tuple(types.split()), permuted, block, shift, *names)


ARCHITECTURES = (
    _family("llama", "LlamaForCausalLM LLaMAForCausalLM LlamaModel MistralForCausalLM MixtralForCausalLM "
            "InternLM3ForCausalLM LlavaForConditionalGeneration", "llama mistral mixtral internlm3", permuted=True,
            kinds=f"{_ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj {_MIXTRAL}"),
    _family("granite", "GraniteForCausalLM", "granite", permuted=True),
    _family("granitemoe", "GraniteMoeForCausalLM GraniteMoeSharedForCausalLM", "granitemoe granitemoeshared",
            permuted=True, kinds=f"{_ATTENTION} block_sparse_moe.router.layer "
            + _EXPERTS.replace("mlp", "block_sparse_moe")),
    _family("arcee", "ArceeForCausalLM", "arcee", permuted=True, kinds=f"{_ATTENTION} mlp.up_proj mlp.down_proj"),
    _family("smollm3", "SmolLM3ForCausalLM", "smollm3", permuted=True),
    _family("mistral3", "Ministral3ForCausalLM", "ministral3", permuted=True),
    _family("olmo", "OlmoForCausalLM OLMoForCausalLM", "olmo", permuted=True),
    _family("minicpm", "MiniCPMForCausalLM", "minicpm", permuted=True),
    _family("deepseek", "DeepseekForCausalLM", "deepseek", permuted=True,
            kinds=f"{_ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj mlp.gate {_EXPERTS} "
            + _SHARED.replace("expert", "experts")),
    _family("qwen2", "Qwen2ForCausalLM Qwen2Model", "qwen2"),
    _family("qwen3", "Qwen3ForCausalLM Qwen3Model", "qwen3"),
    _family("qwen2moe", "Qwen2MoeForCausalLM", "qwen2_moe",
            kinds=f"{_ATTENTION} mlp.gate {_EXPERTS} {_SHARED} mlp.shared_expert_gate"),
    _family("qwen3moe", "Qwen3MoeForCausalLM", "qwen3_moe", kinds=f"{_ATTENTION} mlp.gate {_EXPERTS}"),
    # Gemma multiplies by 1 + weight, and llama.cpp's converter adds the 1.
    _family("gemma", "GemmaForCausalLM", "gemma", outside=_TIED, shift=1.0),
    _family("gemma2", "Gemma2ForCausalLM", "gemma2", outside=_TIED, shift=1.0),
    _family("gemma3", "Gemma3ForCausalLM Gemma3TextModel Gemma3ForConditionalGeneration", "gemma3_text gemma3",
            shift=1.0),
    _family("phi3", "Phi3ForCausalLM", "phi3",
            kinds="self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    _family("phimoe", "PhimoeForCausalLM PhiMoEForCausalLM", "phimoe", kinds=f"{_ATTENTION} {_MIXTRAL}"),
    _family("gpt-oss", "GptOssForCausalLM", "gpt_oss", kinds=f"{_ATTENTION} mlp.router {_EXPERTS}"),
    _family("phi2", "PhiForCausalLM", "phi", kinds=f"{_QKV} self_attn.dense mlp.fc1 mlp.fc2",
            outside_norms="model.final_layernorm"),
    _family("starcoder2", "Starcoder2ForCausalLM", "starcoder2", kinds=f"{_ATTENTION} mlp.c_fc mlp.c_proj"),
    # Norms of q and k are one for each head in Hugging Face's models, and stacked in llama.cpp's.
    _family("stablelm", "StableLmForCausalLM", "stablelm", norms="input_layernorm post_attention_layernorm"),
    _family("command-r", "CohereForCausalLM", "cohere", outside=_TIED),
    _family("cohere2", "Cohere2ForCausalLM", "cohere2", outside=_TIED),
    _family("olmo2", "Olmo2ForCausalLM Olmo3ForCausalLM", "olmo2 olmo3"),
    _family("olmoe", "OlmoeForCausalLM", "olmoe", kinds=f"{_ATTENTION} mlp.gate {_EXPERTS}"),
    _family("seed_oss", "SeedOssForCausalLM", "seed_oss"),
    _family("gpt2", "GPT2LMHeadModel", "gpt2", block="transformer.h.{bid}.",
            kinds="attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", outside="transformer.wte lm_head", norms="ln_1 ln_2",
            outside_norms="transformer.ln_f transformer.wpe"),
    _family("bert", "BertModel BertForMaskedLM BertForSequenceClassification RobertaModel "
            "RobertaForSequenceClassification XLMRobertaModel", "bert roberta xlm-roberta",
            block="encoder.layer.{bid}.",
            kinds="attention.self.query attention.self.key attention.self.value attention.output.dense "
            "intermediate.dense output.dense", outside="embeddings.word_embeddings",
            norms="attention.output.LayerNorm output.LayerNorm",
            outside_norms="embeddings.LayerNorm embeddings.position_embeddings embeddings.token_type_embeddings"),
)  # fmt: skip


class Heads(NamedTuple):
    """The numbers of attention heads of q, and of k and v."""

    q: int
    kv: int


def architecture(name: object) -> Architecture | None:
    """The architecture for a name in llama.cpp, or for a class or model type of Hugging Face."""
    return next((f for f in ARCHITECTURES if name == f.name or name in f.classes or name in f.types), None)


def named_in_file(name: object) -> Architecture | None:
    """The architecture for llama.cpp's own name, not for a class of Hugging Face."""
    return next((family for family in ARCHITECTURES if name == family.name), None)


def architecture_in(text: str) -> Architecture | None:
    """The architecture whose name is in that of a model: qwen2 in Qwen/Qwen2.5-0.5B; only good enough for advice."""
    found = {
        match.end() - match.start(): known
        for known in ARCHITECTURES
        # A number at the end may be written apart, but is not the size of the model: gemma-2b is no gemma2.
        if (pattern := re.sub(r"(\d+)$", r"[-_ ]?\1(?!\\d*\\.?\\d*[bBmM]\\b)", re.escape(known.name)))
        and (match := re.search(rf"(?<![^\W\d_]){pattern}(?![^\W\d_])", text, re.IGNORECASE))
    }
    return found[max(found)] if found else None


def architecture_of(config: Mapping[str, Any] | None) -> Architecture | None:
    """The architecture of a base by its config.json."""
    text = text_config(config)
    lists = [part.get("architectures") for part in (text, config or {})]
    candidates = [name for names in lists if isinstance(names, list) for name in names]
    # The model type counts only if no class is stated: an unknown class is refused, even if its model type is known.
    candidates = candidates or [text.get("model_type")]
    return next(filter(None, map(architecture, candidates)), None)


def heads_of(config: Mapping[str, Any] | None, *, source: str = "the base's configuration") -> Heads | None:
    """The numbers of heads in a base's config.json; None if it has none.

    Raises
    ------
    OptionError
        They are not positive whole numbers.
    """
    text = text_config(config)
    # n_heads and n_kv_heads are the names in OLMo's own configurations.
    q = text.get("num_attention_heads", text.get("n_heads"))
    if q is None:
        return None
    kv = text.get("num_key_value_heads", text.get("n_kv_heads"))
    # Without grouped queries, every head has its own keys and values.
    heads = Heads(q, q if kv is None else kv)
    if not all(type(count) is int and count > 0 for count in heads):
        what = f"{source}: {heads.q!r:.20} and {heads.kv!r:.20} are not numbers of heads (queries; keys and values)"
        raise OptionError(what, fix="give the base that the adapter was trained on")
    return heads


_WRAPPERS = (  # prefixes that llama.cpp's converter replaces before it looks names up
    ("model.language_model.", "model."), ("language_model.", ""), ("bert.", ""), ("roberta.", ""), ("", "model."),
)  # fmt: skip
# The largest number of parts of a name. Names in the tables have at most eight, and the time of the search grows with
# the square of the number of parts.
MOST_PARTS = 16
# A single expert (….experts.3.w1) or one of a stack (….experts.gate_proj[3]).
_EXPERT = re.compile(
    r"^(?P<path>.+\.experts)\.(?P<number>\d{1,9})\.(?P<part>\w+)$|^(?P<stack>.+)\[(?P<item>\d{1,9})\]$"
)
_BLOCK = re.compile(r"^blk\.(\d{1,9})\.(.+)$")
# Mixtral's experts have this path in the tables of gguf for stacks: layers.N.feed_forward.experts.
_NAMES_MIXTRAL = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.")


class TensorPlace(NamedTuple):
    """The place of a module in a GGUF file: the tensor without ``.weight``, and its number in a stack of experts."""

    tensor: str
    expert: int | None


def place_of(module: str, arch: str) -> TensorPlace | None:
    """The place of a module in a GGUF file; None if the architecture has no tensor for it."""
    match = _EXPERT.match(module)
    if not match:
        tensor = _tensor(module, arch) or _tensor(f"{module}.layer", arch)  # Granite's router in memory
        return None if tensor is None or tensor.endswith("_exps") else TensorPlace(tensor, None)
    path = match["stack"] or f"{match['path']}.{match['part']}"
    tensor = _tensor(path, arch) or _tensor(_NAMES_MIXTRAL.sub("layers.\\1.feed_forward.experts.", path), arch)
    if tensor is None or not tensor.endswith("_exps"):
        return None
    return TensorPlace(tensor, int(match["number"] or match["item"]))


def _tensor(module: str, arch: str) -> str | None:
    names = _spellings(arch)
    for old, new in (("", ""), *_WRAPPERS):
        if not module.startswith(old):
            continue
        path = (new + module[len(old) :]).split(".")
        if len(path) > MOST_PARTS:
            continue
        # The number of the block may be any numeric part of the path, or the name may have none.
        for i, part in [(0, ""), *enumerate(path)]:
            if part and not part.isdecimal():
                continue
            pattern = ".".join([*path[:i], "{bid}", *path[i + 1 :]] if part else path)
            if pattern in names:
                return names[pattern].replace("{bid}", part)
    return None


@cache
def _spellings(arch: str) -> Mapping[str, str]:
    """Every spelling of a weight's name → the name of its tensor, with ``{bid}`` for the number of the block.

    This reads the tables of the package ``gguf`` directly, because making a `TensorNameMap` changes these tables.
    """
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap as Tables

    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == arch), None)
    if number is None:
        return {}
    # A family may have spellings of its own, which overrule the common ones.
    own = Tables.arch_block_mappings_cfg.get(number, {})
    names: dict[str, str] = {}
    for table in (Tables.mappings_cfg, {**Tables.block_mappings_cfg, **own}):
        for tensor, spellings in table.items():
            if tensor in MODEL_TENSORS[number]:
                names.update(dict.fromkeys((TENSOR_NAMES[tensor], *spellings), TENSOR_NAMES[tensor]))
    return names


def module_of(tensor: str, arch: Architecture | None, expert: int | None = None) -> str | None:
    """The Hugging Face name of a tensor; None if its architecture has none or several."""
    if arch is None:
        return None
    block = _BLOCK.match(tensor)
    pattern = _modules(arch).get(f"blk.{{bid}}.{block[2]}" if block else tensor)
    # A stack needs the number of an expert, and any other tensor must not have one.
    if pattern is None or ("{e}" in pattern) != (expert is not None):
        return None
    return pattern.format(bid=block[1] if block else "", e=expert)


def listed_name(module: str, arch: Architecture) -> str | None:
    """The name that an architecture lists for a module of any spelling; None if it lists none."""
    place = place_of(module, arch.name)
    return None if place is None else module_of(place.tensor, arch, place.expert)


def norm_of(tensor: str, arch: Architecture) -> str | None:
    """The Hugging Face name of a norm or another tensor without a matrix product; None if its family lists none."""
    block = _BLOCK.match(tensor)
    pattern = _norms(arch).get(f"blk.{{bid}}.{block[2]}" if block else tensor)
    return None if pattern is None else pattern.format(bid=block[1] if block else "")


@cache
def _modules(arch: Architecture) -> Mapping[str, str]:
    """Tensor names → patterns of the only module names that an architecture lists for them."""
    return _by_tensor(arch, [*arch.outside, *(arch.block + kind for kind in arch.kinds)])


@cache
def _norms(arch: Architecture) -> Mapping[str, str]:
    """Tensor names → patterns of the names of norms."""
    return _by_tensor(arch, [*arch.outside_norms, *(arch.block + norm for norm in arch.norms)])


def _by_tensor(arch: Architecture, patterns: list[str]) -> Mapping[str, str]:
    """Tensor names → the only pattern of a name with this tensor; tensors that several patterns have are left out."""
    names: dict[str, list[str]] = {}
    for pattern in patterns:
        spot = place_of(pattern.format(bid=0, e=0), arch.name)
        if spot:
            names.setdefault(spot.tensor.replace("blk.0.", "blk.{bid}."), []).append(pattern)
    return {tensor: found[0] for tensor, found in names.items() if len(found) == 1}


OWNER = "llama.cpp"  # the name of the software with this order in messages
# Only q and k are rotated, so only their rows are permuted.
_ROTARY = re.compile(r"^blk\.\d+\.attn_([qk])$")


def permute(rows: Array, heads: int) -> Array:
    """The rows of q or k, Hugging Face's order → llama.cpp's: within a head of d rows, row i + j·d/2 → 2·i + j."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: Array, heads: int) -> Array:
    """The rows of q or k, llama.cpp's order → Hugging Face's."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rotary(tensor: str) -> str | None:
    """``q`` or ``k`` if a tensor is one of these projections; otherwise None."""
    match = _ROTARY.match(tensor)
    return match[1] if match else None


def heads_in(part: str | None, heads: Heads, out: int) -> int:
    """The number of heads in the ``out`` rows of a projection, which is ``q`` or ``k``.

    Raises
    ------
    MismatchError
        The rows cannot be divided into this number of heads with an even number of rows each.
    """
    count = heads.q if part == "q" else heads.kv
    if out % (2 * count):
        raise MismatchError(
            f"{out} rows cannot be divided into {count} heads", fix="give the base that the adapter was trained on"
        )
    return count
