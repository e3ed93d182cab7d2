"""The undo file of a merge: a safetensors file under another name, so that no program loads it as weights.

`loralens.merging.undo` describes its tensors and its only metadata key.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Self, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import read_safetensors
from loralens.formats.files.disk import disk_errors, write_at
from loralens.formats.files.json_text import json_or_none, object_pieces
from loralens.formats.files.safetensors_header import Named, by_width, header_size
from loralens.formats.files.writing import write_tensors

KEY = "loralens_undo"
NAME = "undo.loralens"


@final
class Spool:
    """A temporary file for byte strings, which are read back as arrays. Several threads can use it.

    It is a context manager: the arrays can be read until it ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._end, self._lock = folder, 0, Lock()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def keep(self, data: bytes) -> LazyArray:
        """Write the bytes, and return them as an uint8 array that is read when it is needed."""
        # Only the position is taken under the lock: threads then write their own parts at the same time.
        with disk_errors():
            with self._lock:
                if self._file is None:
                    # In the given folder: the system's folder for temporary files may be a small disk in memory.
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed at the end
                file, start, self._end = self._file.fileno(), self._end, self._end + len(data)
            write_at(file, data, start)
        return LazyArray(None, shape=(len(data),), dtype=np.uint8, numbers=_KeptBytes(file, start))


@final
class _KeptBytes:
    """Bytes of a spool from their first to their last index; called by `LazyArray`, and smaller than a function."""

    __slots__ = ("_file", "_start")

    def __init__(self, file: int, start: int) -> None:
        self._file, self._start = file, start

    def __call__(self, first: int, last: int) -> Array:
        return np.frombuffer(os.pread(self._file, last - first, self._start + first), np.uint8)


Content = Callable[[], Iterable[tuple[str, Any]]]  # the fields of the JSON object, as `object_pieces` takes them


def write_undo(tensors: Callable[[], Named], content: Content, path: Path) -> None:
    """Write an undo file, which appears complete or not at all.

    Only loralens reads undo files, so `safetensors` does not check them: it would take four times the memory of all
    names. ``tensors`` is called several times.
    """
    with atomic_file(path) as stream:
        write_tensors(stream, partial(by_width, tensors), {KEY: object_pieces(content())})


def undo_size(tensors: Callable[[], Named], content: Content) -> int:
    """The bytes of the file that `write_undo` would write; no number is read."""
    header = header_size(by_width(tensors), {KEY: object_pieces(content())})
    return header + sum(tensor.nbytes for _, tensor in tensors())


def read_undo(path: Path) -> tuple[Mapping[str, LazyArray], dict[str, Any]]:
    """The tensors of an undo file, which are not read yet, and the JSON object in its metadata.

    Raises
    ------
    OptionError
        There is no such file.
    FormatError
        It is damaged, or is not an undo file.
    """
    if not path.exists():
        raise OptionError(
            f"{path}: no such file", fix=f"give the undo file of the merge: OUT/{NAME}, or OUT.{NAME} for one file"
        )
    stored = read_safetensors(path)
    with place(path):
        content = json_or_none((stored.metadata or {}).get(KEY))
        # A safetensors file without our key is not an undo file, and neither is one with a damaged value.
        if not isinstance(content, dict):
            raise FormatError("is not an undo file", fix=f"give the {NAME} that merge wrote")
    return stored.tensors, content
