"""A digest of the files of a base model, cheap enough to check at every run that the base is still the same."""

import re
from pathlib import Path

from loralens.errors import FormatError, place

BLOCK, BLOCKS = 1 << 16, 128  # bytes of a block, and blocks read of one file: at most 8 MiB, which takes about 10 ms
# the files that decide what a model computes; not a README, and no other configuration
_TELLING = re.compile(r"config\.json|.*\.(?:safetensors|bin|pt|pth|model|gguf)|(?:vocab|merges|tokenizer).*")


def base_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the weights, the configuration and the tokenizer in a folder.

    In a file of at most `BLOCK` · `BLOCKS` bytes, every byte counts. In a larger file only its size and `BLOCKS` blocks
    count, evenly spread from the first byte to the last. Training changes all numbers of a weight, so the digest of
    another model differs. A change of a few bytes between two blocks goes unnoticed. Paths and times do not count.

    Raises
    ------
    FormatError
        A file cannot be read.
    """
    from hashlib import sha256  # it loads OpenSSL, and few runs with a base need its digest

    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if _TELLING.fullmatch(p.name))
    hasher = sha256()
    for file in files:
        if file.is_file():
            hasher.update(f"{file.name}\0".encode())
            hasher.update(_digest(file))
    return hasher.hexdigest()


def _digest(file: Path) -> bytes:
    from hashlib import sha256

    hasher = sha256()
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            hasher.update(size.to_bytes(8, "little"))
            # The last block ends with the file.
            last = max(size - BLOCK, 0)
            for number in range(BLOCKS) if size > BLOCK * BLOCKS else range(-(-size // BLOCK)):
                stream.seek(last * number // (BLOCKS - 1) if size > BLOCK * BLOCKS else number * BLOCK)
                hasher.update(stream.read(BLOCK))
    except OSError as error:
        with place(file):
            raise FormatError(f"cannot be read: {error.strerror}", fix="check its permissions") from error
    return hasher.digest()
