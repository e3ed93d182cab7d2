"""The undo file of a merge: a safetensors file under another name, so that no program loads it as weights.

`loralens.merging.undo.layout` describes its tensors and its only metadata key.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Self, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import Stored, header_parts, read_safetensors, sort_by_width
from loralens.formats.files.disk import write_at
from loralens.formats.files.json_text import json_or_none, json_text
from loralens.formats.files.writing import write_safetensors

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
        with self._lock:
            if self._file is None:
                # In the given folder: the system's folder for temporary files may be a small disk in memory.
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed when the context ends
            file, start, self._end = self._file.fileno(), self._end, self._end + len(data)
        write_at(file, data, start)
        size = len(data)

        def numbers(first: int, last: int) -> Array:
            return np.frombuffer(os.pread(file, last - first, start + first), np.uint8)

        return LazyArray(lambda: numbers(0, size), shape=(size,), dtype=np.uint8, numbers=numbers)


def write_undo(tensors: Mapping[str, LazyArray], content: Mapping[str, Any], path: Path) -> None:
    """Write an undo file, which appears complete or not at all."""
    write_safetensors(Stored(dict(tensors), {KEY: json_text(content)}), path)


def undo_size(tensors: Mapping[str, LazyArray], content: Mapping[str, Any]) -> int:
    """The bytes of the file that `write_undo` would write; no number is read."""
    header = header_parts(sort_by_width(tensors), {KEY: json_text(content)})
    return sum(map(len, header)) + sum(tensor.nbytes for tensor in tensors.values())


def read_undo(path: Path) -> tuple[Mapping[str, LazyArray], dict[str, Any]]:
    """The tensors of an undo file, which are not read yet, and the JSON object in its metadata.

    Raises
    ------
    OptionError
        There is no such file.
    FormatError
        It is damaged, or is not an undo file.
    """
    if not path.is_file():
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
