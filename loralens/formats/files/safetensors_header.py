"""The header of a safetensors file as it is written, and the order and the pieces of the numbers behind it."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError
from loralens.formats.files.container import DTYPE_NAMES, HEADER_LIMIT, PIECE, PREFIX, read_metadata
from loralens.formats.files.json_text import check_printable

Named = Iterable[tuple[str, LazyArray]]  # tensors with their keys
# Metadata by key. A long text may be given as an iterator of its pieces, so that it is never held as a whole.
Metadata = Mapping[str, str | Iterator[str]]


def header_bytes(tensors: Mapping[str, LazyArray], metadata: Mapping[str, str] | None) -> bytes:
    """The length prefix and the JSON header of a safetensors file; the same input gives the same bytes."""
    parts = list(header_pieces(tensors.items(), metadata))
    return b"".join([prefix_of(sum(map(len, parts))), *parts])


def header_size(tensors: Named, metadata: Metadata | None) -> int:
    """The number of bytes of `header_bytes`."""
    return PREFIX + sum(map(len, header_pieces(tensors, metadata)))


def prefix_of(length: int) -> bytes:
    """The first bytes of a safetensors file: the length of its header.

    Raises
    ------
    FormatError
        No reader accepts a header of this length.
    """
    if length > HEADER_LIMIT:
        what = f"a header of {length:,} bytes is too long for safetensors, which allows {HEADER_LIMIT:,}"
        raise FormatError(what, fix="divide the modules among several files")
    return length.to_bytes(PREFIX, "little")


def header_pieces(tensors: Named, metadata: Metadata | None) -> Iterator[bytes]:
    """The JSON of a header in pieces, since long names can make it as large as the tensors."""
    encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    length = 0
    for text in _header_texts(tensors, metadata, encode):
        piece = text.encode("utf-8")
        length += len(piece)
        yield piece
    # The numbers then start at a multiple of 8, as in files of the reference implementation.
    yield b" " * (-length % 8)


def _header_texts(tensors: Named, metadata: Metadata | None, encode: Callable[[object], str]) -> Iterator[str]:
    yield "{"
    if metadata is not None:
        yield '"__metadata__":'
        yield from _metadata_texts(metadata, encode)
    begin, comma = 0, "" if metadata is None else ","
    for key, tensor in tensors:
        check_printable(key)
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(f"{key}: safetensors has no {tensor.dtype}", fix="convert it to float32")
        end = begin + tensor.nbytes
        # As `encode` would write it; a file may have a hundred thousand of these entries.
        dtype, sizes = DTYPE_NAMES[tensor.dtype], ",".join(map(str, tensor.shape))
        yield f'{comma}{encode(key)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}'
        begin, comma = end, ","
    yield "}"


def _metadata_texts(metadata: Metadata, encode: Callable[[object], str]) -> Iterator[str]:
    opening = "{"
    for key, value in metadata.items():
        yield f"{opening}{encode(key)}:"
        opening = ","
        yield '"'
        for piece in value if isinstance(value, Iterator) else [value]:
            read_metadata({key: piece})
            # Without its quotes: the escapes of a text are those of its pieces.
            yield from (encode(piece[start : start + PIECE])[1:-1] for start in range(0, len(piece), PIECE))
        yield '"'
    yield "{}" if opening == "{" else "}"


def by_width(tensors: Callable[[], Named]) -> Iterator[tuple[str, LazyArray]]:
    """Tensors in the order of a file: wide numbers first, so that every tensor is aligned to its own dtype.

    ``tensors`` is called once for every width, and once before.
    """
    for width in sorted({tensor.dtype.itemsize for _, tensor in tensors()}, reverse=True):
        yield from (item for item in tensors() if item[1].dtype.itemsize == width)


def tensor_pieces(tensor: LazyArray) -> Iterator[Array]:
    """The numbers of a tensor in order, about one MiB at a time if its rows can be read separately."""
    if not tensor.streams or not tensor.size:
        yield tensor.read()
        return
    # as many rows as fit into a piece, and at least one
    step = max(1, PIECE * tensor.shape[0] // max(1, tensor.nbytes))
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0])).read()
