"""Rows of q and k: in Hugging Face's order, and in llama.cpp's.

The rotary embedding of ggml's "normal" kind turns neighbouring rows of a head, Hugging Face's rows half a head apart.
For the architectures marked ``permuted``, llama.cpp's converter brings the rows of q and k into its order, head by
head. ΔW = B·A has the rows of B, so B is permuted and A is not. (llama.cpp: conversion/llama.py, ``permute``, and
olmo.py, minicpm.py, internlm.py, deepseek.py, which use it.)
"""

import re

from loralens.core.lazy import Array
from loralens.errors import MismatchError
from loralens.formats.dialects.gguf.architectures import Heads

OWNER = "llama.cpp"  # as messages call the software that this order is of
_ROTARY = re.compile(r"^blk\.\d+\.attn_([qk])$")


def permute(rows: Array, heads: int) -> Array:
    """The rows of q or k, Hugging Face's order → llama.cpp's: within a head of d rows, row i + j·d/2 → 2·i + j."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: Array, heads: int) -> Array:
    """The rows of q or k, llama.cpp's order → Hugging Face's."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rotary(tensor: str) -> str | None:
    """``q`` or ``k`` where a tensor is one of these projections."""
    match = _ROTARY.match(tensor)
    return match[1] if match else None


def heads_in(tensor: str, heads: Heads, out: int) -> int:
    """How many heads the ``out`` rows of a q or k projection hold.

    Raises
    ------
    MismatchError
        The rows are not so many heads of an even number of rows.
    """
    count = heads.q if rotary(tensor) == "q" else heads.kv
    if out % (2 * count):
        raise MismatchError(f"{out} rows are not {count} heads", fix="give the base that the adapter was trained on")
    return count
