"""Which base model names and shapes show: the table of known base models, and what fits it.

A style has the names of the modules in the blocks of a family of architectures, without the prefix of the model and
with ``#`` for every number, and their shapes in terms of a few sizes. A row of the table has these sizes. Models whose
weights have equal names and shapes cannot be told apart from an adapter, so several rows may fit.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, final

from loralens.core.image_models import likely_models
from loralens.fleet.catalogue import Signature

# Numbers that are whole parts of a name in normal form: those of blocks, layers and experts, and not the 1 of ``fc1``.
NUMBER = re.compile(r"(?<![^_])\d+(?![^_])")


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
    """A style from its shapes, each with the names that have it; a ``{a,b}`` within a name stands for several."""
    modules = {}
    for shape, names in groups.items():
        for name in names.split():
            for spelled in _spellings(name):
                modules[spelled] = shape
    return Style(prefix, modules)


def _spellings(name: str) -> list[str]:
    """The names that a pattern like ``self_attn_{k,v}_proj`` stands for."""
    head, brace, after = name.partition("{")
    if not brace:
        return [name]
    words, _, tail = after.partition("}")
    return [spelled for word in words.split(",") for spelled in _spellings(f"{head}{word}{tail}")]


_LLAMA = r"(?:(?:model|language_model|text_model|transformer)_)*"
STYLES: Mapping[str, Style] = {
    "llama": _style(
        _LLAMA,
        q_h="layers_#_self_attn_q_proj",
        kv_h="layers_#_self_attn_{k,v}_proj",
        h_q="layers_#_self_attn_o_proj",
        m_h="layers_#_mlp_{gate,up}_proj",
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
        h_h="layers_#_self_attn_{q,k,v}_proj layers_#_self_attn_dense",
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
        h_h="h_#_attn_attention_{q,k,v,out}_proj",
        m_h="h_#_mlp_c_fc",
        h_m="h_#_mlp_c_proj",
    ),
    "gpt-j": _style(
        r"(?:(?:model|transformer)_)*", h_h="h_#_attn_{q,k,v,out}_proj", m_h="h_#_mlp_fc_in", h_m="h_#_mlp_fc_out"
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
        h_h="layers_#_self_attn_{q,k,v,out}_proj",
        m_h="layers_#_fc1",
        h_m="layers_#_fc2",
    ),
    "bart": _style(
        r"(?:model_)*(?:encoder|decoder)_",
        h_h="layers_#_{self,encoder}_attn_{q,k,v,out}_proj",
        m_h="layers_#_fc1",
        h_m="layers_#_fc2",
    ),
    **{
        name: _style(
            f"(?:{name}_)?",
            h_h="encoder_layer_#_attention_self_{query,key,value} encoder_layer_#_attention_output_dense",
            m_h="encoder_layer_#_intermediate_dense",
            h_m="encoder_layer_#_output_dense",
        )
        for name in ("bert", "roberta", "electra")
    },
    "deberta": _style(
        r"(?:deberta_)?",
        h_h="encoder_layer_#_attention_self_{query,key,value}_proj encoder_layer_#_attention_output_dense",
        m_h="encoder_layer_#_intermediate_dense",
        h_m="encoder_layer_#_output_dense",
    ),
    "distilbert": _style(
        r"(?:(?:distilbert|transformer)_)*",
        h_h="layer_#_attention_{q,k,v,out}_lin",
        m_h="layer_#_ffn_lin1",
        h_m="layer_#_ffn_lin2",
    ),
    # The second names are those of transformers 5.
    "vit": _style(
        r"(?:vit_)?",
        h_h="encoder_layer_#_attention_attention_{query,key,value} encoder_layer_#_attention_output_dense "
        "layers_#_attention_{q,k,v,o}_proj",
        m_h="encoder_layer_#_intermediate_dense layers_#_mlp_fc1",
        h_m="encoder_layer_#_output_dense layers_#_mlp_fc2",
    ),
    # The second number of a name counts the parts of a block; `wi` has one only where the MLP is gated.
    **{
        name: _style(
            r"(?:transformer_)?(?:encoder|decoder)_",
            q_h="block_#_layer_#_{SelfAttention,EncDecAttention}_{q,k,v}",
            h_q="block_#_layer_#_{SelfAttention,EncDecAttention}_o",
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
    blocks : int
    hidden, mlp : int
    called : str
        A regular expression that the names of such models match, in lower case and without their organisation.
    q, kv, qkv : int
        Outputs of the projections of queries, of keys, and of all three together. 0 stands for ``hidden``, for ``q``,
        and for q + 2 kv.
    """

    name: str
    style: str
    blocks: int
    hidden: int
    mlp: int
    called: str
    q: int = 0
    kv: int = 0
    qkv: int = 0

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


