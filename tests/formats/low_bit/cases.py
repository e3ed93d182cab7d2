"""Weights in every low-bit layout, made of bytes that are always the same, with their numbers entry by entry.

The references below are slow and obvious: Python integers and loops, one entry at a time. The live tests give the same
tensors to the software that owns each layout.
"""

import json
from dataclasses import dataclass, field
from hashlib import shake_256
from typing import Any

import ml_dtypes
import numpy as np

f32 = np.float32
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25]
FP4 += [0.0, *(-level for level in FP4[1:])]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-level for level in E2M1]


@dataclass
class Case:
    """A base with one coded weight: its tensors, its configuration, and what must come out."""

    layout: str
    key: str
    tensors: dict[str, Any]
    W: Any
    codes: str  # the key of the codes
    config: dict[str, Any] = field(default_factory=dict)
    exact: bool = True  # whether the grid gives the numbers to the last bit
    facts: dict[str, Any] = field(default_factory=dict)  # what an oracle has to be told


def some_bytes(name, *shape):
    size = int(np.prod(shape))
    return np.frombuffer(shake_256(name.encode()).digest(size), np.uint8).reshape(shape).copy()


def words(name, *shape):
    return some_bytes(name, *shape, 4).view(np.int32).reshape(shape)


def halves(name, *shape, signed=False):
    """float16 numbers between 2^-7 and 2^-5, all with full mantissas."""
    raw = some_bytes(name, *shape, 2).view(np.uint16).reshape(shape)
    return ((raw & (0x87FF if signed else 0x07FF)) | 0x2000).view(np.float16)


def singles(name, *shape):
    """float32 numbers between 1 and 2."""
    return ((some_bytes(name, *shape, 4).view(np.uint32).reshape(shape) & 0x007FFFFF) | 0x3F800000).view(np.float32)


def field_of(row, index, bits):
    """Code ``index`` of a row of words: bits of one long number, the least significant first."""
    number = int.from_bytes(np.ascontiguousarray(row).tobytes(), "little")
    return number >> (index * bits) & ((1 << bits) - 1)


