"""Recognising embeddings by name, for dialects that store them like linear layers."""

import re

_NAMED = re.compile(r"(^|\.)(wte|wpe|\w*embed(ding|dings|_tokens|_in|_out)?|embed_\w+)$")


def named(name: str) -> bool:
    """Whether a module is an embedding by its name: ``embed_tokens``, ``wte``, ``word_embeddings`` …"""
    return bool(_NAMED.search(name))
