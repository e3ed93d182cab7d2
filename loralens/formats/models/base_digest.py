"""What a base is, cheaply: a digest of the files of a model's folder that notices other numbers in them."""

import re
from hashlib import sha256
from pathlib import Path

from loralens.errors import FormatError, place

BLOCK, BLOCKS = 1 << 16, 128  # bytes read at a time, and how often in one file: 8 MiB of the largest, 10 ms each
_TELLING = re.compile(r"config\.json|.*\.(?:safetensors|bin|pt|pth|model)|(?:vocab|merges|tokenizer).*")


def base_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the weights, the configuration and the tokenizer in a folder, by name.

    A file of at most `BLOCK` · `BLOCKS` bytes counts whole; of a larger one its size and so many blocks, evenly spread
    from its first byte to its last: training changes all numbers of a weight, and a file that differs in a few bytes
    between two blocks alone is not noticed. Where the folder is does not count, nor when it was written.

    Raises
    ------
    FormatError
        A file cannot be read.
    """
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if _TELLING.fullmatch(p.name))
    hasher = sha256()
    for file in files:
        if file.is_file():
            hasher.update(f"{file.name}\0".encode())
            hasher.update(_digest(file))
    return hasher.hexdigest()


def _digest(file: Path) -> bytes:
    hasher = sha256()
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            hasher.update(size.to_bytes(8, "little"))
            last = max(size - BLOCK, 0)
            for number in range(BLOCKS) if size > BLOCK * BLOCKS else range(-(-size // BLOCK)):
                stream.seek(last * number // (BLOCKS - 1) if size > BLOCK * BLOCKS else number * BLOCK)
                hasher.update(stream.read(BLOCK))
    except OSError as error:
        with place(file):
            raise FormatError(f"cannot be read: {error.strerror}", fix="check its permissions") from error
    return hasher.digest()