def _llama(name: str, blocks: int, hidden: int, q: int, kv: int, mlp: int, called: str) -> KnownBase:
    return KnownBase(name, "llama", blocks, hidden, mlp, called, q, kv)


@cache
def known_bases() -> tuple[KnownBase, ...]:
    """The table, from the published configurations of the models."""
    return (*_ENCODERS, *_DECODERS, *_LLAMAS)


_ENCODERS = (
    KnownBase("distilbert-base", "distilbert", 6, 768, 3072, r"distilbert"),
    KnownBase("bert-tiny", "bert", 2, 128, 512, r"^bert-tiny|bert-uncased-l-2-h-128"),
    KnownBase("bert-mini", "bert", 4, 256, 1024, r"^bert-mini"),
    KnownBase("bert-small", "bert", 4, 512, 2048, r"^bert-small"),
    KnownBase("bert-medium", "bert", 8, 512, 2048, r"^bert-medium"),
    KnownBase("bert-base", "bert", 12, 768, 3072, r"^bert-base"),
    KnownBase("bert-large", "bert", 24, 1024, 4096, r"^bert-large"),
    KnownBase("minilm-l6", "bert", 6, 384, 1536, r"minilm.*l-?6(?!\d)"),
    KnownBase("minilm-l12", "bert", 12, 384, 1536, r"minilm.*l-?12"),
    KnownBase("distilroberta-base", "roberta", 6, 768, 3072, r"distilroberta"),
    KnownBase("roberta-base or xlm-roberta-base", "roberta", 12, 768, 3072, r"^(xlm-)?roberta-base"),
    KnownBase("roberta-large or xlm-roberta-large", "roberta", 24, 1024, 4096, r"^(xlm-)?roberta-large"),
    KnownBase("electra-small", "electra", 12, 256, 1024, r"electra-small"),
    KnownBase("electra-base", "electra", 12, 768, 3072, r"electra-base"),
    KnownBase("electra-large", "electra", 24, 1024, 4096, r"electra-large"),
    KnownBase("deberta-v3-xsmall", "deberta", 12, 384, 1536, r"deberta-v3-xsmall"),
    KnownBase("deberta-v3-small", "deberta", 6, 768, 3072, r"deberta-v3-small"),
    KnownBase("deberta-v3-base", "deberta", 12, 768, 3072, r"deberta-v3-base"),
    KnownBase("deberta-v3-large", "deberta", 24, 1024, 4096, r"deberta-v3-large"),
    KnownBase("vit-base", "vit", 12, 768, 3072, r"^vit-base"),
    KnownBase("vit-large", "vit", 24, 1024, 4096, r"^vit-large"),
    KnownBase("t5-small", "t5", 6, 512, 2048, r"^t5-small"),
    KnownBase("t5-base", "t5", 12, 768, 3072, r"^t5-base"),
    KnownBase("t5-large", "t5", 24, 1024, 4096, r"^t5-large"),
    KnownBase("t5-3b", "t5", 24, 1024, 16384, r"^t5-3b", 4096),
    KnownBase("flan-t5-small or mt5-small", "t5-gated", 8, 512, 1024, r"(flan-|m)t5-small|t5-v1.1-small", 384),
    KnownBase("flan-t5-base or mt5-base", "t5-gated", 12, 768, 2048, r"(flan-|m)t5-base|t5-v1.1-base"),
    KnownBase("flan-t5-large or mt5-large", "t5-gated", 24, 1024, 2816, r"(flan-|m)t5-large|t5-v1.1-large"),
    KnownBase("flan-t5-xl or mt5-xl", "t5-gated", 24, 2048, 5120, r"(flan-|m)t5-xl|t5-v1.1-xl"),
    KnownBase("flan-t5-xxl or mt5-xxl", "t5-gated", 24, 4096, 10240, r"(flan-|m)t5-xxl|t5-v1.1-xxl"),
    KnownBase("bart-base", "bart", 6, 768, 3072, r"^bart-base"),
    KnownBase("bart-large", "bart", 12, 1024, 4096, r"^bart-large"),
    KnownBase("whisper-tiny", "bart", 4, 384, 1536, r"whisper-tiny"),
    KnownBase("whisper-base", "bart", 6, 512, 2048, r"whisper-base"),
    KnownBase("whisper-small", "bart", 12, 768, 3072, r"whisper-small"),
    KnownBase("whisper-medium", "bart", 24, 1024, 4096, r"whisper-medium"),
    KnownBase("whisper-large", "bart", 32, 1280, 5120, r"whisper-large"),
)
_DECODERS = (
    KnownBase("distilgpt2", "gpt2", 6, 768, 3072, r"distilgpt-?2"),
    KnownBase("gpt2", "gpt2", 12, 768, 3072, r"^gpt-?2(-small)?$|^dialogpt-small"),
    KnownBase("gpt2-medium", "gpt2", 24, 1024, 4096, r"^gpt-?2-medium|^dialogpt-medium"),
    KnownBase("gpt2-large", "gpt2", 36, 1280, 5120, r"^gpt-?2-large|^dialogpt-large"),
    KnownBase("gpt2-xl", "gpt2", 48, 1600, 6400, r"^gpt-?2-xl"),
    KnownBase("gpt-neo-125m", "gpt-neo", 12, 768, 3072, r"gpt-neo-125m"),
    KnownBase("gpt-neo-1.3b", "gpt-neo", 24, 2048, 8192, r"gpt-neo-1\.3b"),
    KnownBase("gpt-neo-2.7b", "gpt-neo", 32, 2560, 10240, r"gpt-neo-2\.7b"),
    KnownBase("gpt-j-6b", "gpt-j", 28, 4096, 16384, r"gpt-j"),
    KnownBase("pythia-14m", "gpt-neox", 6, 128, 512, r"pythia-14m"),
    KnownBase("pythia-70m", "gpt-neox", 6, 512, 2048, r"pythia-70m"),
    KnownBase("pythia-160m", "gpt-neox", 12, 768, 3072, r"pythia-160m"),
    KnownBase("pythia-410m", "gpt-neox", 24, 1024, 4096, r"pythia-410m"),
    KnownBase("pythia-1b", "gpt-neox", 16, 2048, 8192, r"pythia-1b"),
    KnownBase("pythia-1.4b", "gpt-neox", 24, 2048, 8192, r"pythia-1\.4b"),
    KnownBase("pythia-2.8b", "gpt-neox", 32, 2560, 10240, r"pythia-2\.8b"),
    KnownBase("pythia-6.9b", "gpt-neox", 32, 4096, 16384, r"pythia-6\.9b"),
    KnownBase("pythia-12b", "gpt-neox", 36, 5120, 20480, r"pythia-12b"),
    KnownBase("gpt-neox-20b", "gpt-neox", 44, 6144, 24576, r"gpt-neox-20b"),
    KnownBase("bloom-560m", "bloom", 24, 1024, 4096, r"bloomz?-560m"),
    KnownBase("bloom-1b1", "bloom", 24, 1536, 6144, r"bloomz?-1b1"),
    KnownBase("bloom-1b7", "bloom", 24, 2048, 8192, r"bloomz?-1b7"),
    KnownBase("bloom-3b", "bloom", 30, 2560, 10240, r"bloomz?-3b"),
    KnownBase("bloom-7b1", "bloom", 30, 4096, 16384, r"bloomz?-7b1"),
    KnownBase("falcon-7b", "bloom", 32, 4544, 18176, r"falcon-7b", qkv=4672),
    KnownBase("opt-125m", "opt", 12, 768, 3072, r"^opt-125m"),
    KnownBase("opt-350m", "opt", 24, 1024, 4096, r"^opt-350m"),
    KnownBase("opt-1.3b", "opt", 24, 2048, 8192, r"^opt-1\.3b"),
    KnownBase("opt-2.7b", "opt", 32, 2560, 10240, r"^opt-2\.7b"),
    KnownBase("opt-6.7b", "opt", 32, 4096, 16384, r"^opt-6\.7b"),
    KnownBase("opt-13b", "opt", 40, 5120, 20480, r"^opt-13b"),
    KnownBase("phi-1.5", "phi", 24, 2048, 8192, r"^phi-1[_.-]?5"),
    KnownBase("phi-2", "phi", 32, 2560, 10240, r"^phi-2"),
    KnownBase("phi-3-mini", "phi3", 32, 3072, 8192, r"^phi-3(\.5)?-mini"),
)
# name, blocks, hidden, outputs of q, outputs of k, MLP
_LLAMAS = tuple(
    _llama(*row)
    for row in (
        ("llama-7b", 32, 4096, 4096, 4096, 11008, r"llama-?(2-)?7b|vicuna-7b|alpaca-7b|codellama-7b"),
        ("llama-13b", 40, 5120, 5120, 5120, 13824, r"llama-?(2-)?13b|vicuna-13b"),
        ("llama-70b", 80, 8192, 8192, 1024, 28672, r"llama-?[23](\.\d)?-70b"),
        ("llama-3-8b", 32, 4096, 4096, 1024, 14336, r"llama-?3(\.\d)?-8b"),
        ("mistral-7b", 32, 4096, 4096, 1024, 14336, r"^mistral-7b|zephyr-7b"),
        ("mistral-nemo-12b", 40, 5120, 4096, 1024, 14336, r"mistral-nemo"),
        ("mistral-small-24b", 40, 5120, 4096, 1024, 32768, r"mistral-small"),
        ("llama-3.2-1b", 16, 2048, 2048, 512, 8192, r"llama-?3\.2-1b"),
        ("llama-3.2-3b", 28, 3072, 3072, 1024, 8192, r"llama-?3\.2-3b"),
        ("tinyllama-1.1b", 22, 2048, 2048, 256, 5632, r"tinyllama"),
        ("smollm-135m", 30, 576, 576, 192, 1536, r"smollm2?-135m"),
        ("smollm-360m", 32, 960, 960, 320, 2560, r"smollm2?-360m"),
        ("smollm-1.7b", 24, 2048, 2048, 2048, 8192, r"smollm2?-1\.7b"),
        ("olmo-1b", 16, 2048, 2048, 2048, 8192, r"^olmo-1b"),
        ("stablelm-2-1.6b", 24, 2048, 2048, 2048, 5632, r"stablelm-2-1[._]6b"),
        ("deepseek-coder-1.3b", 24, 2048, 2048, 2048, 5504, r"deepseek-coder-1\.3b"),
        ("deepseek-coder-6.7b", 32, 4096, 4096, 4096, 11008, r"deepseek-coder-6\.7b"),
        ("yi-6b", 32, 4096, 4096, 512, 11008, r"^yi-(1\.5-)?6b"),
        ("qwen1.5-0.5b", 24, 1024, 1024, 1024, 2816, r"qwen1\.5-0\.5b"),
        ("qwen1.5-1.8b", 24, 2048, 2048, 2048, 5504, r"qwen1\.5-1\.8b"),
        ("qwen1.5-7b", 32, 4096, 4096, 4096, 11008, r"qwen1\.5-7b"),
        ("qwen2-0.5b", 24, 896, 896, 128, 4864, r"qwen-?2(\.5)?(-coder)?-0\.5b"),
        ("qwen2-1.5b", 28, 1536, 1536, 256, 8960, r"qwen-?2(\.5)?(-coder|-math)?-1\.5b"),
        ("qwen2.5-3b", 36, 2048, 2048, 256, 11008, r"qwen-?2\.5(-coder)?-3b"),
        ("qwen2-7b", 28, 3584, 3584, 512, 18944, r"qwen-?2(\.5)?(-coder|-math)?-7b"),
        ("qwen2.5-14b", 48, 5120, 5120, 1024, 13824, r"qwen-?2\.5(-coder)?-14b"),
        ("qwen2.5-32b", 64, 5120, 5120, 1024, 27648, r"qwen-?2\.5(-coder)?-32b"),
        ("qwen2-72b", 80, 8192, 8192, 1024, 29568, r"qwen-?2(\.5)?-72b"),
        ("qwen3-0.6b", 28, 1024, 2048, 1024, 3072, r"qwen-?3-0\.6b"),
        ("qwen3-1.7b", 28, 2048, 2048, 1024, 6144, r"qwen-?3-1\.7b"),
        ("qwen3-4b", 36, 2560, 4096, 1024, 9728, r"qwen-?3-4b"),
        ("qwen3-8b", 36, 4096, 4096, 1024, 12288, r"qwen-?3-8b"),
        ("qwen3-14b", 40, 5120, 5120, 1024, 17408, r"qwen-?3-14b"),
        ("qwen3-32b", 64, 5120, 8192, 1024, 25600, r"qwen-?3-32b"),
        ("gemma-2b", 18, 2048, 2048, 256, 16384, r"gemma-(1\.1-)?2b"),
        ("gemma-7b", 28, 3072, 4096, 4096, 24576, r"gemma-(1\.1-)?7b"),
        ("gemma-2-2b", 26, 2304, 2048, 1024, 9216, r"gemma-?2-2b"),
        ("gemma-2-9b", 42, 3584, 4096, 2048, 14336, r"gemma-?2-9b"),
        ("gemma-2-27b", 46, 4608, 4096, 2048, 36864, r"gemma-?2-27b"),
        ("gemma-3-270m", 18, 640, 1024, 256, 2048, r"gemma-?3-270m"),
        ("gemma-3-1b", 26, 1152, 1024, 256, 6912, r"gemma-?3-1b"),
        ("gemma-3-4b", 34, 2560, 2048, 1024, 10240, r"gemma-?3-4b"),
        ("gemma-3-12b", 48, 3840, 4096, 2048, 15360, r"gemma-?3-12b"),
        ("gemma-3-27b", 62, 5376, 4096, 2048, 21504, r"gemma-?3-27b"),
    )
)


