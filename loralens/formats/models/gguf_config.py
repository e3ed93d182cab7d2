"""What the config.json of a base would say, taken from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from loralens.errors import FormatError
from loralens.formats.dialects.gguf.architectures import ARCHITECTURES, Architecture, Heads
from loralens.formats.files.gguf.header import BROKEN
from loralens.formats.files.gguf.values import Value
from loralens.linalg.exact import Singles

ARCHITECTURE = "general.architecture"
# Field of config.json → key of GGUF behind the name of the architecture.
_FIELDS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "sliding_window": "attention.sliding_window",
    "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
# Field of rope_scaling → key of GGUF behind "rope.scaling.".
_SCALING = {
    "factor": "factor", "original_max_position_embeddings": "original_context_length",
    "attention_factor": "yarn_attn_factor", "extrapolation_factor": "yarn_ext_factor", "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}  # fmt: skip
# Of all models of Llama 3.1 to 3.3; the factor alone differs between them.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
ROPE_THETA = 10000.0  # llama.cpp's default of rope.freq_base
# ids of tokens
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def base_architecture(values: Mapping[str, Value]) -> Architecture:
    """The architecture of a GGUF model.

    Raises
    ------
    FormatError
        The file does not hold a model, or the weight names of its architecture are not known.
    """
    kind = _plain(values, "general.type")
    if kind not in (None, "model"):
        fix = "give the GGUF file of the model itself"
        raise FormatError(f"is a GGUF file of type {kind!a:.40}, not a model", fix=fix)
    name = _plain(values, ARCHITECTURE)
    architecture = next((each for each in ARCHITECTURES if each.name == name), None)
    if architecture is None:
        names = ", ".join(each.name for each in ARCHITECTURES)
        what = f"its architecture is {name!a:.40}, whose weight names are not known here (known: {names})"
        raise FormatError(what, fix="give the model that it was converted from, a folder with safetensors files")
    return architecture


def heads_of_gguf(values: Mapping[str, Value], arch: Architecture) -> Heads | None:
    """The numbers of heads, if all blocks have the same; None if the file states none, or if blocks differ."""
    q = _one_number(_plain(values, f"{arch.name}.attention.head_count"))
    kv = _one_number(_plain(values, f"{arch.name}.attention.head_count_kv", q))
    if q is None or kv is None:
        return None
    if not (0 < q < 1 << 20 and 0 < kv < 1 << 20):
        raise FormatError(f"{q} and {kv} are not numbers of heads (queries; keys and values)", fix=BROKEN)
    return Heads(q, kv)


def gguf_config(
    values: Mapping[str, Value],
    arch: Architecture,
    *,
    vocabulary: int | None,
    tied: bool,
    routed: bool,
    rope_factors: Singles | None = None,
) -> dict[str, Any]:
    """The fields of config.json that the metadata has, and what the tensors say.

    Parameters
    ----------
    values : mapping of str to Value
    arch : Architecture
    vocabulary : int or None
        The rows of the embedding.
    tied : bool
        Whether the model has no head of its own.
    rope_factors : float32 array or None
        The numbers of ``rope_freqs.weight``, by which the frequencies of positions are divided.
    routed : bool
        Whether it has experts. Mixtral has the architecture of Llama.
    """
    # All members of a family can be loaded as the first of its classes and types.
    own_class, own_type = arch.classes[0], arch.types[0]
    if arch.name == "llama" and routed:
        own_class, own_type = "MixtralForCausalLM", "mixtral"
    config: dict[str, Any] = {"architectures": [own_class], "model_type": own_type}
    numbers = {field: _one_number(_plain(values, f"{arch.name}.{key}")) for field, key in _FIELDS.items()}
    numbers |= {field: _one_number(_plain(values, f"tokenizer.ggml.{key}")) for field, key in _TOKENS.items()}
    config |= {field: number for field, number in numbers.items() if number is not None}
    scaling = _rope_scaling(values, arch)
    if rope_factors is not None and not scaling:
        scaling = _llama3_scaling(rope_factors, config.get("rope_theta", ROPE_THETA))
    if scaling:
        config["rope_scaling"] = scaling
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    config["tie_word_embeddings"] = tied
    names = (_plain(values, f"general.base_model.0.{key}") for key in ("repo_url", "name"))
    name = next((each for each in (*names, _plain(values, "general.name")) if isinstance(each, str) and each), None)
    if name:
        config["_name_or_path"] = name.removeprefix("https://huggingface.co/")
    return config


def _rope_scaling(values: Mapping[str, Value], arch: Architecture) -> dict[str, Any]:
    """How the model stretches its positions beyond those that it was trained on; empty if it does not."""
    stated = f"{arch.name}.rope.scaling"
    kind = _plain(values, f"{stated}.type")
    if not isinstance(kind, str) or kind == "none":
        return {}
    numbers = {field: _one_number(_plain(values, f"{stated}.{key}")) for field, key in _SCALING.items()}
    return {"rope_type": kind, **{field: number for field, number in numbers.items() if number is not None}}


def _llama3_scaling(factors: Singles, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3 that gives these factors; empty if none does.

    llama.cpp's converter states it in no key-value, and writes the factors as a tensor instead.
    """
    size = len(factors)
    wavelengths = 2 * np.pi * np.power(float(theta), np.arange(size) / size)
    largest = float(factors.max(initial=1.0))
    # 1 for short waves, the factor for long ones, and a straight line between the frequencies of both.
    between = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    smooth = np.clip(between, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / largest + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        return {}
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _plain(values: Mapping[str, Value], key: str, default: Any = None) -> Any:
    """The value of a key; a float32 as the shortest decimal number that stands for it, as in config.json."""
    if key not in values:
        return default
    value = values[key]
    return float(str(np.float32(value.value))) if value.kind == "f32" and not value.array else value.value


def _one_number(value: Any) -> Any:
    """A number, or the number that all blocks share; None for anything else."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
