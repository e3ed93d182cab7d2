"""How stored tensors hold the numbers of a weight, and the merge of one of them, a block of rows at a time.

A codec reads rows of the base, adds an update to them, and gives the rows that are written. There is one for floats
(and float8 with scales), one for codes that a merge moves on the grid of their layout, and two that quantise merged
floats once: to NF4, as bitsandbytes stores it, and to a block type of ggml. `TensorMerge.blocks` is the same for all.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.weights import CodedWeight, Codes, GridRows, add_squares, round_lengths
from loralens.errors import LEAVE_EXTRA_OUT, FormatError, MismatchError, OptionError
from loralens.linalg.codes import BLOCK, GGML_BLOCK, LEVELS, BlockType, dequantise_nf4, quantise_nf4
from loralens.linalg.device import Device
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import Draws
from loralens.merging.grid_moves import added_numbers, asked_moves, move_codes, nearest_codes, uniform_numbers
from loralens.merging.merge_plan import (
    Axis,
    Buffer,
    Magnitude,
    MatrixRows,
    Segment,
    TensorPlan,
    UpdateMatrix,
    as_matrix,
    cuts,
    matrix_blocks,
    row_ranges,
)
from loralens.merging.merge_rounding import (
    WIDE,
    Feedback,
    MergeRounding,
    add_update,
    input_directions,
    round_sums,
    slices_for,
    subtract_update,
)
from loralens.merging.patch import bits

Bytes = NDArray[np.uint8]
Against = Literal["subtracted", "merged", "nothing", "codes"]  # what a patch is relative to (see `TensorRecord`)
Part = Literal["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"]
PARTS: tuple[Part, ...] = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")


class StoredCodes(NamedTuple):
    """The stored tensor of a coded weight: its key, the name of its layout, its dtype and its shape."""

    key: str
    layout: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(slots=True)
class MergedBlock:
    """Some rows of a stored tensor of floats before and after the merge. Arrays are valid until the next block.

    Attributes
    ----------
    start, stop : int
        Range of rows in the matrix of the tensor.
    segment : Segment or None
        The segment that contains the rows; None if nothing is added to them.
    stored, W : array, shape (stop − start, columns)
        The rows of the base (or of its replacement) in their dtype, and the weights that they represent: the same, or
        ``stored`` times its scale.
    D, dora_factors : float32 array or None
        The update, and DoRA's factors.
    scale : float32 array or None
        The scale of ``merged``, if that is float8 with scales.
    merged : array
        The merged rows in the dtype of the result.
    total : array or None
        g·(W + D) before rounding, if it was kept.
    quantised, written : float32 array, uint8 array or None
        The numbers and the bytes of new codes that ``merged`` is quantised to.
    """

    start: int
    stop: int
    segment: Segment | None
    stored: Array
    W: Array
    D: Singles | None
    dora_factors: Singles | None
    scale: Singles | None
    merged: Array
    total: Array | None = None
    quantised: Singles | None = None
    written: Array | None = None

    def numbers(self, merged: Array) -> Array:
        """The weights that these rows of a merged tensor represent: the rows times their scale."""
        return merged if self.scale is None else merged.astype(np.float32) * self.scale

    def reference(self, against: Against, buffer: Buffer) -> Array:
        """The rows to which a patch is relative; zeros where it holds the whole tensor."""
        dtype = self.stored.dtype
        if against == "subtracted" and self.D is not None:
            out = buffer.of(self.stored.shape)
            return subtract_update(self.merged, self.D, dtype, dora_factors=self.dora_factors, out=out)
        return np.zeros_like(self.stored) if against == "nothing" else round_sums(self.merged, dtype)

    def count_unmoved(self) -> int:
        """The number of entries that kept their value; none of new codes, since every number moves to a level."""
        if self.quantised is not None:
            return 0
        # For float8 with scales the stored numbers are compared, since only they are rounded.
        before = self.W if self.scale is None else self.stored
        if self.merged.dtype == before.dtype:
            return int(np.count_nonzero(bits(self.merged) == bits(before)))
        return int(np.count_nonzero(self.merged.astype(np.float64) == before.astype(np.float64)))

    def losses(self, buffer: Buffer) -> tuple[Array, Array]:
        """D (with DoRA the effective update g·(W + D) − W) and W' − W − D, both float32."""
        assert self.D is not None
        if self.quantised is not None:
            W = self.W.astype(np.float32)
            D = self.merged.astype(np.float32) - W
            return D, self.quantised - W - D
        lost, D = buffer.of(self.W.shape), self.D
        if self.dora_factors is not None:
            D = add_update(self.W, D, dora_factors=self.dora_factors).astype(np.float32, copy=False)
            D -= self.W.astype(np.float32)
        # W' − total is exact; W' − W − D rounds twice in float32.
        if self.total is not None:
            # Converted first, since NumPy takes longer to do it within the subtraction.
            np.copyto(lost, self.merged)
            np.subtract(lost, self.total, out=lost, dtype=np.float32, casting="same_kind")
        else:
            np.subtract(self.numbers(self.merged), self.W, out=lost, dtype=np.float32, casting="same_kind")
            lost -= D
        return D, lost