@final
@dataclass(frozen=True, slots=True)
class Identification:
    """What names and shapes say about the base model.

    Attributes
    ----------
    name : str
        The base, or empty if several or none fit.
    candidates : tuple of str
        Every base of the table whose weights have these names and shapes, best first; none if no base fits.
    """

    name: str
    candidates: tuple[str, ...] = ()


class BlockModule(NamedTuple):
    """A module in a block: its name with ``#`` for numbers, the number of its block, and its shape."""

    pattern: str
    block: int
    shape: tuple[int, int]


def identify_base(signature: Signature) -> Identification:
    """The base model that the table of known bases gives for names and shapes.

    A base fits if it has every module of the adapter that is in a block, with its shape. The name is given only if
    exactly one of the bases that fit has its last block among those of the adapter. An adapter with no module in the
    last block could also be for a larger base that the table does not have.
    """
    image = likely_models(dict(zip(signature.names, signature.shapes, strict=True)))
    if image:
        names = tuple(model.name for model in image)
        return Identification(names[0] if len(names) == 1 else "", names)
    modules = block_modules(signature)
    fitting = [base for base in known_bases() if fits(base, modules)]
    last = _last_block(modules)
    complete = [base.name for base in fitting if base.blocks == last + 1]
    larger = [base.name for base in fitting if base.blocks > last + 1]
    return Identification(complete[0] if len(complete) == 1 else "", (*complete, *larger))


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
    shapes, prefix = _shapes(base), _prefix(base.style)
    return bool(modules) and all(
        module.block < base.blocks and shapes.get(prefix.sub("", module.pattern, count=1)) == module.shape
        for module in modules
    )


