"""The order of the rows of q and k in Hugging Face's models and in llama.cpp.

ggml's "normal" rotary embedding rotates neighbouring rows of a head, while Hugging Face's rotates rows that are half a
head apart. For the architectures marked ``permuted``, llama.cpp's converter changes the order of the rows of q and k
head by head. The rows of ΔW = B·A are those of B, so B is permuted and A is not. (llama.cpp: conversion/llama.py,
``permute``, and olmo.py, minicpm.py, internlm.py, deepseek.py, which use it.)
"""

import re

from loralens.core.lazy import Array
from loralens.errors import MismatchError
from loralens.formats.dialects.gguf.architectures import Heads

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


def heads_in(tensor: str, heads: Heads, out: int) -> int:
    """The number of heads in the ``out`` rows of a q or k projection.

    Raises
    ------
    MismatchError
        The rows cannot be divided into this number of heads with an even number of rows each.
    """
    count = heads.q if rotary(tensor) == "q" else heads.kv
    if out % (2 * count):
        raise MismatchError(
            f"{out} rows cannot be divided into {count} heads", fix="give the base that the adapter was trained on"
        )
    return count