@final
@dataclass(slots=True)
class GridBlock:
    """Some rows of a weight of codes before and after the merge.

    Attributes
    ----------
    grid : GridRows
        The rows of the base.
    D : float32 array or None
        What the adapter adds to these rows; with DoRA g·(W + D) − W.
    moves : float64 array or None
        What D asks of every code (`asked_moves`).
    codes, clipped : int16 array, bool array
        The merged codes, and where the move ends beyond the grid.
    """

    start: int
    stop: int
    segment: Segment | None
    grid: GridRows
    D: Singles | None
    moves: Floats | None
    codes: Codes
    clipped: NDArray[np.bool_]

    @property
    def W(self) -> Singles:
        """The numbers of the base."""
        return self.grid.values(self.grid.codes)

    @property
    def stored(self) -> Bytes:
        """The codes of the base as bytes."""
        return codes_as_bytes(self.grid.codes, self.grid.lowest)

    def reference(self, against: Against, buffer: Buffer) -> Bytes:
        """The merged codes as bytes, to which a patch is relative."""
        del against, buffer
        return codes_as_bytes(self.codes, self.grid.lowest)

    def count_unmoved(self) -> int:
        """The number of codes that kept their place."""
        return int(np.count_nonzero(self.codes == self.grid.codes))

    def losses(self, buffer: Buffer) -> tuple[Array, Array]:
        """D and W' − W − D, both float32."""
        del buffer
        assert self.D is not None
        return self.D, added_numbers(self.grid, self.codes) - self.D


Block = MergedBlock | GridBlock


class Codec(ABC):
    """How one stored tensor holds the numbers of a weight, and how a merge writes them.

    Attributes
    ----------
    plan : TensorPlan
        The plan of the weight in floats.
    rounding : MergeRounding
    dtype : dtype
        The dtype of the written tensor.
    floats : LazyArray
        The numbers to which updates are added.
    slices : int
        The number of slices of the exact product. It follows the dtype of the base, as unmerging by a patch does.
    before : LazyArray or None
        The stored tensor of the base that the written one takes the place of.
    stored : StoredCodes or None
        The written tensor, if it is not that of the plan.
    against : str
        What a patch that restores the base is relative to.
    measured : bool
        Whether the fidelity of a merge can be measured.
    """

    plan: TensorPlan
    rounding: MergeRounding
    dtype: np.dtype[Any]
    floats: LazyArray
    slices: int
    before: LazyArray | None
    stored: StoredCodes | None = None
    against: Against = "nothing"
    measured = True

    @abstractmethod
    def keep(self, start: int, stop: int) -> Block:
        """Rows to which nothing is added."""

    @abstractmethod
    def merge(self, start: int, segment: Segment, D: Singles, factors: Singles | None, out: Buffer) -> Block:
        """The rows from ``start`` on with D added, and DoRA's factors."""

    @abstractmethod
    def write(self, blocks: Iterable[Any], digest: Any | None) -> Iterator[Array]:
        """Yield what is written, and feed it to a hash in the order of the file."""

    def hash_before(self, *, proven: bool) -> str | None:
        """The SHA-256 of the stored tensor if it is read apart from the blocks; ``proven``: it can be restored."""
        del proven
        return None


