"""Weight: the base weight that a module adapts, in the orientation (out, in) of its update."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray, below
from loralens.core.lowrank import Layout, LowRank
from loralens.core.names import expert
from loralens.core.naming.matching import Match, Shape, match, part_axes
from loralens.core.naming.storage import Place, interleaved
from loralens.core.structured import Update, Updates
from loralens.errors import FormatError, MismatchError

# Large enough that the overhead of a read does not matter.
BLOCK = 1 << 20  # numbers of a weight that are read at a time: 4 MiB in float32


class Piece(NamedTuple):
    """Rows of a stored tensor that are rows of the weight of one module.

    Attributes
    ----------
    key : str
        Of the stored tensor, which is looked at as a matrix: of a stack of ``experts`` as all of them below each other.
    start : int
        The first of its rows.
    at, rows : int
        The first of as many rows of `Weight.stored`.
    experts : bool
    columns : slice or None
        Which columns of the tensor they have; None: all.
    width : int
        How many columns the tensor has.
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
    """The weight W (out, in) of the base that one module adapts; its numbers stay in the file until they are read.

    Attributes
    ----------
    key : str
        Of the stored tensor in the base checkpoint; of the first, where W lies in several.
    stored : LazyArray, 2-D
        As the base holds it: a convolution flattened to (out, in·k…), one expert of a stack alone, what lies in several
        tensors put together.
    transposed : bool
        Whether ``stored`` is (in, out): GPT-2's Conv1D, embeddings, some expert stacks.
    pieces : tuple of Piece
        Where the rows of ``stored`` lie in the base.
    scattered : bool
        Whether W is no whole matrix of the base, but lies in several, or is part of one.
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
        """W, shape (out, in), in the dtype of the base; read now and not kept."""
        array = self.stored.read()
        return array.T if self.transposed else array

    def blocks(self, numbers: int = BLOCK) -> Iterator[tuple[slice, Array]]:
        """``stored``, some rows at a time, with their slice: rows are of the out side, of the in side if transposed.

        Where single rows cannot be read the tensor is read once and held.
        """
        count, width = self.stored.shape
        step = max(1, numbers // max(1, width))
        tensor = None if self.stored.streams else self.stored.read()
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield part, self.stored.rows(part.start, part.stop).read() if tensor is None else tensor[part]

    def lengths(self, *, by_input: bool = False) -> NDArray[np.float64]:
        """‖W‖ for every output, or input: the magnitude of a DoRA module before it is trained.

        Float64, shape (out,) or (in,); rounded to the dtype of 16-bit weights, else to float32, as PEFT makes it.
        """
        squares = np.zeros(self.shape[1 if by_input else 0])
        for part, block in self.blocks():
            W = block.astype(np.float64)
            if by_input == self.transposed:  # one number a row of the block
                squares[part] = np.einsum("ij,ij->i", W, W)
            else:
                squares += np.einsum("ij,ij->j", W, W)
        return as_made(squares, self.stored.dtype)


def as_made(squares: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.float64]:
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
        How the names were matched, to be said.
    """

    modules: Mapping[str, Weight]
    match: Match


