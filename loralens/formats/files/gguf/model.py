"""The header of a GGUF model: its key-values, and the position of each tensor. No number is read.

Long arrays (the vocabulary and its merges) are skipped; `GgufHeader.spans` says where their bytes are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import final

from loralens.errors import FormatError, place
from loralens.formats.files.container import OpenFile
from loralens.formats.files.gguf import header as gguf_header
from loralens.formats.files.gguf.container import MOST_AXES, TensorInfo, check_coverage, read_alignment
from loralens.formats.files.gguf.header import BROKEN, Header
from loralens.formats.files.gguf.types import TENSOR_TYPES
from loralens.formats.files.gguf.values import Value

# Most items of an array that is read: heads and sizes may have one number for each block; a vocabulary has thousands.
LONGEST = 1024


@final
@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file.

    Attributes
    ----------
    file : OpenFile
    values : mapping of str to Value
        The key-values in the order of the file; the value of an array of more than `LONGEST` items is None.
    spans : mapping of str to (int, int)
        The bytes of each key-value in the file, from the length of its key to the end of its value.
    infos : mapping of str to TensorInfo
        The tensors in the order of the header.
    infos_at : int
        The position after the key-values, where the entries of the tensors begin.
    start : int
        The position of the numbers.
    alignment : int
        Each tensor begins at a multiple of it, counted from ``start``.
    """

    file: OpenFile
    values: Mapping[str, Value]
    spans: Mapping[str, tuple[int, int]]
    infos: Mapping[str, TensorInfo]
    infos_at: int
    start: int
    alignment: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF model and check every count and offset.

    Raises
    ------
    FormatError
        The file is damaged, or has a type of tensors that is unknown here.
    """
    with place(path):
        file = OpenFile(path)
        header = Header(file)
        tensors, count = gguf_header.read_counts(header)
        values: dict[str, Value] = {}
        spans: dict[str, tuple[int, int]] = {}
        begin = header.at
        for key, value in gguf_header.read_values(header, count, longest=LONGEST):
            values[key], spans[key], begin = value, (begin, header.at), header.at
        infos: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name = header.name()
            if name in infos:
                raise FormatError(f"{name} appears twice", fix=BROKEN)
            with place(name):
                infos[name] = _info(header)
        alignment = read_alignment(values.get("general.alignment"))
        start = -(-header.at // alignment) * alignment  # rounded up
        check_coverage(infos, start, file.size, alignment)
        return GgufHeader(file, values, spans, infos, begin, start, alignment)


def _info(header: Header) -> TensorInfo:
    axes = header.number("I")
    if not 1 <= axes <= MOST_AXES:
        raise FormatError(f"claims {axes:,} axes", fix=BROKEN)
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    kind, begin = header.number("I"), header.number("Q")
    if kind not in TENSOR_TYPES:
        what = f"is stored as type {kind} of ggml, which is unknown here"
        raise FormatError(what, fix="give the model in another quantisation, such as Q4_K_M or Q8_0")
    name, numbers, nbytes = TENSOR_TYPES[kind]
    if not prod(shape):
        raise FormatError(f"{name} {shape} holds no numbers", fix=BROKEN)
    if shape[-1] % numbers:
        raise FormatError(f"{name} {shape} is not in blocks of {numbers}", fix=BROKEN)
    return TensorInfo(shape, kind, begin, prod(shape) // numbers * nbytes)


def tensors_in_file(header: GgufHeader) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors in the order of their numbers, which may differ from that of the header."""
    yield from sorted(header.infos.items(), key=lambda item: item[1].begin)