class FloatCodec(Codec):
    """Floats of any dtype, and float8 with a scale for each number.

    Parameters
    ----------
    plan : TensorPlan
    dtype : dtype or None
        The dtype of the result. The default is that of the base.
    rounding : MergeRounding or None
        The default is rounding to the nearest.
    """

    def __init__(self, plan: TensorPlan, dtype: DTypeLike | None = None, rounding: MergeRounding | None = None) -> None:
        self.plan, self.rounding = plan, rounding or MergeRounding()
        self.dtype, self.floats, self.before = np.dtype(dtype or plan.dtype), plan.source, plan.base
        self.slices = slices_for(plan.source.dtype)
        self._rows = MatrixRows(plan.source, plan.matrix)
        self._scales = MatrixRows(plan.scale, plan.matrix) if plan.scale else None
        # Whether the result is float8 with the scales of the base.
        self.requantised = plan.scale is not None and self.dtype == plan.source.dtype
        self._with_feedback = self.rounding.mode == "feedback" and self.dtype not in WIDE
        self._feedback: tuple[Segment, Feedback | None] | None = None
        if self._with_feedback and self.requantised:
            raise OptionError(
                "error feedback is not available for float8 weights with scales",
                fix="use --rounding nearest, or write another --dtype",
            )

    @property
    def against(self) -> Against:  # type: ignore[override]
        """What a patch is relative to; D is subtracted only if unmerging can compute it from factors."""
        plan = self.plan
        # The merged numbers say nothing about the base: it was replaced, or is float8 and written in another dtype.
        if plan.replacement is not None or (plan.scale is not None and not self.requantised):
            return "nothing"
        terms = [update for segment in plan.segments for _, update in segment.terms]
        # Only pairs are stored in an undo file; other forms would need all their parts.
        pairs = plan.scale is None and terms and all(isinstance(update, LowRank) for update in terms)
        return "subtracted" if pairs else "merged"

    def _read(self, start: int, stop: int) -> tuple[Array, Array, Singles | None]:
        """Rows as stored, the numbers that they represent, and the scale with which the result is stored."""
        stored = self._rows.rows(start, stop)
        if self._scales is None:
            return stored, stored, None
        scale = self._scales.rows(start, stop)
        # In another dtype the merged weights are stored without scales.
        return stored, stored.astype(np.float32) * scale, scale if self.requantised else None

    def keep(self, start: int, stop: int) -> MergedBlock:
        """Rows to which nothing is added."""
        stored, W, scale = self._read(start, stop)
        merged = self._with_tokens(start, stored if scale is not None else round_sums(W, self.dtype))
        return MergedBlock(start, stop, None, stored, W, None, None, scale, merged)

    def merge(self, start: int, segment: Segment, D: Singles, factors: Singles | None, out: Buffer) -> MergedBlock:
        """The rows from ``start`` on with D added."""
        stop = start + len(D)
        stored, W, scale = self._read(start, stop)
        total = out.of(W.shape)
        total = add_update(W, D, dora_factors=factors, out=total)
        merged = self._round(total, scale, start, segment)
        # In a wide dtype the merged rows may be `total` itself, so it is kept for narrow dtypes only.
        kept = total if scale is None and self.dtype not in WIDE else None
        return MergedBlock(
            start, stop, segment, stored, W, D, factors, scale, self._with_tokens(start, merged), kept
        )  # fmt: skip

    def _round(self, total: Array, scale: Singles | None, start: int, segment: Segment) -> Array:
        """The sums of a block, rounded."""
        if scale is not None:
            # A scale of 0 belongs to weights that are all 0. The quotient is NaN or infinite, which needs no warning.
            with np.errstate(divide="ignore", invalid="ignore"):
                total /= scale
        if self._with_feedback:
            if self._feedback is None or self._feedback[0] is not segment:
                V = input_directions(segment.terms)
                self._feedback = segment, None if V is None else Feedback(V, transposed=segment.transposed)
            if self._feedback[1]:
                return self._feedback[1].round_rows(total, start - segment.start, self.dtype)
        # Random numbers belong to entries, so each block begins at the index of its first one.
        return round_sums(total, self.dtype, rounding=replace(self.rounding, offset=start * total.shape[1]))

    def _with_tokens(self, start: int, merged: Array) -> Array:
        tokens = self.plan.tokens
        # The rows of an embedding are tokens, so a block has those whose index lies in its range.
        trained = (
            [(k, i - start) for k, i in enumerate(tokens.indices) if 0 <= i - start < len(merged)] if tokens else []
        )
        if trained and tokens:
            rows = tokens.rows.read()
            # The array may be that of the base, which must not be modified.
            merged = merged.copy()
            for k, row in trained:
                merged[row] = rows[k].astype(merged.dtype)
        return merged

    def write(self, blocks: Iterable[MergedBlock], digest: Any | None) -> Iterator[Array]:
        """Yield the merged rows."""
        for block in blocks:
            feed_hash(digest, block.merged)
            yield block.merged


