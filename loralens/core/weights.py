"""`Weight`: the weight of the base that a module adapts, in the orientation (out, in) of its update."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray, row_blocks, stack_rows
from loralens.core.lowrank import Layout, LowRank
from loralens.core.matching import Match, Place, Shape, is_interleaved, match, part_axes
from loralens.core.names import expert
from loralens.core.structured import Update, Updates, check_rows
from loralens.errors import MismatchError
from loralens.linalg.exact import Singles

Codes = NDArray[np.int16]


@final
@dataclass(frozen=True, slots=True)
class GridRows:
    """The codes, steps and offsets of some rows of a coded weight.

    Attributes
    ----------
    codes : int16 array, shape (rows, columns)
    step : float32 array, shape (rows, groups)
        The distance of neighbouring codes, or what a table of levels is multiplied by. It may be negative or 0.
    offset : float32 array, shape (rows, groups), or None
        None stands for 0.
    group_of_column : intp array, shape (columns,)
        The group of every column.
    lowest, highest : int
        The range of the codes; both can be stored.
    levels : float32 array or None
        The level of every code from ``lowest`` on, not decreasing. None: the level is the code.
    """

    codes: Codes
    step: Singles
    offset: Singles | None
    group_of_column: NDArray[np.intp]
    lowest: int
    highest: int
    levels: Singles | None = None

    def values(self, codes: Codes) -> Singles:
        """The numbers that other codes of the same rows stand for, float32, up to the rounding of the last place."""
        levels = codes.astype(np.float32) if self.levels is None else self.levels[codes - self.lowest]
        numbers = levels * self.step[:, self.group_of_column]
        return numbers if self.offset is None else numbers + self.offset[:, self.group_of_column]


@final
@dataclass(frozen=True, slots=True)
class CodedWeight:
    """One weight of a low-bit base.

    Attributes
    ----------
    layout : str
        The name of the layout in messages: ``Q4_1``, ``bitsandbytes NF4``, ``MLX 4-bit``.
    shape : tuple of int
        The shape of the decoded weight, as a checkpoint of floats stores it.
    bits : float
        Bits per weight in the file, with scales.
    decode : callable
        Takes start and stop, and returns these rows in float32, bit for bit as the layout's own software does.
    stored : str
        The key of the stored tensor that holds the codes.
    grid : callable or None
        Takes start and stop, and returns the `GridRows` of these rows. None: a merge cannot move its codes yet.
    encode : callable or None
        Takes the first row and the codes of some rows (all rows, if ``by_rows`` is false). Returns the bytes of these
        rows as a uint8 array, shape (rows, bytes per row), with the stored scales; or, if ``by_rows`` is false, the
        bytes of the whole stored tensor, shape (bytes,).
    row_order : intp array or None
        The position in the file of every row. None: rows are stored in order.
    by_rows : bool
        Whether the bytes of a row lie together in the file.
    """

    layout: str
    shape: tuple[int, ...]
    bits: float
    decode: Callable[[int, int], Singles]
    stored: str
    grid: Callable[[int, int], GridRows] | None = None
    encode: Callable[[int, Codes], NDArray[np.uint8]] | None = None
    row_order: NDArray[np.intp] | None = None
    by_rows: bool = True

    def floats(self) -> LazyArray:
        """The weight as an array of float32 that is decoded when it is read, by rows."""
        return LazyArray(lambda: self.decode(0, self.shape[0]), shape=self.shape, dtype=np.float32, rows=self.decode)


# Large enough that the overhead of a read does not matter.
BLOCK = 1 << 20  # numbers of a weight in one read, 4 MiB in float32


class Piece(NamedTuple):
    """Rows of a stored tensor that are rows of the weight of one module.

    Attributes
    ----------
    key : str
        The key of the stored tensor, which is treated as a matrix. The matrices of a stack of ``experts`` lie below
        each other.
    start : int
        The first row in the tensor.
    at, rows : int
        The first row in `Weight.stored`, and the number of rows.
    columns : slice or None
        The columns of the tensor that belong to the weight; None for all.
    width : int
        Number of columns of the tensor.
    """

    key: str
    start: int
    at: int
    rows: int
    width: int
    experts: bool = False
    columns: slice | None = None


@final
@dataclass(frozen=True, slots=True)
class Weight:
    """The weight W (out, in) of the base that one module adapts. Its numbers are read on demand.

    Attributes
    ----------
    key : str
        The key of the stored tensor in the base checkpoint, or of the first tensor if W is in several.
    stored : LazyArray, 2-D
        W in the stored orientation. A convolution is flattened to (out, in·k…), an expert of a stack is separate, and
        the parts of a weight in several tensors are joined.
    transposed : bool
        Whether ``stored`` is (in, out), as for GPT-2's Conv1D, embeddings and some stacks of experts.
    pieces : tuple of Piece
        The location of the rows of ``stored`` in the base.
    scattered : bool
        Whether W is not a whole matrix of the base, but is in several tensors or part of one.
    """

    key: str
    stored: LazyArray
    transposed: bool
    pieces: tuple[Piece, ...] = ()
    scattered: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Array:
        """Read W, shape (out, in), in the dtype of the base; it is not kept."""
        array = self.stored.read()
        return array.T if self.transposed else array

    def blocks(self, numbers: int = BLOCK) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of rows of ``stored`` with their slice. Rows are outputs, or inputs if ``transposed``."""
        return row_blocks(self.stored, numbers)

    def lengths(self, *, by_input: bool = False) -> NDArray[np.float64]:
        """The norms of W for every output or input, which are the magnitude of a DoRA module before training.

        float64, shape (out,) or (in,). They are rounded to the dtype of 16-bit weights, else to float32, as in PEFT.
        """
        squares = np.zeros(self.shape[1 if by_input else 0])
        for part, block in self.blocks():
            W = block.astype(np.float64)
            add_squares(squares, W, part if by_input == self.transposed else None)
        return round_lengths(squares, self.stored.dtype)


