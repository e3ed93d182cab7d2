"""Small GGUF models on disk, written by the package `gguf` as llama.cpp's converter does, from weights with the names
and the order of rows of Hugging Face's models."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

HIDDEN, INNER, VOCAB, HEADS, HEADS_KV = 64, 96, 40, 4, 2
PERMUTED = ("llama", "granite", "smollm3", "arcee", "olmo")


def llama(*, blocks: int = 2, hidden: int = HIDDEN, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a small Llama, by their names in Hugging Face's models."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    for number in range(blocks):
        block, kv = f"model.layers.{number}.", hidden * HEADS_KV // HEADS
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = (hidden,)
        for kind, out in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{block}self_attn.{kind}_proj.weight"] = (out, hidden)
        inner = INNER * hidden // HIDDEN
        shapes |= {f"{block}mlp.{kind}_proj.weight": (inner, hidden) for kind in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (hidden, inner)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute``, on matrices and vectors."""
    out = rows.shape[0]
    return rows.reshape(heads, 2, out // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def random_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Rows of blocks of a type that the package cannot make: random bytes with small scales."""
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // numbers
    blocks = np.random.default_rng(seed).integers(0, 256, (count, nbytes), dtype=np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,))
    for begin in at:
        blocks[:, begin : begin + 2] = np.array([0.01], np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def stored_form(key: str, array: np.ndarray, arch: str, heads: tuple[int, int]) -> np.ndarray:
    """A weight as llama.cpp's converter turns it."""
    if arch in PERMUTED and "q_proj" in key:
        return permute(array, heads[0])
    if arch in PERMUTED and "k_proj" in key:
        return permute(array, heads[1])
    return array + 1 if arch.startswith("gemma") and key.endswith("norm.weight") else array


def gguf_name(key: str, arch: str, blocks: int = 4) -> str:
    """llama.cpp's name of a weight, by the tables of its converter."""
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
    name = get_tensor_name_map(number, blocks).get_name(key, try_suffixes=(".weight", ".bias"))
    assert name, key
    return str(name)


def write(
    path: Path,
    weights: Mapping[str, np.ndarray],
    *,
    arch: str = "llama",
    kinds: Mapping[str, str] | str = "Q4_1",
    heads: tuple[int, int] = (HEADS, HEADS_KV),
    values: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    alignment: int | None = None,
    tokens: list[str] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a model; gives back the numbers that every weight has then, in the order of Hugging Face.

    ``kinds`` is the type of matrices, or that of every key; vectors are F32. ``names`` are llama.cpp's names where the
    tables have none. The weights are written in the order in which they come.
    """
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name("small")
    writer.add_file_type(3)
    writer.add_block_count(2)
    writer.add_embedding_length(next(a.shape[1] for a in weights.values() if a.ndim == 2))
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_layer_norm_rms_eps(1e-5)
    listed = tokens or [f"t{i}" for i in range(1100)]  # longer than what is read
    writer.add_token_list(listed)
    writer.add_token_types([1] * len(listed))
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (values or {}).items():
        writer.add_key_value(key, value[0], value[1])
    numbers = {}
    for place, (key, array) in enumerate(weights.items()):
        kind = GGMLQuantizationType[(kinds if isinstance(kinds, str) else kinds.get(key, "F32"))]
        kind = kind if array.ndim > 1 else GGMLQuantizationType.F32
        stored = np.ascontiguousarray(stored_form(key, array, arch, heads), np.float32)
        try:
            data = quants.quantize(stored, kind)
        except NotImplementedError:
            data = random_bytes(kind, stored.shape, seed + place)
        name = (names or {}).get(key) or gguf_name(key, arch)
        writer.add_tensor(name, data, raw_dtype=kind)
        with suppress(NotImplementedError):  # a type that the package cannot read has no numbers
            read = np.asarray(quants.dequantize(np.ascontiguousarray(data), kind), np.float32)
            numbers[key] = _back(key, read, arch, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def _back(key: str, array: np.ndarray, arch: str, heads: tuple[int, int]) -> np.ndarray:
    """The inverse of `stored_form`: the rows whose numbers `permute` moved are moved back."""
    if arch in PERMUTED and ("q_proj" in key or "k_proj" in key):
        moved = permute(np.arange(len(array)), heads["k_proj" in key])
        back = np.empty_like(array)
        back[moved] = array
        return back
    return array - np.float32(1) if arch.startswith("gemma") and key.endswith("norm.weight") else array