@final
class Nf4Codec(FloatCodec):
    """Merged floats that are quantised to NF4 once: one part of the weight (codes, scales, levels or a description).

    W + ΔW is not rounded to another dtype before it is quantised. The numbers of a base in 16 bits lie off the grid, so
    an update moves some of them over a boundary, and on average all of it arrives.
    """

    against: Against = "nothing"  # the codes say nothing about the base

    def __init__(self, plan: TensorPlan, part: Part) -> None:
        super().__init__(plan, np.float32)
        # The fidelity is measured on whole rows, so each row must consist of whole blocks.
        self._part, self.measured = part, part == "" and plan.matrix[1] % BLOCK == 0
        self.before = plan.base if part == "" else None
        self.stored = StoredCodes(plan.key + part, "bitsandbytes NF4", *part_shape(part, plan))

    def merge(self, *arguments: Any) -> MergedBlock:
        """The rows with D added, quantised if their fidelity is measured."""
        block = super().merge(*arguments)
        if self.measured:
            codes, absmax = quantise_nf4(block.merged.reshape(-1))
            block.quantised = dequantise_nf4(codes, absmax).reshape(block.merged.shape)
            block.written = self._packed(codes, absmax)
        return block

    def write(self, blocks: Iterable[MergedBlock], digest: Any | None) -> Iterator[Array]:
        """Yield the part in order."""
        for rows in self._new_rows(blocks):
            feed_hash(digest, rows)
            yield rows

    def _new_rows(self, blocks: Iterable[MergedBlock]) -> Iterator[Array]:
        if self._part == ".quant_map":
            yield LEVELS
            return
        if self._part == ".quant_state.bitsandbytes__nf4":
            yield _nf4_state(self.plan)
            return
        pending, left = np.empty(0, np.float32), prod(self.plan.matrix)
        for block in blocks:
            left -= block.merged.size
            if block.written is not None:
                yield block.written
                continue
            # A block of 64 may go on in the next rows.
            pending = np.concatenate([pending, block.merged.astype(np.float32, copy=False).reshape(-1)])
            size = pending.size // BLOCK * BLOCK if left else pending.size
            yield self._packed(*quantise_nf4(pending[:size]))
            pending = pending[size:].copy()

    def _packed(self, codes: Bytes, absmax: Singles) -> Array:
        """The scales, or two codes in a byte, the first in the high nibble, shape (bytes, 1)."""
        if self._part:
            return absmax
        if codes.size % 2:
            # The byte that is left over holds the code of 0, as bitsandbytes pads the numbers.
            codes = np.append(codes, np.uint8(7))
        return ((codes[::2] << 4) | codes[1::2])[:, None]


