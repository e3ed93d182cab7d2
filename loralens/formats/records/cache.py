"""A cache of the SVDs of base weights on disk, whole or of the leading directions, under a hash of the weight."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import final
from zlib import crc32

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.weights import Weight
from loralens.errors import FormatError, OptionError
from loralens.formats.files.adapter_files import write_safetensors
from loralens.formats.files.atomic import tidy_folder
from loralens.formats.files.container import Stored, read_safetensors
from loralens.linalg.lanczos import Decomposed
from loralens.linalg.randomized import Leading

# Of the content of an entry and of its computation; they are part of the hash.
VERSION = "loralens SVD 1"
LEADING_VERSION = "loralens leading SVD 2"
SUFFIX = ".svd.safetensors"
HEADER = 4096  # the bytes of an entry besides its numbers, at most

# A file of another name in the folder is not an entry, and is never removed.
_ENTRY = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")


def default_folder() -> Path:
    """The folder of the cache by default: ``$XDG_CACHE_HOME/loralens``, else ``~/.cache/loralens``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loralens"


class WeightHash:
    """SHA-256 of the numbers, dtype, shape and orientation of a weight, taken while its blocks of rows are read."""

    __slots__ = ("_hasher",)

    def __init__(self, weight: Weight, version: str = VERSION) -> None:
        stored = weight.stored
        self._hasher = sha256()
        self._hasher.update(f"{version} {stored.dtype} {stored.shape} {weight.transposed}".encode())

    def follow(self, blocks: Iterable[tuple[slice, Array]]) -> Iterator[tuple[slice, Array]]:
        """Yield the blocks, which are all blocks of the weight in order, however large they are."""
        for rows, block in blocks:
            self._hasher.update(np.ascontiguousarray(block).view(np.uint8).data)
            yield rows, block

    def hexdigest(self) -> str:
        """The hash of the blocks so far."""
        return self._hasher.hexdigest()


def weight_digest(weight: Weight) -> str:
    """The `WeightHash` of a weight, which is read a block of rows at a time."""
    own = WeightHash(weight)
    for _ in own.follow(weight.blocks()):
        pass
    return own.hexdigest()


def svd_bytes(weight: Weight) -> int:
    """The bytes that the SVD of a weight takes on disk, without its header."""
    out, in_ = weight.shape
    # U (out, k) and V (in, k) are float32, the singular values float64.
    return min(out, in_) * (4 * (out + in_) + 8)


@final
class SvdCache:
    """A folder of SVDs, one in each file. Those used longest ago are removed when the folder grows over its limit.

    Entries that were read or written through this object are never removed. If the SVDs of a base do not all fit,
    removing the first ones to make room for the last ones would leave nothing that the next run could use.

    Parameters
    ----------
    folder : Path
        It is made when something is written. Files that are not entries are left alone.
    limit : int
        The largest size of the folder in bytes.
    """

    __slots__ = ("_used", "folder", "limit")

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def read(self, key: str, shape: tuple[int, int]) -> Decomposed | None:
        """The SVD of a weight of this shape under a key; None if there is none or it is damaged."""
        entry = self._load(key, shape, min(shape), Decomposed._fields)
        return entry and Decomposed(*entry[0])

    def read_leading(self, key: str, shape: tuple[int, int], count: int) -> Leading | None:
        """The leading triplets of a weight of this shape under a key; None if there are none or they are damaged."""
        entry = self._load(key, shape, count, (*Decomposed._fields, "error"))
        if entry is None or not entry[1].get("steps", "").isdecimal():
            return None
        U, s, V, error = entry[0]
        return Leading(U.astype(np.float64), s, V.astype(np.float64), error, int(entry[1]["steps"]))

    def write(self, key: str, svd: Decomposed) -> bool:
        """Store an SVD; returns false if there is no room for it beside the entries that this run has used.

        Raises
        ------
        FormatError
            The disk cannot be written.
        """
        return self._store(key, svd._asdict(), {"loralens": VERSION})

    def write_leading(self, key: str, leading: Leading) -> bool:
        """Store leading triplets, as `write` does; vectors that are float32 numbers take 4 bytes for each."""
        dtype = np.float32 if leading.steps else np.float64  # those of a dense SVD have all digits of float64
        tensors = {"U": leading.U.astype(dtype), "s": leading.s, "V": leading.V.astype(dtype), "error": leading.error}
        return self._store(key, tensors, {"loralens": LEADING_VERSION, "steps": str(leading.steps)})

    def _load(
        self, key: str, shape: tuple[int, int], count: int, names: Sequence[str]
    ) -> tuple[list[Array], Mapping[str, str]] | None:
        """The arrays U, s, V … of an entry and its metadata; None if it is not there, damaged or of another shape.

        An entry that is read becomes the one that was used last.
        """
        file, (out, in_) = self._file(key), shape
        k = min(out, in_, count)
        if not file.is_file():
            return None
        try:
            stored = read_safetensors(file)
            parts = [stored.tensors[name].read() for name in names]
        except (FormatError, KeyError):
            return None
        metadata = stored.metadata or {}
        # A truncated or changed file must not become a wrong result.
        # The checksum is of the bytes alone, which are the same in another shape and as whole numbers.
        shapes = [part.shape for part in parts[:3] if part.dtype.kind == "f"]
        if shapes != [(out, k), (k,), (in_, k)] or metadata.get("crc32") != _checksum(parts):
            return None
        # In a cache that is read-only, the time stays as it is.
        with suppress(OSError):
            os.utime(file)
        self._used.add(file.name)
        return parts, metadata

    def _store(self, key: str, parts: Mapping[str, Array], metadata: dict[str, str]) -> bool:
        """Write an entry; returns false if there is no room for it."""
        file = self._file(key)
        # the bytes that all other entries may take
        room = self.limit - sum(part.nbytes for part in parts.values()) - HEADER
        # An old entry of the same key is replaced, so it does not count.
        if not self._make_room(room, besides=file.name):
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{self.folder}: cannot be made: {error.strerror}"
            raise FormatError(what, fix="choose another folder with --cache DIR") from error
        # Remains of killed runs are removed here, because no other run may ever write the same entry.
        tidy_folder(self.folder, _ENTRY.fullmatch)
        tensors = {name: LazyArray.of(part) for name, part in parts.items()}
        with suppress(OptionError):  # another process is writing the same entry
            write_safetensors(Stored(tensors, {"crc32": _checksum(parts.values()), **metadata}), file)
        self._used.add(file.name)
        return True

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, room: int, *, besides: str) -> bool:
        """Remove the entries used longest ago until the rest takes at most ``room`` bytes; false if it cannot."""
        total, free = 0, []
        for file in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process may remove entries at the same time
                if _ENTRY.fullmatch(file.name) and file.name != besides:
                    state = file.stat()
                    total += state.st_size
                    if file.name not in self._used:
                        free.append((state.st_mtime_ns, state.st_size, file))
        if total - sum(size for _, size, _ in free) > room:
            return False
        for _, size, file in sorted(free):
            if total <= room:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
            total -= size
        return True


def _checksum(parts: Iterable[Array]) -> str:
    """CRC-32 of the numbers of an entry.

    It detects damage and takes little time (3 GB/s). That the SVD is the right one follows from the name of the file.
    """
    value = 0
    for part in parts:
        value = crc32(np.ascontiguousarray(part).view(np.uint8).data, value)
    return f"{value:08x}"
