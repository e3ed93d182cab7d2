"""Shell: words of a command as a user types them."""

import os
from shlex import quote


def quoted(word: str) -> str:
    """A word as a shell wants it; one with a newline or another control character as bash's ``$'…'``."""
    if word.isprintable():
        return quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    escaped = [short.get(x) or "".join(f"\\x{byte:02x}" for byte in os.fsencode(x)) for x in plain]
    return f"$'{''.join(x if x.isprintable() else y for x, y in zip(plain, escaped, strict=True))}'"


def typed(*words: str) -> str:
    """A command on one line."""
    return " ".join(map(quoted, words))
