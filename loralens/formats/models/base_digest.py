"""A digest of the files of a base model, cheap enough to check at every run that the base is still the same."""

import os
import re
from contextlib import suppress
from pathlib import Path
from time import time_ns

from loralens.core.hashes import sha256_hex
from loralens.errors import FormatError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.regular import open_stream, read_whole
from loralens.formats.records.cache import default_folder

BLOCK = 1 << 20  # bytes that are read at a time
KEPT_FROM = 1 << 23  # bytes from which the digest of a file is kept; a smaller file is hashed in 10 ms
# A file system may give two writes within this time the same stamp; FAT has the coarsest stamps.
SETTLED = 2_000_000_000  # nanoseconds
_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|model|gguf)")
# the files that decide what a model computes; not a README, and no other configuration
_TELLING = re.compile(
    r"(?:quantize_)?config\.json|.*\.(?:index\.json|tiktoken)|(?:vocab|merges|tokenizer|added_tokens|special_tokens"
    r"|chat_template).*|"
    rf"{_WEIGHTS.pattern}"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")


def base_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the weights, the configuration and the tokenizer in a folder, or of one file.

    Every byte counts, because a merge into one module changes only a part of a file. Paths and times do not count. The
    digest of a large file is kept in the cache of the user under the device, inode, size and times of the file, so
    that a file is read completely only once.

    Raises
    ------
    FormatError
        A file cannot be read.
    """
    from hashlib import sha256  # it loads OpenSSL, and few runs with a base need its digest

    home = folder.parent if folder.is_file() else folder
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    # Without weights of its own, it may hold the components of a pipeline.
    if not any(_WEIGHTS.fullmatch(file.name) for file in files):
        files += sorted(folder.glob("*/*"))
    hasher = sha256()
    for file in files:
        if file.is_file() and (file == folder or _TELLING.fullmatch(file.name)):
            hasher.update(f"{file.relative_to(home).as_posix()}\0".encode())
            hasher.update(bytes.fromhex(_file_digest(file)))
    return hasher.hexdigest()


def _file_digest(file: Path) -> str:
    """The digest of the size and all bytes of a file, from the cache if the file is the one that was hashed."""
    from hashlib import sha256

    hasher = sha256()
    try:
        with open_stream(file) as stream:
            before = os.fstat(stream.fileno())
            kept = _kept(before)
            with suppress(FormatError, UnicodeDecodeError):
                if kept and _DIGEST.fullmatch(known := read_whole(kept).decode("ascii")):
                    return known
            hasher.update(before.st_size.to_bytes(8, "little"))
            while block := stream.read(BLOCK):
                hasher.update(block)
            after = os.fstat(stream.fileno())
    except OSError as error:
        with place(file):
            raise FormatError(f"cannot be read: {error.strerror}", fix="check its permissions") from error
    settled = time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > SETTLED
    if kept and settled and kept == _kept(after):
        # Without a cache that can be written, the next run reads the file again.
        with suppress(OSError, FormatError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(kept) as out:
                out.write(hasher.hexdigest().encode())
    return hasher.hexdigest()


def _kept(state: os.stat_result) -> Path | None:
    """Where the digest of a large file in this state is kept; None for a small file."""
    if state.st_size < KEPT_FROM:
        return None
    # The time of the last change of the inode belongs to it, because programs can set the time of the content.
    key = f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
    return default_folder() / "digests" / sha256_hex(key.encode())
