"""SVDs of base weights, kept on disk under a hash of what they are the SVD of."""

import os
import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import final
from zlib import crc32

import numpy as np

from loralens.core.lazy import LazyArray
from loralens.core.weights import Weight
from loralens.errors import FormatError
from loralens.formats.files.container import Stored, read_safetensors
from loralens.formats.files.leftovers import tidy_folder
from loralens.formats.files.writing import write_safetensors
from loralens.linalg.rank_update import Decomposed

VERSION = "loralens SVD 1"  # of what an entry holds and how it was computed
SUFFIX = ".svd.safetensors"
LIMIT = "20GB"
HEADER = 4096  # bytes that an entry takes besides its numbers, at most

_ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")


def default_folder() -> Path:
    """Where SVDs are kept unless the user says otherwise: ``$XDG_CACHE_HOME/loralens``, else ``~/.cache/loralens``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loralens"


def digest(weight: Weight) -> str:
    """SHA-256 of the numbers of a weight, its dtype, shape and orientation; read a block of rows at a time."""
    stored = weight.stored
    found = sha256(f"{VERSION} {stored.dtype} {stored.shape} {weight.transposed}".encode())
    for _, block in weight.blocks():
        found.update(np.ascontiguousarray(block).view(np.uint8).data)
    return found.hexdigest()


def nbytes(weight: Weight) -> int:
    """Bytes that the SVD of a weight takes on disk, its header aside."""
    out, in_ = weight.shape
    return min(out, in_) * (4 * (out + in_) + 8)


@final
class SvdCache:
    """A folder of SVDs, one file each, that are dropped in the order of their last use when it grows over its limit.

    Entries that were read or written through this object stay: where all weights of a base do not fit, dropping the
    first to make room for the last would leave nothing for the next run.

    Parameters
    ----------
    folder : Path
        Made when something is written. Files that are no entries are left alone.
    limit : int
        Bytes.
    """

    __slots__ = ("_used", "folder", "limit")

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def read(self, key: str, shape: tuple[int, int]) -> Decomposed | None:
        """The SVD of a weight of this shape, kept under a key; None where there is none, or a damaged one."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            stored = read_safetensors(file)
            found = Decomposed(*(stored.tensors[name].read() for name in Decomposed._fields))
        except (FormatError, KeyError):
            return None
        if not _sound(found, shape) or (stored.metadata or {}).get("crc32") != _checksum(found):
            return None
        with suppress(OSError):  # a cache that may only be read is still a cache
            os.utime(file)
        self._used.add(file.name)
        return found

    def write(self, key: str, found: Decomposed) -> bool:
        """Keep an SVD; false where there is no room for it beside what this run has used.

        Raises
        ------
        FormatError
            The disk cannot be written.
        """
        file = self._file(key)
        room = self.limit - sum(part.nbytes for part in found) - HEADER
        if not self._make_room(room, besides=file.name):
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(
                f"{self.folder}: cannot be made: {error.strerror}", fix="choose another folder with --cache DIR"
            ) from error
        tidy_folder(self.folder, _ENTRY.fullmatch)  # another run may never come to the entry of one that was killed
        tensors = {name: LazyArray.of(part) for name, part in found._asdict().items()}
        write_safetensors(Stored(tensors, {"crc32": _checksum(found), "loralens": VERSION}), file)
        self._used.add(file.name)
        return True

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, room: int, *, besides: str) -> bool:
        """Drop the entries used longest ago until the others take at most ``room``; whether that can be done."""
        entries = []
        for file in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process may drop entries too
                if _ENTRY.fullmatch(file.name) and file.name != besides:
                    state = file.stat()
                    entries.append((state.st_mtime_ns, state.st_size, file))
        total = sum(size for _, size, _ in entries)
        free = [entry for entry in sorted(entries) if entry[2].name not in self._used]
        if total - sum(size for _, size, _ in free) > room:
            return False
        for _, size, file in free:
            if total <= room:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
            total -= size
        return True


def _sound(found: Decomposed, shape: tuple[int, int]) -> bool:
    """Whether arrays are the thin SVD of a weight of this shape: the checksum is of their bytes alone."""
    out, in_ = shape
    k = min(shape)
    due = {"U": ((out, k), np.float32), "s": ((k,), np.float64), "V": ((in_, k), np.float32)}
    parts = found._asdict()
    if not all(parts[name].shape == dims and parts[name].dtype == dtype for name, (dims, dtype) in due.items()):
        return False
    descending = bool((found.s[:-1] >= found.s[1:]).all()) and bool((found.s >= 0).all())
    return descending and all(np.isfinite(part).all() for part in found)


def _checksum(found: Decomposed) -> str:
    """CRC-32 of the numbers of an entry: it tells damage, at 3 GB/s; the name tells whose SVD it is."""
    value = 0
    for part in found:
        value = crc32(np.ascontiguousarray(part).view(np.uint8).data, value)
    return f"{value:08x}"
