"""Four blocks of a 7B Llama in 4 bits: GGUF Q4_K and Q4_1 and a folder of NF4, of random codes with usual scales.

The GGUF file can have float16 numbers, too.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.synthetic_model import BLOCKS, SEVEN_B, TINY, VOCABULARY, Size, adapter, make_tiny

Bytes = NDArray[np.uint8]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
STEP = 0.005  # of weights with a standard deviation of 0.02, in 4 bits
SCALES = {"Q4_K": (0, 2), "Q4_1": (0, 2)}  # where the float16 numbers of a block are
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def gguf(path: Path, kind: str, size: Size = SEVEN_B) -> None:
    """A GGUF file of this type, made unless it is there."""
    if path.exists():
        return
    writer = GGUFWriter(path.with_suffix(".part"), "llama")
    writer.add_type("model")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(4096)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(size.config["num_attention_heads"])
    writer.add_head_count_kv(size.config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type({"F16": 1, "Q4_1": 3, "Q4_K": 15}[kind])
    # What llama.cpp asks of a model before it reads the weights: a vocabulary of single bytes.
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, VOCABULARY))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[1] * (VOCABULARY - 3)])
    for name, _, shape, type_ in _tensors(kind, size):
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, make, _, _ in _tensors(kind, size):
        writer.write_tensor_data(make())
    writer.close()
    path.with_suffix(".part").rename(path)


Made = tuple[str, Callable[[], NDArray[Any]], tuple[int, ...], GGMLQuantizationType]


def make_tiny_gguf(folder: Path, kind: str) -> tuple[Path, Path]:
    """A tiny GGUF model and its adapter."""
    made = folder / "model.gguf", make_tiny(folder)[1]
    gguf(made[0], kind, TINY)
    return made


def _tensors(kind: str, size: Size) -> Iterator[Made]:
    """Name, numbers, stored shape and type of every tensor; the numbers are made when they are written."""
    rng = np.random.default_rng(0)
    type_, floats, half = GGMLQuantizationType[kind], GGMLQuantizationType.F32, GGMLQuantizationType.F16

    def ones() -> NDArray[Any]:
        return np.ones(size.hidden, np.float32)

    def embedding() -> NDArray[Any]:
        return (0.02 * rng.standard_normal((VOCABULARY, size.hidden))).astype(np.float16)

    yield "token_embd.weight", embedding, (VOCABULARY, 2 * size.hidden), half
    yield "output.weight", embedding, (VOCABULARY, 2 * size.hidden), half
    yield "output_norm.weight", ones, (4 * size.hidden,), floats
    for block in range(BLOCKS):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{block}.{norm}.weight", ones, (4 * size.hidden,), floats
        for layer, (out, in_) in size.linear.items():
            numbers, nbytes = GGML_QUANT_SIZES[type_]
            row = in_ // numbers * nbytes

            def codes(out: int = out, row: int = row, nbytes: int = nbytes) -> NDArray[Any]:
                blocks = np.frombuffer(rng.bytes(out * row), np.uint8).reshape(-1, nbytes).copy()
                # A k-quant multiplies its scale by another of 6 bits, 32 on average.
                scale = np.array([STEP / (32 if kind == "Q4_K" else 1)], np.float16).view(np.uint8)
                for begin in SCALES[kind]:
                    blocks[:, begin : begin + 2] = scale
                return blocks.reshape(out, row)

            def floats16(out: int = out, in_: int = in_) -> NDArray[Any]:
                return (np.float32(0.02) * rng.standard_normal((out, in_), np.float32)).astype(np.float16)

            yield f"blk.{block}.{NAMES[layer]}.weight", floats16 if kind == "F16" else codes, (out, row), type_


def nf4(folder: Path) -> None:
    """A folder of NF4 as bitsandbytes and transformers store it, made unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(0), dict[str, NDArray[Any]]()
    for block in range(BLOCKS):
        stem = f"model.layers.{block}"
        for kind, (out, in_) in SEVEN_B.linear.items():
            key, size = f"{stem}.{kind}.weight", out * in_
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, in_]}
            tensors[key] = np.frombuffer(rng.bytes(size // 2), np.uint8).reshape(-1, 1)
            tensors[f"{key}.absmax"] = np.full(size // 64, 10 * STEP, np.float32)
            tensors[f"{key}.quant_map"] = np.array(NF4, np.float32)
            tensors[f"{key}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = np.ones(SEVEN_B.hidden, np.float16)
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[key] = (0.02 * rng.standard_normal((VOCABULARY, SEVEN_B.hidden))).astype(np.float16)
    tensors["model.norm.weight"] = np.ones(SEVEN_B.hidden, np.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
               "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**SEVEN_B.config, "quantization_config": section}, indent=2))


if __name__ == "__main__":
    data = Path(sys.argv[1])
    data.mkdir(parents=True, exist_ok=True)
    for kind in sys.argv[2:] or [*SCALES, "nf4"]:
        if kind == "nf4":
            nf4(data / "llama-4-blocks-nf4")
        else:
            gguf(data / f"llama-4-blocks.{kind}.gguf", kind)
    adapter(data / "llama-4-blocks-r16")
