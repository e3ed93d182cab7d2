"""The size of a file that would be written, including its header, before any number is computed."""

from pathlib import Path
from typing import Unpack

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.formats import encode_adapter
from loralens.formats.dialects.table import WriterOptions
from loralens.formats.files.container import Files, Stored
from loralens.formats.files.safetensors_header import by_width, header_size


def file_size(adapter: Adapter, format: str | None = None, **options: Unpack[WriterOptions]) -> int:
    """The exact size in bytes of the file of weights that `loralens.formats.save` would write.

    The configuration beside it is not counted. Parameters and errors are those of `save`.
    """
    return stored_size(*encode_adapter(adapter, format, **options))


def stored_size(stored: Stored, files: Files) -> int:
    """The size in bytes of the file of weights that ``stored`` would become."""
    suffix = Path(files.weights).suffix
    if suffix == ".gguf":
        return _gguf(stored)
    if suffix == ".bin":
        from loralens.formats.files.torch_pickle import write_torch  # few files are pickles

        # It is written with zeros, which take as many bytes as other numbers.
        zeros = {
            key: LazyArray.of(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape))
            for key, tensor in stored.tensors.items()
        }
        counted = _Counted()
        write_torch(zeros, counted)
        return counted.size
    numbers = sum(tensor.nbytes for tensor in stored.tensors.values())
    return header_size(by_width(stored.tensors.items), stored.metadata) + numbers


class _Counted:
    """A stream that counts the bytes that are written to it, and keeps none."""

    size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Count ``data``."""
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing; torch calls it."""


def _gguf(stored: Stored) -> int:
    """The size of a GGUF file: header, key-values, entries of tensors, and the numbers padded to the alignment."""
    from loralens.formats.files.gguf import values as gguf_values  # few files are GGUF
    from loralens.formats.files.gguf.container import ALIGNMENT

    values = dict(gguf_values.from_text(key, text) for key, text in (stored.metadata or {}).items())
    stored_alignment = values.get("general.alignment")
    alignment = ALIGNMENT if stored_alignment is None else int(stored_alignment.value)
    # 24: magic (4), version (4) and two counts (8 each). A name has its length (8) before it. The entry of a tensor has
    # its number of axes (4), the axes (8 each), its type (4) and its offset (8).
    header = 24 + sum(8 + len(key.encode()) + gguf_values.value_size(value) for key, value in values.items())
    header += sum(8 + len(key.encode()) + 4 + 8 * tensor.ndim + 12 for key, tensor in stored.tensors.items())
    # The header is padded as well.
    parts = [header, *(tensor.nbytes for tensor in stored.tensors.values())]
    return sum(-(-part // alignment) * alignment for part in parts)
