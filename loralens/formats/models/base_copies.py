"""Leaving out saved tensors that equal those of the base model, because they add nothing to the adapter.

If the vocabulary was resized, or an embedding is a target, PEFT saves the embedding and the head beside the pairs,
whether they were trained or not.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray, row_blocks

FULL = ("embedding", "saved", "copy", "bias", "other")  # roles of extras that replace a tensor of the base
HEAD = ".lm_head"  # a base whose head is tied to the embedding does not store it
# the names of embeddings in the families of transformers
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
BLOCK = 1 << 22  # numbers compared at a time, so that memory does not grow with the vocabulary


def drop_copies(
    adapter: Adapter, base: Mapping[str, LazyArray], rename: Callable[[str], str]
) -> tuple[Adapter, list[str]]:
    """The adapter without full tensors that equal those of the base, and the keys that were left out.

    Parameters
    ----------
    adapter : Adapter
    base : mapping of str to LazyArray
        Key → tensor of the base checkpoint.
    rename : callable
        Maps the name of a module in the adapter to its name in the base.
    """
    copies = [
        key
        for key, extra in adapter.extra.items()
        if extra.role in FULL and any(_same(extra.tensor, base[own]) for own in _keys(extra, base, rename))
    ]
    if not copies:
        return adapter, []
    remaining = {key: extra for key, extra in adapter.extra.items() if key not in copies}
    return replace(adapter, extra=remaining), copies


def _keys(extra: Extra, base: Mapping[str, LazyArray], rename: Callable[[str], str]) -> list[str]:
    """Keys of the base that an extra may be a copy of: its own, or the embeddings for a head that the base lacks."""
    key = f"{rename(extra.module)}.{extra.parameter}"
    if key in base:
        return [key]
    if not f".{extra.module}".endswith(HEAD):
        return []
    return [key for key in base if key.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS]


def _same(copy: LazyArray, own: LazyArray) -> bool:
    """Whether two tensors are equal after those of the base are rounded to the dtype of the copy."""
    # Numbers are read only if the shapes agree.
    if copy.shape != own.shape or not copy.size:
        return False
    with np.errstate(over="ignore"):
        # A number of the base that is too large for the copy's dtype becomes infinite, and then differs.
        return all(
            np.array_equal(block, own.rows(rows.start, rows.stop).read().astype(copy.dtype))
            for rows, block in row_blocks(copy, BLOCK)
        )