def part_shape(part: Part, plan: TensorPlan) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and shape of a part of a weight of NF4 as it is stored; the part is the end of its key."""
    size, codes, floats = prod(plan.matrix), np.dtype(np.uint8), np.dtype(np.float32)
    shapes: dict[Part, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "": (codes, (-(-size // 2), 1)),
        ".absmax": (floats, (-(-size // BLOCK),)),
        ".quant_map": (floats, LEVELS.shape),
        ".quant_state.bitsandbytes__nf4": (codes, _nf4_state(plan).shape),
    }
    return shapes[part]


def _nf4_state(plan: TensorPlan) -> Array:
    """The description of a weight, as bitsandbytes packs it."""
    # bitsandbytes decodes the weight to this dtype for its products: the dtype that the base has.
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(plan.dtype), "shape": list(plan.shape)}
    return np.frombuffer(json.dumps(state).encode("utf-8"), np.uint8)


@final
class GgmlCodec(FloatCodec):
    """Merged floats that are quantised once to a block type of ggml, as a GGUF file stores it.

    ``order`` is the position of every row in the file; None: rows lie in order.
    """

    against: Against = "nothing"

    def __init__(self, plan: TensorPlan, type_: BlockType, order: NDArray[np.intp] | None) -> None:
        super().__init__(plan, np.float32)
        self._type, self._order = type_, order
        self.stored = StoredCodes(plan.key, type_.name, np.dtype(np.uint8), (prod(ggml_shape(type_, plan)),))

    def keep(self, start: int, stop: int) -> MergedBlock:
        """Rows to which nothing is added, quantised."""
        return self._quantise(super().keep(start, stop))

    def merge(self, *arguments: Any) -> MergedBlock:
        """The rows with D added, quantised."""
        return self._quantise(super().merge(*arguments))

    def _quantise(self, block: MergedBlock) -> MergedBlock:
        numbers = block.merged.astype(np.float32, copy=False)
        quantised = self._type.quantise(np.ascontiguousarray(numbers).reshape(-1, GGML_BLOCK))
        # Scales are float16. An infinite one would turn the 32 numbers of its block into NaN or infinity.
        if not np.isfinite(quantised.numbers).all() and np.isfinite(numbers).all():
            what = f"{self.plan.key}: numbers are too large for the float16 scales of {self._type.name}"
            raise FormatError(what, fix="check the adapter's α and scale, or merge with --dtype")
        block.quantised = quantised.numbers.reshape(numbers.shape)
        block.written = quantised.stored.reshape(len(numbers), -1)
        return block

    def write(self, blocks: Iterable[MergedBlock], digest: Any | None) -> Iterator[Array]:
        """Yield the bytes of the rows in their own order."""
        rows = ((block.start, block.written) for block in blocks if block.written is not None)
        return file_rows(rows, self._order, digest)


def ggml_shape(type_: BlockType, plan: TensorPlan) -> tuple[int, int]:
    """The rows of a weight of blocks of ggml, and the bytes of each."""
    return plan.matrix[0], plan.matrix[1] // GGML_BLOCK * type_.nbytes


@final
class GridCodec(Codec):
    """Codes of a quantised weight that a merge moves on their grid; the scales stay.

    Parameters
    ----------
    plan : TensorPlan
        The plan of the decoded weight.
    weight : CodedWeight
    rounding : MergeRounding
        ``stochastic`` or ``nearest``.
    written : str
        The key of the stored tensor that holds the codes.
    before : LazyArray or None
        That tensor of the base; needed for a record.

    Raises
    ------
    MismatchError, FormatError
        The codes of this layout cannot be moved, or the adapter replaces numbers of the weight.
    """

    # As for 16-bit weights: what one slice leaves out is far below the step of any grid.
    slices = 1
    against: Against = "codes"

    def __init__(
        self,
        plan: TensorPlan,
        weight: CodedWeight,
        rounding: MergeRounding,
        written: str = "",
        before: LazyArray | None = None,
    ) -> None:
        check_movable(plan, weight)
        self.plan, self.weight, self.rounding = plan, weight, rounding
        self.floats, self.before = weight.floats(), before
        if before is not None:
            self.dtype = before.dtype
            self.stored = StoredCodes(written, weight.layout, before.dtype, before.shape)

    def rows(self, start: int, stop: int) -> GridRows:
        """The grid of some rows."""
        assert self.weight.grid is not None
        return self.weight.grid(start, stop)

    def keep(self, start: int, stop: int) -> GridBlock:
        """Rows to which nothing is added."""
        grid = self.rows(start, stop)
        return GridBlock(start, stop, None, grid, None, None, grid.codes, np.zeros(grid.codes.shape, np.bool_))

    def merge(self, start: int, segment: Segment, D: Singles, factors: Singles | None, out: Buffer) -> GridBlock:
        """The rows from ``start`` on with D added."""
        del out
        grid = self.rows(start, start + len(D))
        D = self.added(grid, D, factors)
        moves = asked_moves(grid, D)
        if self.rounding.mode == "nearest":
            codes, clipped = nearest_codes(grid, moves)
        else:
            codes, clipped = move_codes(grid, moves.copy(), self.uniform(start, moves.shape))
        return GridBlock(start, start + len(D), segment, grid, D, moves, codes, clipped)

    def added(self, grid: GridRows, D: Singles, factors: Singles | None) -> Singles:
        """What an adapter adds to some rows: D, or with DoRA g·(W + D) − W."""
        if factors is None:
            return D
        W = grid.values(grid.codes)
        return np.asarray(add_update(W, D, dora_factors=factors) - W, dtype=np.float32)

    def uniform(self, start: int, shape: tuple[int, ...]) -> Floats:
        """The numbers u of the draws of some rows, from row ``start`` on."""
        draws = Draws.named(self.rounding.seed, self.rounding.key)
        return uniform_numbers(draws, start * shape[1], prod(shape)).reshape(shape)

    def write(self, blocks: Iterable[GridBlock], digest: Any | None) -> Iterator[Array]:
        """Yield the bytes of the rows."""
        codes = ((block.start, block.codes) for block in blocks)
        return encoded_rows(self.weight, codes, digest)

    def hash_before(self, *, proven: bool) -> str:
        """The SHA-256 of the stored tensor; ``proven``: encoding its codes again gives the same bytes.

        Raises
        ------
        FormatError
            It gives other bytes, so no undo file could restore the tensor.
        """
        assert self.before is not None
        stored = hash_rows(matrix_blocks(self.before))
        if not proven:
            return stored
        weight, digest = self.weight, sha256()
        codes = ((start, self.rows(start, stop).codes) for start, stop in row_ranges(*weight.shape))
        for _ in encoded_rows(weight, codes, digest):
            pass
        if stored != digest.hexdigest():
            raise FormatError(
                f"{weight.stored}: encoding its {weight.layout} codes again gives other bytes, so no undo file "
                "restores it",
                fix="leave the undo file out with --undo none, or write the merged model in floats: --dtype bf16",
            )
        return stored


def check_movable(plan: TensorPlan, weight: CodedWeight) -> None:
    """Refuse a weight whose codes cannot be moved, or in which the adapter replaces numbers (see `GridCodec`)."""
    if weight.grid is None or weight.encode is None or len(weight.shape) != 2:
        raise FormatError(
            f"{plan.key}: {weight.layout} can be read, but its codes cannot be merged into yet",
            fix="write the merged model in floats: --dtype bf16",
        )
    if plan.replacement is not None or plan.tokens:
        raise MismatchError(
            f"{plan.key}: the adapter replaces numbers in it, which codes with the scales of the base cannot hold",
            fix=f"write the merged model in floats: --dtype bf16; or {LEAVE_EXTRA_OUT}",
        )


def codes_as_bytes(codes: Codes, lowest: int) -> Bytes:
    """Codes as uint8, counted from the lowest one; no grid has more than 256 codes."""
    return (codes - np.int16(lowest)).astype(np.uint8)


def encoded_rows(weight: CodedWeight, blocks: Iterable[tuple[int, Codes]], digest: Any | None) -> Iterator[Bytes]:
    """Yield the bytes of codes, from the first row and the codes of every block; for the rest see `file_rows`."""
    encode = weight.encode
    assert encode is not None
    if weight.by_rows:
        return file_rows(((start, encode(start, codes)) for start, codes in blocks), weight.row_order, digest)
    return file_rows([(0, encode(0, np.concatenate([codes for _, codes in blocks])))], None, digest)


def file_rows(
    blocks: Iterable[tuple[int, Bytes]], order: NDArray[np.intp] | None, digest: Any | None
) -> Iterator[Bytes]:
    """Yield the bytes of rows in their own order, and feed them to a hash in the order of the file.

    ``order`` is the position of every row in the file; None: rows lie in order. Otherwise the stored tensor is held in
    memory for the hash. The writer brings rows into the order of the file.
    """
    tensor: Bytes | None = None
    for start, rows in blocks:
        if order is None:
            feed_hash(digest, rows)
        elif digest is not None:
            if tensor is None:
                tensor = np.empty((len(order), rows.shape[1]), np.uint8)
            # An expert is a part of a stored tensor and begins within it.
            tensor[order[start : start + len(rows)] - order.min()] = rows
        yield rows
    if tensor is not None:
        feed_hash(digest, tensor)


def hash_rows(blocks: Iterable[Array]) -> str:
    """The SHA-256 of the bytes of a tensor, given in blocks of rows, in hexadecimal digits; ``nbytes`` is its size."""
    digest = sha256()
    for rows in blocks:
        feed_hash(digest, rows)
    return digest.hexdigest()


def feed_hash(digest: Any | None, rows: Array) -> None:
    """Add the bytes of some rows to a hash; ``digest`` is None if no hash was requested."""
    if digest is not None:
        digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


class DoraFactors(NamedTuple):
    """A float32 vector g along rows or columns of a segment as stored; it scales W + D to the trained lengths."""

    values: Singles
    axis: Axis

    def of(self, start: int, stop: int) -> Singles:
        """The factors of rows ``start`` to ``stop`` of the segment, in a shape that broadcasts with the rows."""
        return self.values[start:stop, None] if self.axis == "rows" else self.values


def compute_dora_factors(
    magnitude: Magnitude, D: UpdateMatrix, source: MatrixRows, scale: MatrixRows | None, start: int
) -> DoraFactors:
    """The factors g = m / ‖W + D‖, with norms in float64 over the other axis; 0 where the vector is 0.

    If m has one number for several adjacent columns (the kernel of an input channel of a convolution), the norm is
    taken over all of these columns, and all of them get the same factor. If m is the length of the base, it is rounded
    to the dtype of 16-bit weights, as PEFT rounds it. ``start`` is the first row of the segment in ``source``.
    """
    by_row = magnitude.axis == "rows"
    squares: Floats = np.zeros(D.shape[0 if by_row else 1])
    before, dtype = np.zeros_like(squares), np.dtype(np.float32)
    for first, last in row_ranges(*D.shape):
        stored = source.rows(start + first, start + last)
        # float64, since these squares are summed over a whole side of the weight.
        W, dtype = stored.astype(np.float64), stored.dtype
        if scale:
            W *= scale.rows(start + first, start + last)
        # The norms of the base are computed in the same pass, if they are needed.
        own = [(W, before)] if magnitude.lengths is None else []
        for X, sums in [(W + D.rows(first, last), squares), *own]:
            add_squares(sums, X, slice(first, last) if by_row else None)
    lengths = round_lengths(before, dtype) if magnitude.lengths is None else magnitude.lengths.read().astype(np.float64)
    # 1, except for the magnitude of a convolution's input channels, each of which has several columns.
    width = len(squares) // len(lengths)
    norms = np.sqrt(squares.reshape(-1, width).sum(axis=1))
    # A vector of length 0 has no direction in which it could get another length.
    factors = np.divide(lengths, norms, out=np.zeros_like(norms), where=norms > 0)
    return DoraFactors(np.repeat(factors, width).astype(np.float32), magnitude.axis)


@final
@dataclass(slots=True)
class TensorMerge:
    """The merge of one tensor: its codec, the products of its updates and DoRA's factors. `prepare` makes it.

    ``within`` is the range of rows that are merged; None for all.
    """

    codec: Codec
    products: dict[int, UpdateMatrix]
    segment_factors: dict[int, DoraFactors]
    within: tuple[int, int] | None = None

    @property
    def plan(self) -> TensorPlan:
        """The plan of the weight in floats."""
        return self.codec.plan

    def blocks(self) -> Iterator[Any]:
        """Yield the rows in order as blocks of the codec, which do not cross the limits of segments."""
        # D and the sum of a block are alive at the same time, so each has its own buffer.
        buffers = Buffer(), Buffer()
        for start, stop, segment in cuts(self.plan, within=self.within):
            if segment is None:
                yield self.codec.keep(start, stop)
            else:
                D, factors = self.update(segment, start, stop, buffers[0])
                yield self.codec.merge(start, segment, D, factors, buffers[1])

    def update(
        self, segment: Segment, start: int, stop: int, out: Buffer | None = None
    ) -> tuple[Singles, Singles | None]:
        """D of some rows, in ``out`` if it is given, and DoRA's factors."""
        # Products and factors are indexed by the rows of their segment, not by those of the tensor.
        first, last = start - segment.start, stop - segment.start
        shape, of_segment = (stop - start, self.plan.matrix[1]), self.segment_factors.get(segment.start)
        D = self.products[segment.start].rows(first, last, out=out and out.of(shape))
        return D, of_segment and of_segment.of(first, last)