@cache
def _shapes(base: KnownBase) -> dict[str, tuple[int, int]]:
    return base.shapes()


@cache
def _prefix(style: str) -> re.Pattern[str]:
    return re.compile(f"^{STYLES[style].prefix}")


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
    inferred = {}
    neighbours = _Neighbours({digest: signatures[digest] for digest in named if digest in signatures}, named)
    for digest, signature in signatures.items():
        identification = identify_base(signature)
        name = identification.name or neighbours.base_of(signature, identification)
        if name:
            inferred[digest] = name
    return inferred


@final
class _Neighbours:
    """The bases that adapters name, by the last block of their signature and by their modules."""

    def __init__(self, signatures: Mapping[str, Signature], named: Mapping[str, Counter[str]]) -> None:
        # An adapter with another last block is for another size of the model, or for another part of the same one.
        self._bases: dict[tuple[int, BlockModule], set[str]] = defaultdict(set)
        for digest, signature in signatures.items():
            # A name that the modules contradict says nothing about them.
            if bases := {base_name(base) for base in named[digest] if not contradicts(base, signature)}:
                modules = block_modules(signature)
                last = _last_block(modules)
                for module in modules:
                    self._bases[last, module] |= bases

    def base_of(self, signature: Signature, identification: Identification) -> str:
        """The one base that the neighbours of `infer_bases` name; empty if they name none or several."""
        modules = block_modules(signature)
        last = _last_block(modules)
        bases = {base for module in modules for base in self._bases.get((last, module), ())}
        if identification.candidates:
            bases &= set(identification.candidates)
        return bases.pop() if len(bases) == 1 else ""


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
    shapes, prefix = _shapes(row), _prefix(row.style)
    for module in modules:
        own = shapes.get(prefix.sub("", module.pattern, count=1))
        if own is None:
            return f"{row.name} has no module {module.pattern}"
        if own != module.shape:
            return f"{module.pattern} is {module.shape[0]} × {module.shape[1]}, and {own[0]} × {own[1]} in {row.name}"
    return f"it has block {max(module.block for module in modules)}, and {row.name} has {row.blocks} blocks"
