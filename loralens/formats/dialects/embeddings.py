"""Embeddings: which module is one, in dialects whose files store it like a linear layer."""

import re

_NAMED = re.compile(r"(^|\.)(wte|wpe|\w*embed(ding|dings|_tokens|_in|_out)?|embed_\w+)$")


def named(name: str) -> bool:
    """Whether a module's name says that it is an embedding: ``embed_tokens``, ``wte``, ``word_embeddings`` …"""
    return bool(_NAMED.search(name))