def prepare(codec: Codec, *, device: Device | None = None, within: tuple[int, int] | None = None) -> TensorMerge:
    """Prepare the merge of a planned tensor. For DoRA the whole weight is read once here, to compute the norms.

    ``device`` multiplies the factors of the update; NumPy computes everything else. ``within`` is the range of rows
    that are merged, with the bits that they have in the whole weight.
    """
    plan = codec.plan
    products = {segment.start: segment.update(codec.slices, device) for segment in plan.segments}
    rows = MatrixRows(codec.floats, plan.matrix)
    scales = MatrixRows(plan.scale, plan.matrix) if plan.scale else None
    segment_factors = {
        segment.start: compute_dora_factors(segment.magnitude, products[segment.start], rows, scales, segment.start)
        for segment in plan.segments
        if segment.magnitude
    }
    return TensorMerge(codec, products, segment_factors, within)


def prepare_merge(
    plan: TensorPlan,
    *,
    dtype: DTypeLike | None = None,
    rounding: MergeRounding | None = None,
    device: Device | None = None,
    within: tuple[int, int] | None = None,
) -> TensorMerge:
    """Prepare the merge of a planned tensor of floats (`FloatCodec`, `prepare`)."""
    return prepare(FloatCodec(plan, dtype, rounding), device=device, within=within)