def weights_of(
    modules: Updates, base: Mapping[str, LazyArray], *, conv1d: bool = False, allow_missing: bool = False
) -> Weights:
    """The weight of the base for every module.

    Parameters
    ----------
    modules : mapping of str to LowRank or Structured
        Of an adapter: all, or those of interest.
    base : mapping of str to LazyArray
        Key → tensor of the base checkpoint.
    conv1d : bool
        The base is of a kind (GPT-2) whose linear weights are stored (in, out).
    allow_missing : bool
        Leave out modules that have no weight in the base.

    Raises
    ------
    MismatchError
        A module has no weight in the base, or one of another shape.
    FormatError
        The rows of a module are in an order that is not the base's.

    Notes
    -----
    The orientation is decided by the shapes. A square weight tells nothing: it follows what the file says of it, the
    kind of the base, or the other linear weights of the adapter. A square expert follows the other stacks of the
    adapter first, as PEFT has one rule for all of them that depends on the model and on PEFT's version.
    """
    check_rows(modules)
    shapes = {key: tensor.shape for key, tensor in base.items()}
    name_match = match({name: m.shape for name, m in modules.items()}, shapes, allow_missing=allow_missing)
    weights = {
        name: _locate_weight(name, modules[name], key, name_match, base) for name, key in name_match.keys.items()
    }
    lying = {name: _is_transposed(modules[name], weight) for name, weight in weights.items()}
    # One linear weight that only fits transposed shows how the whole base stores them.
    habit = conv1d or any(lies for name, lies in lying.items() if modules[name].layout.kind == "linear")
    stacks = {lies for name, lies in lying.items() if modules[name].layout.kind == "experts"} - {None}

    def transposed(name: str, weight: Weight) -> bool:
        lies, layout = lying[name], modules[name].layout
        if lies is None and layout.kind == "experts":
            # A bias of the experts is a sign of gpt-oss, whose stacks are (in, out).
            own = layout.transposed or f"{weight.key}_bias" in base  # gpt-oss
            return stacks == {True} if len(stacks) == 1 else own
        return layout.transposed or (habit and layout.kind == "linear") if lies is None else lies

    return Weights(
        {name: replace(weight, transposed=transposed(name, weight)) for name, weight in weights.items()}, name_match
    )


def share_of(module: Update, weight: Weight, piece: Piece) -> Update:
    """The update of the stored rows that are one piece of a weight, as an update of rows of that tensor.

    Raises
    ------
    MismatchError
        An update that is no pair cannot be cut.
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
    if not weight.transposed:
        assert piece.columns is None
        B = B.rows(rows.start, rows.stop)
    else:
        A = A.map(lambda array: array[:, rows], shape=(A.shape[0], piece.rows))
        B = B if piece.columns is None else _pad_outputs(B, piece.columns, piece.width)
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout)


def _pad_outputs(B: LazyArray, columns: slice, width: int) -> LazyArray:
    """B with rows of zeros for the outputs of the stored tensor that are not the module's."""

    def put(array: Array) -> Array:
        padded = np.zeros((width, array.shape[1]), array.dtype)
        padded[columns] = array
        return padded

    return B.map(put, shape=(width, B.shape[1]))


def _locate_weight(name: str, module: Update, key: str, name_match: Match, base: Mapping[str, LazyArray]) -> Weight:
    """The weight of one module, its orientation not yet known."""
    places = name_match.places.get(name)
    if places is None:
        shape, stored = base[key].shape, _as_matrix(name, module, base[key])
        number, (rows, width) = expert(name), stored.shape
        # A 3-D tensor of a convolution is flattened instead.
        stack = len(shape) == 3 and stored.shape != (shape[0], prod(shape[1:]))
        start = number.number * rows if number and stack else 0
        return Weight(key, stored, False, (Piece(key, start, 0, rows, width, stack),))
    matrices = [_stored_matrix(name, place, base[place.key]) for place in places]
    at = 0
    pieces = []
    for place, matrix in zip(places, matrices, strict=True):
        rows, width = matrix.shape
        pieces.append(Piece(place.key, (place.number or 0) * rows, at, rows, width, place.number is not None))
        at += rows
    first = pieces[0]
    if places[0].parts == 1:
        return Weight(key, below(matrices), False, tuple(pieces), scattered=len(pieces) > 1)
    return _partial_weight(places[0], matrices[0], first, module, base)


def _partial_weight(
    place: Place, matrix: LazyArray, piece: Piece, module: Update, base: Mapping[str, LazyArray]
) -> Weight:
    """The weight that is some of the outputs of one stored matrix."""
    alternate = interleaved(place.key, base)
    axis = part_axes(module.shape, matrix.shape, place.parts, alternate=alternate)[0]
    size = matrix.shape[axis] // place.parts
    start = place.part * size
    if axis == 0:
        piece = piece._replace(start=piece.start + start, rows=size)
        return Weight(place.key, matrix.rows(start, start + size), False, (piece,), scattered=True)
    columns = slice(place.part, None, place.parts) if alternate else slice(start, start + size)
    some = matrix.map(lambda array: array[:, columns], shape=(matrix.shape[0], size))
    return Weight(place.key, some, True, (piece._replace(columns=columns),), scattered=True)