def bitsandbytes(kind, shape, *, block=64, nested=False, storage=np.uint8, name="a"):
    size = int(np.prod(shape))
    blocks, key = -(-size // block), f"{name}.weight"
    codes = some_bytes(f"{kind}{shape}", -(-size // 2), 1)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        absmax = some_bytes("absmax", blocks)
        outer, table = singles("nested", -(-blocks // 256)), np.sort(singles("table", 256)) - f32(1.5)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.25}
        scales = [f32(table[absmax[b]]) * outer[b // 256] + f32(1.25) for b in range(blocks)]
        parts = {"absmax": absmax, "nested_absmax": outer, "nested_quant_map": table}
    else:
        scales = singles("absmax", blocks)
        parts = {"absmax": scales}
    table = NF4 if kind == "nf4" else FP4
    flat = []
    for i in range(size):
        byte = int(codes.reshape(-1)[i // 2])
        flat.append(f32(table[byte >> 4 if i % 2 == 0 else byte & 15]) * scales[i // block])
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    stored = codes.reshape(-1).view(storage).reshape(-1, 1)
    tensors = {key: stored, f"{key}.quant_map": np.array(table, f32)}
    tensors |= {f"{key}.{end}": value for end, value in parts.items()} | {
        f"{key}.quant_state.bitsandbytes__{kind}": text
    }
    facts = {"kind": kind, "block": block, "nested": nested, "shape": shape}
    W = np.array(flat, f32).reshape(shape)
    return Case(f"bitsandbytes {kind.upper()}", key, tensors, W, key, facts=facts)


def int8(shape=(12, 20)):
    codes, scales = some_bytes("int8", *shape).view(np.int8), singles("scb", shape[0])
    W = np.array([[f32(c) * s * f32(1 / 127) for c in row] for row, s in zip(codes, scales, strict=True)], f32)
    tensors = {"a.weight": codes, "a.SCB": scales, "a.weight_format": np.array(0, np.uint8)}
    return Case("bitsandbytes int8", "a.weight", tensors, W, "a.weight", exact=False)


def gptq(bits, *, version="gptq", order=False, inputs=96, outputs=32, size=32):
    groups = inputs // size
    qweight, qzeros = words("qw", inputs * bits // 32, outputs), words("qz", groups, outputs * bits // 32)
    scales = halves("gptq", groups, outputs)
    # An order as desc_act leaves it: the groups of the inputs, mixed.
    index = np.array([(7 * i) % inputs // size if order else i // size for i in range(inputs)], np.int32)
    W = np.empty((outputs, inputs), f32)
    for o in range(outputs):
        for i in range(inputs):
            zero = field_of(qzeros[index[i]], o, bits)
            zero = (zero + 1) % (1 << bits) if version == "gptq" else zero
            W[o, i] = f32(field_of(qweight[:, o], i, bits) - zero) * f32(scales[index[i], o])
    tensors = {"a.qweight": qweight, "a.qzeros": qzeros, "a.scales": scales, "a.g_idx": index}
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "checkpoint_format": version}
    config = {"quantization_config": config}
    return Case(f"GPTQ {bits}-bit", "a.weight", tensors, W, "a.qweight", config, facts={"bits": bits})


def awq(inputs=64, outputs=24, size=32):
    groups, nibble = inputs // size, [0, 4, 1, 5, 2, 6, 3, 7]
    qweight, qzeros = words("awq", inputs, outputs // 8), words("awqz", groups, outputs // 8)
    scales = halves("awqs", groups, outputs)

    def code(row, o):
        return (int(row[o // 8]) & 0xFFFFFFFF) >> (4 * nibble[o % 8]) & 15

    W = np.empty((outputs, inputs), f32)
    for o in range(outputs):
        for i in range(inputs):
            W[o, i] = f32(code(qweight[i], o) - code(qzeros[i // size], o)) * f32(scales[i // size, o])
    tensors = {"a.qweight": qweight, "a.qzeros": qzeros, "a.scales": scales}
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}}
    return Case("AWQ 4-bit", "a.weight", tensors, W, "a.qweight", config, facts={"size": size})


def mlx(bits, size=32, *, shape=(12, 96), dtype=np.float16, name="a"):
    *stack, inputs = shape
    codes = words(f"mlx{bits}", *stack, inputs * bits // 32).view(np.uint32)
    groups = (*stack, inputs // size)
    scales, biases = (halves(part, *groups, signed=True).astype(dtype) for part in ("ms", "mb"))
    W = np.empty(shape, f32)
    for place in np.ndindex(*shape):
        row, i = place[:-1], place[-1]
        code = f32(field_of(codes[row], i, bits))
        W[place] = code * f32(scales[row][i // size]) + f32(biases[row][i // size])
    tensors = {f"{name}.weight": codes, f"{name}.scales": scales, f"{name}.biases": biases}
    config = {"quantization": {"group_size": size, "bits": bits}}
    facts = {"bits": bits, "size": size}
    return Case(f"MLX {bits}-bit", f"{name}.weight", tensors, W, f"{name}.weight", config, facts=facts)


def packed(*, bits=4, symmetric=True, groups=3, order=False, shape=(20, 96), name="a", dtype=ml_dtypes.bfloat16):
    rows, columns = shape
    codes = words("packed", rows, -(-columns * bits // 32))
    # The rest of the last word of a row is 0, as it is written.
    left = -columns * bits % 32
    codes = codes.view(np.uint32) & np.array([0xFFFFFFFF] * (codes.shape[1] - 1) + [0xFFFFFFFF >> left], np.uint32)
    codes = codes.view(np.int32)
    scales = halves("ps", rows, groups).astype(dtype)
    zeros = words("pz", -(-rows * bits // 32), groups)
    size = -(-columns // groups)
    index = np.array([(7 * i) % columns // size if order else i // size for i in range(columns)], np.int32)
    middle, W = 1 << (bits - 1), np.empty(shape, f32)
    for o in range(rows):
        for i in range(columns):
            zero = middle if symmetric else field_of(zeros[:, index[i]], o, bits)
            W[o, i] = f32(field_of(codes[o], i, bits) - zero) * f32(scales[o, index[i]])
    tensors = {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}
    tensors[f"{name}.weight_shape"] = np.array(shape, np.int64)
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = zeros
    if order:
        tensors[f"{name}.weight_g_idx"] = index
    facts = {"bits": bits, "symmetric": symmetric, "groups": groups, "size": size}
    layout = f"compressed-tensors int{bits}"
    return Case(layout, f"{name}.weight", tensors, W, f"{name}.weight_packed", facts=facts)


def e2m1(codes, steps, size):
    """The numbers of rows of bytes, a step for each group of ``size`` of them."""
    W = np.empty((len(codes), 2 * codes.shape[1]), f32)
    for o, i in np.ndindex(*W.shape):
        byte = int(codes[o, i // 2])
        W[o, i] = f32(E2M1[byte & 15 if i % 2 == 0 else byte >> 4]) * steps[o, i // size]
    return W


def four_bit_floats(form, shape=(12, 96)):
    rows, columns = shape
    size = 32 if form == "MXFP4" else 16
    codes = some_bytes(form, rows, columns // 2)
    if form == "MXFP4":
        scales = some_bytes("exponents", rows, columns // size) % 12 + 116
        steps = np.ldexp(f32(1), scales.astype(int) - 127).astype(f32)
        tensors, layout = {"a.weight_packed": codes, "a.weight_scale": scales}, "compressed-tensors MXFP4"
    else:
        # All float8 numbers but NaN.
        raw = some_bytes("float8", rows, columns // size) & 0x7F
        scales = np.where(raw == 0x7F, 0x7E, raw).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        if form == "NVFP4":
            whole = np.array([1536.7], f32)
            steps, layout = scales.astype(f32) / whole, "compressed-tensors NVFP4"
            tensors = {"a.weight_packed": codes, "a.weight_scale": scales, "a.weight_global_scale": whole}
        else:
            whole = np.array(0.00123, f32)
            steps, layout = scales.astype(f32) * whole, "modelopt NVFP4"
            tensors = {"a.weight": codes, "a.weight_scale": scales, "a.weight_scale_2": whole}
    return Case(layout, "a.weight", tensors, e2m1(codes, steps, size), next(iter(tensors)))


def mlx_floats(mode, shape=(12, 96)):
    """The same numbers as those of compressed-tensors, but NVFP4 without a scale of the whole."""
    case = four_bit_floats(mode.upper(), shape)
    size, codes, scales = (32 if mode == "mxfp4" else 16), *list(case.tensors.values())[:2]
    if mode == "nvfp4":
        case.W = e2m1(codes, scales.astype(f32), size)
    tensors = {"a.weight": codes.view(np.uint32), "a.scales": scales.view(np.uint8)}
    config = {"quantization": {"group_size": size, "bits": 4, "mode": mode}}
    return Case(f"MLX {mode.upper()}", "a.weight", tensors, case.W, "a.weight", config, facts={"mode": mode})


def stack(experts=2, rows=6, groups=3):
    codes, scales = some_bytes("stack", experts, rows, groups, 16), some_bytes("ss", experts, rows, groups) % 12 + 116
    steps = np.ldexp(f32(1), scales.astype(int) - 127).astype(f32)
    W = [e2m1(c.reshape(rows, -1), step, 32).T for c, step in zip(codes, steps, strict=True)]
    tensors = {"a.gate_up_proj_blocks": codes, "a.gate_up_proj_scales": scales}
    return Case("gpt-oss MXFP4", "a.gate_up_proj", tensors, np.array(W), "a.gate_up_proj_blocks")


CASES = {
    "nf4": lambda: bitsandbytes("nf4", (12, 128)),
    "nf4, nested": lambda: bitsandbytes("nf4", (40, 512), nested=True),
    "nf4, blocks of 128": lambda: bitsandbytes("nf4", (4, 256), block=128),
    "nf4, rows that end within a block": lambda: bitsandbytes("nf4", (6, 96)),
    "nf4, rows that end within a byte": lambda: bitsandbytes("nf4", (5, 7)),
    "nf4, a stack": lambda: bitsandbytes("nf4", (3, 4, 64)),
    "nf4, stored as bf16": lambda: bitsandbytes("nf4", (12, 128), storage=ml_dtypes.bfloat16),
    "fp4": lambda: bitsandbytes("fp4", (12, 128)),
    "fp4, nested": lambda: bitsandbytes("fp4", (40, 512), nested=True),
    "int8": int8,
    "gptq": lambda: gptq(4),
    "gptq v2": lambda: gptq(4, version="gptq_v2"),
    "gptq, desc_act": lambda: gptq(4, order=True),
    "gptq, 2 bits": lambda: gptq(2),
    "gptq, 3 bits": lambda: gptq(3, order=True),
    "gptq, 8 bits": lambda: gptq(8),
    "awq": awq,
    **{f"mlx, {bits} bits": lambda bits=bits: mlx(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx, bf16, groups of 64": lambda: mlx(4, 64, shape=(12, 128), dtype=ml_dtypes.bfloat16),
    "mlx, a stack": lambda: mlx(4, shape=(3, 5, 64)),
    "int4": packed,
    "int4, zeros": lambda: packed(symmetric=False),
    "int4, a scale a row": lambda: packed(groups=1),
    "int4, an order of its own": lambda: packed(symmetric=False, order=True),
    "int4, rows that end within a word": lambda: packed(shape=(20, 51)),
    "int8 in words": lambda: packed(bits=8, symmetric=False),
    "mxfp4": lambda: four_bit_floats("MXFP4"),
    "nvfp4": lambda: four_bit_floats("NVFP4"),
    "nvfp4 of modelopt": lambda: four_bit_floats("modelopt"),
    "mxfp4 of mlx": lambda: mlx_floats("mxfp4"),
    "nvfp4 of mlx": lambda: mlx_floats("nvfp4"),
    "mxfp4 of gpt-oss": stack,
}