VALUES = 16  # the number of codes of 4 bits
BLOCKS = (64, 32)  # numbers that share a scale: bitsandbytes; GGUF or MLX. The longer is the stronger evidence
ROWS = 16  # rows that are looked at, spread over the weight
# A block of a pruned or constant row has few values too, so a few rows must not decide.
LEAST = 0.95  # share of the blocks with few values


def decoded_block(tensor: LazyArray) -> int | None:
    """The number of adjacent numbers that share a scale, if a matrix of floats is a decoded 4-bit weight.

    Numbers of 4 bits that share a scale have at most 16 values, also after they were rounded to 16 bits. Blocks of a
    weight that was trained in floats have nearly as many values as numbers.
    """
    matrix = as_matrix(tensor.shape)
    if tensor.ndim != 2 or min(matrix) < ROWS:
        return None
    rows = MatrixRows(tensor, matrix)
    picked = np.unique(np.linspace(0, matrix[0] - 1, ROWS).astype(int)).tolist()
    sample = np.vstack([rows.rows(row, row + 1).astype(np.float32) for row in picked])
    # A weight of zeros has few values whatever stored it.
    for block in BLOCKS if sample.any() else ():
        if matrix[1] % block == 0:
            distinct = (np.diff(np.sort(sample.reshape(-1, block), axis=1), axis=1) != 0).sum(axis=1) + 1
            if (distinct <= VALUES).mean() >= LEAST:
                return block
    return None