def _stored_matrix(name: str, place: Place, tensor: LazyArray) -> LazyArray:
    """A stored matrix, of a stack the one with that number."""
    if place.number is None:
        return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))
    if place.number >= tensor.shape[0]:
        raise MismatchError(f"{name}: the base has {tensor.shape[0]} experts", fix="give the base it was trained on")
    return tensor.rows(place.number, place.number + 1).reshape(*tensor.shape[1:])


def merged_dtype(stored: np.dtype[Any], requested: DTypeLike | None, *, scaled: bool) -> np.dtype[Any]:
    """The dtype of a tensor in a merged model: ``wanted``, of floats of 16 bits and more, and of float8 under scales.

    All others, and all where None is wanted, keep their own.
    """
    # Integers and packed bits are no weights that can be rounded; float8 without scales has no other form.
    if requested is None or stored.kind not in "fV" or (stored.itemsize < 2 and not scaled):
        return stored
    return np.dtype(requested)


def check_rows(modules: Updates) -> None:
    """Refuse modules whose rows are not in the order of the base's: their updates would go to other rows of W.

    Raises
    ------
    FormatError
        The head counts that the order follows from were not known when the file was read.
    """
    turned = [name for name, module in modules.items() if module.layout.rows]
    if turned:
        raise FormatError(
            f"the rows of {len(turned)} modules, {turned[0]} the first, are in the order of "
            f"{modules[turned[0]].layout.rows}, and nothing says how many heads they belong to",
            fix="give a base whose folder has a config.json that says its heads (in Python: load(…, base=…))",
        )


def with_kernels(adapter: Adapter, shapes: Mapping[str, Shape]) -> Adapter:
    """``adapter`` with the kernels of the convolutions that it adapts, as the base stores them.

    Some files hold the factors of a convolution flat, or with another kernel of the same size.

    Parameters
    ----------
    adapter : Adapter
    shapes : mapping of str to tuple
        Module → shape of its weight in the base.
    """

    def layout(name: str, module: Update) -> Layout | None:
        shape, own = shapes.get(name, ()), module.layout
        flat = len(shape) > 2 and own.kind in ("linear", "conv") and own.groups == 1
        if not flat or own.kernel == shape[2:] or module.shape != (shape[0], prod(shape[1:])):
            return None
        return Layout("conv", kernel=shape[2:])

    layouts = {name: layout(name, module) for name, module in adapter.items()}
    modules = {name: module.with_layout(new) for name, module in adapter.items() if (new := layouts[name])}
    return replace(adapter, modules={**adapter.modules, **modules}) if modules else adapter


def _as_matrix(name: str, module: Update, tensor: LazyArray) -> LazyArray:
    """The 2-D array of one module: its expert of a stack, a kernel flattened."""
    number, shape = expert(name), tensor.shape
    if number and len(shape) == 3:
        if number.number >= shape[0]:
            raise MismatchError(f"{name}: the base has {shape[0]} experts", fix="give the base it was trained on")
        return tensor.rows(number.number, number.number + 1).reshape(*shape[1:])
    if len(shape) == 2:
        return tensor
    if shape[0] == 1 and module.layout.kind != "conv" and module.shape in (shape[1:], shape[:0:-1]):
        return tensor.reshape(*shape[1:])  # a stack of one expert, whose name says no number
    return tensor.reshape(shape[0], prod(shape[1:]))


def _is_transposed(module: Update, weight: Weight) -> bool | None:
    """Whether a stored weight is (in, out); None where its shape does not tell."""
    stored = weight.stored.shape
    if weight.transposed:
        return True  # some of its columns are the outputs
    if module.layout.kind == "embedding":
        return stored != module.shape or stored[0] == stored[1]
    # A square weight fits both ways.
    if module.shape[0] == module.shape[1]:
        return None
    return stored != module.shape
