"""The record of a merge into the codes of one weight, and the bytes of its stored tensor before and after."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.core.weights import CodedWeight, Codes
from loralens.errors import FormatError
from loralens.merging.low_bit.apply import CodesMerge
from loralens.merging.low_bit.measure import CodesSums
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import as_matrix
from loralens.merging.record import StoredCodes, TensorRecord, feed_hash, hash_rows
from loralens.merging.undo.patch import Keep, PatchWriter, keep_in_memory
from loralens.merging.update import row_ranges

Bytes = NDArray[np.uint8]


@final
class CodesRecorder:
    """Records the blocks of one coded weight while they are merged.

    Parameters
    ----------
    merge : CodesMerge
    stored : LazyArray
        The stored tensor of the base that holds the codes.
    hashes, fidelity, undo : bool
        What to record. Each of them takes time.
    keep : callable
        Stores parts of the patch while it is made (see `PatchWriter`).
    ordered : bool
        Whether rows are yielded in the order of the weight. The writer then brings them into the order of the file.
    """

    def __init__(
        self,
        merge: CodesMerge,
        stored: LazyArray,
        *,
        hashes: bool = True,
        fidelity: bool = True,
        undo: bool = True,
        keep: Keep = keep_in_memory,
        ordered: bool = False,
    ) -> None:
        self._ordered = ordered
        self._merge, self._stored, self._hashes, self._fidelity = merge, stored, hashes, fidelity
        self._patch = PatchWriter(1, keep) if undo else None
        self._before, self._after = "", sha256() if hashes else None
        self._sums: dict[int, CodesSums] = {}

    def blocks(self) -> Iterator[Array]:
        """Yield the bytes of the merged rows in order. When all have been taken, `record` is complete."""
        weight, stored = self._merge.weight, self._stored
        if self._patch is not None:
            self._before = proven_hash(weight, stored)
        elif self._hashes:
            self._before = hash_rows(MatrixRows(stored, as_matrix(stored.shape)).blocks())
        yield from hashed_rows(weight, self._codes(), self._after, ordered=self._ordered)

    def _codes(self) -> Iterator[tuple[int, Codes]]:
        """The first row and the merged codes of every block."""
        for block in self._merge.blocks():
            if self._fidelity and block.slab:
                # Blocks come in order, and a slab may have many of them.
                if block.slab.start not in self._sums:
                    self._sums[block.slab.start] = CodesSums(block.slab, self._merge)
                self._sums[block.slab.start].take(block)
            if self._patch is not None:
                lowest = block.grid.lowest
                self._patch.block(codes_as_bytes(block.grid.codes, lowest), codes_as_bytes(block.drawn.codes, lowest))
            yield block.start, block.drawn.codes

    def record(self) -> TensorRecord:
        """The record of all blocks."""
        patch = self._patch.finish() if self._patch else None
        weight, stored = self._merge.weight, self._stored
        return TensorRecord(
            self._merge.plan,
            stored.dtype,
            tuple(sums.fidelity() for _, sums in sorted(self._sums.items())),
            self._before,
            self._after.hexdigest() if self._after else "",
            patch,
            patch.nbytes if patch else 0,
            "codes",
            {},
            # GGUF's tensors have the names of the plan here, and those of safetensors the names of their codes.
            StoredCodes(
                self._merge.plan.key if self._ordered else weight.stored, weight.layout, stored.dtype, stored.shape
            ),
        )


def codes_as_bytes(codes: Codes, lowest: int) -> Bytes:
    """Codes as uint8, counted from the lowest one; no grid has more than 256 codes."""
    return (codes - np.int16(lowest)).astype(np.uint8)


def encode_rows(weight: CodedWeight, blocks: Iterator[tuple[int, Codes]]) -> Iterator[Bytes]:
    """Yield the bytes of the stored tensor in the order of the file, from the codes of its rows in their own order.

    A layout whose rows do not lie in order in the file is collected first: it needs the memory of the stored tensor.
    """
    encode = weight.encode
    assert encode is not None
    if not weight.by_rows:
        yield encode(0, np.concatenate([codes for _, codes in blocks]))
    elif weight.row_order is None:
        for start, codes in blocks:
            yield encode(start, codes)
    else:
        yield from tensor_in_file_order(weight.row_order, ((start, encode(start, codes)) for start, codes in blocks))


def hashed_rows(
    weight: CodedWeight, blocks: Iterator[tuple[int, Codes]], digest: Any, *, ordered: bool
) -> Iterator[Bytes]:
    """Yield the bytes of rows, and feed them to a hash in the order of the file; ``digest`` may be None.

    With ``ordered`` the rows come in the order of the weight, else in that of the file.
    """
    if not ordered or not weight.by_rows:
        for rows in encode_rows(weight, blocks):
            feed_hash(digest, rows)
            yield rows
        return
    assert weight.encode is not None
    parts = []
    for start, codes in blocks:
        rows = weight.encode(start, codes)
        if weight.row_order is None:
            feed_hash(digest, rows)
        else:
            parts.append((start, rows))
        yield rows
    if weight.row_order is not None and digest is not None:
        for tensor in tensor_in_file_order(weight.row_order, iter(parts)):
            feed_hash(digest, tensor)


def tensor_in_file_order(order: NDArray[np.intp], blocks: Iterator[tuple[int, Bytes]]) -> Iterator[Bytes]:
    """The bytes of all rows in the order of the file. An expert is a part of a stored tensor and begins within it."""
    tensor, first = None, int(order.min()) if len(order) else 0
    for start, rows in blocks:
        if tensor is None:
            tensor = np.empty((len(order), rows.shape[1]), np.uint8)
        tensor[order[start : start + len(rows)] - first] = rows
    if tensor is not None:
        yield tensor


def proven_hash(weight: CodedWeight, stored: LazyArray) -> str:
    """The SHA-256 of the stored tensor, after a check that encoding its codes again gives the same bytes.

    Raises
    ------
    FormatError
        Encoding the codes again gives other bytes, so no undo file could restore the tensor.
    """
    assert weight.grid is not None
    grid = weight.grid
    ranges = row_ranges(*as_matrix(weight.shape))
    again = hash_rows(encode_rows(weight, ((start, grid(start, stop).codes) for start, stop in ranges)))
    if again != hash_rows(MatrixRows(stored, as_matrix(stored.shape)).blocks()):
        raise FormatError(
            f"{weight.stored}: encoding its {weight.layout} codes again gives other bytes, so no undo file restores it",
            fix="leave the undo file out with --undo none, or write the merged model in floats: --dtype bf16",
        )
    return again