def add_squares(sums: NDArray[np.float64], X: NDArray[np.float64], rows: slice | None) -> None:
    """Add the squared lengths of the columns of X to ``sums``, or with ``rows`` those of the rows to ``sums[rows]``."""
    # einsum, because X * X would be another array of the size of the block.
    if rows is None:
        sums += np.einsum("ij,ij->j", X, X)
    else:
        sums[rows] += np.einsum("ij,ij->i", X, X)


def round_lengths(squares: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """Lengths from their squares, rounded as PEFT rounds those of weights of this dtype."""
    lengths = np.sqrt(squares)
    return lengths.astype(dtype if dtype.itemsize == 2 else np.float32).astype(np.float64)


@final
@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a base that the modules of an adapter adapt: module name → `Weight`.

    Attributes
    ----------
    modules : mapping of str to Weight
    match : Match
        How the names were matched, for messages.
    """

    modules: Mapping[str, Weight]
    match: Match


def weights_of(
    modules: Updates, base: Mapping[str, LazyArray], *, conv1d: bool = False, allow_missing: bool = False
) -> Weights:
    """Find the weight of the base for every module.

    Parameters
    ----------
    modules : mapping of str to LowRank or Structured
        All modules of an adapter, or some of them.
    base : mapping of str to LazyArray
        Key → tensor of the base checkpoint.
    conv1d : bool
        Whether the base stores linear weights as (in, out), as GPT-2 does.
    allow_missing : bool
        Leave out modules that have no weight in the base.

    Raises
    ------
    MismatchError
        A module has no weight in the base, or one of another shape.
    FormatError
        The rows of a module are not in the order of the base.

    Notes
    -----
    The shapes decide the orientation. For a square weight it is that of the file, that of the type of the base
    (``conv1d``), or that of the other linear weights of the adapter. A square expert first follows the other stacks of
    the adapter, because PEFT has one rule for all stacks, which depends on the model and on the version of PEFT.
    """
    check_rows(modules)
    shapes = {key: tensor.shape for key, tensor in base.items()}
    name_match = match({name: m.shape for name, m in modules.items()}, shapes, allow_missing=allow_missing)
    weights = {
        name: _locate_weight(name, modules[name], key, name_match, base) for name, key in name_match.keys.items()
    }
    lying = {name: _is_transposed(modules[name], weight) for name, weight in weights.items()}
    # One linear weight that fits only when transposed shows how the base stores all of them.
    habit = conv1d or any(lies for name, lies in lying.items() if modules[name].layout.kind == "linear")
    stacks = {lies for name, lies in lying.items() if modules[name].layout.kind == "experts"} - {None}

    def transposed(name: str, weight: Weight) -> bool:
        lies, layout = lying[name], modules[name].layout
        if lies is None and layout.kind == "experts":
            # A bias of the experts is a sign of gpt-oss, whose stacks are (in, out).
            own = layout.transposed or f"{weight.key}_bias" in base
            # Stacks that disagree with each other decide nothing.
            return stacks == {True} if len(stacks) == 1 else own
        return layout.transposed or (habit and layout.kind == "linear") if lies is None else lies

    return Weights(
        {name: replace(weight, transposed=transposed(name, weight)) for name, weight in weights.items()}, name_match
    )


def share_of(module: Update, weight: Weight, piece: Piece) -> Update:
    """The part of an update that belongs to one piece of a weight, as an update of rows of the stored tensor.

    Raises
    ------
    MismatchError
        The weight is in parts, and the update is not a pair and cannot be divided.
    """
    # The piece is the whole weight.
    if not weight.scattered:
        return module
    if not isinstance(module, LowRank):
        raise MismatchError(
            f"the base holds this weight in parts, and a {module.form.name} cannot be cut into them",
            fix="make it a pair first: loralens convert --rank R",
        )
    B, A = module.factors
    rows = slice(piece.at, piece.at + piece.rows)
    # The rows of the stored tensor are outputs, which are rows of B, or inputs, which are columns of A.
    if not weight.transposed:
        assert piece.columns is None
        B = B.rows(rows.start, rows.stop)
    else:
        A = A.map(lambda array: array[:, rows], shape=(A.shape[0], piece.rows))
        B = B if piece.columns is None else _pad_outputs(B, piece.columns, piece.width)
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout)


def _pad_outputs(B: LazyArray, columns: slice, width: int) -> LazyArray:
    """B with rows of zeros added for the outputs of the stored tensor that do not belong to the module."""

    def put(array: Array) -> Array:
        padded = np.zeros((width, array.shape[1]), array.dtype)
        padded[columns] = array
        return padded

    return B.map(put, shape=(width, B.shape[1]))


def _locate_weight(name: str, module: Update, key: str, name_match: Match, base: Mapping[str, LazyArray]) -> Weight:
    """The weight of one module, with the orientation still to be decided."""
    places = name_match.places.get(name)
    if places is None:
        shape, stored = base[key].shape, _as_matrix(name, module, base[key])
        number, (rows, width) = expert(name), stored.shape
        # A 3-D tensor of a convolution is flattened instead.
        stack = len(shape) == 3 and stored.shape != (shape[0], prod(shape[1:]))
        start = number.number * rows if number and stack else 0
        return Weight(key, stored, False, (Piece(key, start, 0, rows, width, stack),))
    matrices = [_stored_matrix(name, place.number, base[place.key]) for place in places]
    # The parts lie below each other in `Weight.stored`, in the order of the outputs.
    at = 0
    pieces = []
    for place, matrix in zip(places, matrices, strict=True):
        rows, width = matrix.shape
        pieces.append(Piece(place.key, (place.number or 0) * rows, at, rows, width, place.number is not None))
        at += rows
    first = pieces[0]
    if places[0].parts == 1:
        return Weight(key, stack_rows(matrices), False, tuple(pieces), scattered=len(pieces) > 1)
    return _partial_weight(places[0], matrices[0], first, module, base)


def _partial_weight(
    place: Place, matrix: LazyArray, piece: Piece, module: Update, base: Mapping[str, LazyArray]
) -> Weight:
    """The weight of a module that is a part of the outputs of one stored matrix."""
    alternate = is_interleaved(place.key, base)
    axis = part_axes(module.shape, matrix.shape, place.parts, alternate=alternate)[0]
    size = matrix.shape[axis] // place.parts
    start = place.part * size
    if axis == 0:
        piece = piece._replace(start=piece.start + start, rows=size)
        return Weight(place.key, matrix.rows(start, start + size), False, (piece,), scattered=True)
    # gpt-oss alternates gate and up, so its parts are every second column.
    columns = slice(place.part, None, place.parts) if alternate else slice(start, start + size)
    some = matrix.map(lambda array: array[:, columns], shape=(matrix.shape[0], size))
    return Weight(place.key, some, True, (piece._replace(columns=columns),), scattered=True)


def _stored_matrix(name: str, number: int | None, tensor: LazyArray) -> LazyArray:
    """A stored tensor as a matrix. Of a stack, take the matrix of this number; flatten any other tensor to two axes."""
    if number is None:
        return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))
    # Numbers come from the names in an adapter, which may have been trained in a larger stack.
    if number >= tensor.shape[0]:
        raise MismatchError(
            f"{name}: the base has only {tensor.shape[0]} experts", fix="give the base that it was trained on"
        )
    return tensor.rows(number, number + 1).reshape(*tensor.shape[1:])


def merged_dtype(stored: np.dtype[Any], requested: DTypeLike | None, *, scaled: bool) -> np.dtype[Any]:
    """The dtype of a tensor in a merged model.

    It is ``requested`` for floats of 16 bits and more, and for float8 with scales. All other tensors keep their dtype,
    and so do all tensors if ``requested`` is None.
    """
    # Integers and packed bits are not weights that can be rounded; float8 without scales has no other form.
    if requested is None or stored.kind not in "fV" or (stored.itemsize < 2 and not scaled):
        return stored
    return np.dtype(requested)


def with_kernels(adapter: Adapter, shapes: Mapping[str, Shape]) -> Adapter:
    """``adapter`` with the layouts of convolutions corrected to the kernels that the base stores.

    Some files store the factors of a convolution flat, or with another kernel of the same size.

    Parameters
    ----------
    adapter : Adapter
    shapes : mapping of str to tuple
        Module → shape of its weight in the base.
    """

    def layout(name: str, module: Update) -> Layout | None:
        shape, own = shapes.get(name, ()), module.layout
        if own.kind == "conv" and not own.kernel and len(shape) == 2:  # only its name was that of a convolution
            return Layout()
        flat = len(shape) > 2 and own.kind in ("linear", "conv") and own.groups == 1
        if not flat or own.kernel == shape[2:] or module.shape != (shape[0], prod(shape[1:])):
            return None
        return Layout("conv", kernel=shape[2:])

    layouts = {name: layout(name, module) for name, module in adapter.items()}
    modules = {name: module.with_layout(new) for name, module in adapter.items() if (new := layouts[name])}
    return replace(adapter, modules={**adapter.modules, **modules}) if modules else adapter


def _as_matrix(name: str, module: Update, tensor: LazyArray) -> LazyArray:
    """The stored tensor as the matrix of one module: an expert of a stack, or a kernel that is flattened."""
    number, shape = expert(name), tensor.shape
    if number and len(shape) == 3:
        return _stored_matrix(name, number.number, tensor)
    if len(shape) == 2:
        return tensor
    # A stack of one expert, whose name has no number.
    if shape[0] == 1 and module.layout.kind != "conv" and module.shape in (shape[1:], shape[:0:-1]):
        return tensor.reshape(*shape[1:])
    return _stored_matrix(name, None, tensor)


def _is_transposed(module: Update, weight: Weight) -> bool | None:
    """Whether a stored weight is (in, out); None if its shape does not decide."""
    stored = weight.stored.shape
    # Decided by `_partial_weight` already: some of the columns are the outputs.
    if weight.transposed:
        return True
    # An embedding is stored (tokens, dim), and its update is (dim, tokens). A square embedding is read in the same way.
    if module.layout.kind == "embedding":
        return stored != module.shape or stored[0] == stored[1]
    # A square weight fits both ways.
    if module.shape[0] == module.shape[1]:
        return None
    return stored != module.shape
