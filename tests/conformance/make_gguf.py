"""Tiny GGUF adapters written by the gguf package itself, and ΔW by the formula.

llama.cpp is no package, so numpy writes its rules out: α/r, the rows of q and k, the transposed token embedding.

Run by hand: ``python tests/conformance/make_gguf.py``.
"""

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
rng = np.random.default_rng(11)
BF16 = gguf.GGMLQuantizationType.BF16
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def drawn(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def times(b, a, scale):
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


def write(case, arch, alpha, tensors, expected, *, numbers=None, kinds=None):
    folder = HERE / case
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "adapter.gguf", arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in (numbers or {}).items():
        writer.add_uint32(key, value)
    for key, array in tensors.items():
        writer.add_tensor(key, array, raw_dtype=(kinds or {}).get(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, folder / "expected.safetensors")


def qwen2():
    """Ranks 2 and 3 under one α, float32 and float16, and a norm trained in full."""
    qb, qa = drawn(6, 2), drawn(2, 4)
    db, da = drawn(4, 3, dtype=np.float16), drawn(3, 6, dtype=np.float16)
    tensors = {
        "blk.0.attn_q.weight.lora_a": qa,
        "blk.0.attn_q.weight.lora_b": qb,
        "blk.0.attn_norm.weight": drawn(4),
        "blk.11.ffn_down.weight.lora_a": da,
        "blk.11.ffn_down.weight.lora_b": db,
    }
    expected = {
        "model.layers.0.self_attn.q_proj": times(qb, qa, 7 / 2),
        "model.layers.11.mlp.down_proj": times(db, da, 7 / 3),
    }
    write("gguf-qwen2", "qwen2", 7.0, tensors, expected)


def hugging_face_rows(rows, heads):
    """llama.cpp's row 2·i + j of a head of d rows is Hugging Face's row i + j·d/2, i < d/2, j < 2."""
    size = len(rows) // heads
    back = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            for j in range(2):
                back[head * size + i + j * size // 2] = rows[head * size + 2 * i + j]
    return back


def llama(case, numbers):
    """Three heads of q, one of k, each of 4 rows; with the numbers of heads in the file, and without."""
    qb, qa, kb, ka = drawn(12, 2), drawn(2, 6), drawn(4, 2), drawn(2, 6)
    tensors = {
        "blk.0.attn_q.weight.lora_a": qa,
        "blk.0.attn_q.weight.lora_b": qb,
        "blk.0.attn_k.weight.lora_a": ka,
        "blk.0.attn_k.weight.lora_b": kb,
    }
    q, k = times(qb, qa, 0.5), times(kb, ka, 0.5)
    if numbers:
        q, k = hugging_face_rows(q, 3), hugging_face_rows(k, 1)
    expected = {"model.layers.0.self_attn.q_proj": q, "model.layers.0.self_attn.k_proj": k}
    write(case, "llama", 1.0, tensors, expected, numbers=numbers)


def embedding():
    """The token embedding, its lora_a transposed; bfloat16; α = 0 is scale 1."""
    b, a = drawn(4, 2, dtype=ml_dtypes.bfloat16), drawn(9, 2, dtype=ml_dtypes.bfloat16)
    tensors = {
        "token_embd.weight.lora_a": a.view(np.uint16),
        "token_embd.weight.lora_b": b.view(np.uint16),
    }
    expected = {"model.embed_tokens": times(b, a.T, 1.0)}
    write("gguf-embedding", "gemma2", 0.0, tensors, expected, kinds=dict.fromkeys(tensors, BF16))


def quantised():
    """Q8_0, and no α at all."""
    b, a = (gguf.quants.quantize(drawn(*shape), Q8_0) for shape in ((3, 32), (32, 64)))
    tensors = {"blk.2.ffn_up.weight.lora_a": a, "blk.2.ffn_up.weight.lora_b": b}
    back = [gguf.quants.dequantize(array, Q8_0) for array in (b, a)]
    expected = {"model.layers.2.mlp.up_proj": times(*back, 1.0)}
    write("gguf-q8", "qwen3", None, tensors, expected, kinds=dict.fromkeys(tensors, Q8_0))


def experts():
    """A stack of three experts, and the router."""
    b, a, rb, ra = drawn(3, 5, 2), drawn(3, 2, 4), drawn(3, 2), drawn(2, 4)
    tensors = {
        "blk.0.ffn_gate_exps.weight.lora_a": a,
        "blk.0.ffn_gate_exps.weight.lora_b": b,
        "blk.0.ffn_gate_inp.weight.lora_a": ra,
        "blk.0.ffn_gate_inp.weight.lora_b": rb,
    }
    expected = {f"model.layers.0.mlp.experts.{e}.gate_proj": times(b[e], a[e], 2.0) for e in range(3)}
    expected["model.layers.0.mlp.gate"] = times(rb, ra, 2.0)
    write("gguf-experts", "qwen3moe", 4.0, tensors, expected)


if __name__ == "__main__":
    qwen2()
    llama("gguf-llama", {"loralens.attention.head_count": 3, "loralens.attention.head_count_kv": 1})
    llama("gguf-llama-no-heads", None)
    embedding()
    quantised()
    experts()
