"""How many bytes a file will have, header included, before any number of it is computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.formats import WriterOptions, stored_as
from loralens.formats.files.container import Files, Stored, aligned, header_parts
from loralens.formats.files.gguf import values as gguf_values
from loralens.formats.files.gguf.container import ALIGNMENT
from loralens.formats.files.torch.writer import pickle_bytes


def file_size(adapter: Adapter, format: str | None = None, **options: Unpack[WriterOptions]) -> int:
    """Bytes of the file of weights that `save` would write of ``adapter``, to the byte.

    The configuration beside it is not counted. Parameters and errors as those of `loralens.formats.save`.
    """
    return stored_size(*stored_as(adapter, format, **options))


def stored_size(stored: Stored, files: Files) -> int:
    """Bytes of the file that ``stored`` will be."""
    suffix = Path(files.weights).suffix
    if suffix == ".gguf":
        return _gguf(stored)
    if suffix == ".bin":
        return _pickle(stored.tensors)
    tensors = aligned(stored.tensors)
    return sum(map(len, header_parts(tensors, stored.metadata))) + sum(tensor.nbytes for tensor in tensors.values())


def _pickle(tensors: Mapping[str, LazyArray]) -> int:
    """Of a torch pickle: zeros take as many bytes as other numbers."""
    zeros = {
        key: LazyArray.of(np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)) for key, tensor in tensors.items()
    }
    return sum(len(part) for part in pickle_bytes(zeros))


def _gguf(stored: Stored) -> int:
    """Of a GGUF file: magic, version and two counts; key-values; tensor infos; the numbers, each on the alignment."""
    values = dict(gguf_values.from_text(key, text) for key, text in (stored.metadata or {}).items())
    stored_alignment = values.get("general.alignment")
    alignment = ALIGNMENT if stored_alignment is None else int(stored_alignment.value)
    header = 24 + sum(8 + len(key.encode()) + gguf_values.size(value) for key, value in values.items())
    header += sum(8 + len(key.encode()) + 4 + 8 * tensor.ndim + 12 for key, tensor in stored.tensors.items())
    parts = [header, *(tensor.nbytes for tensor in stored.tensors.values())]
    return sum(-(-part // alignment) * alignment for part in parts)
