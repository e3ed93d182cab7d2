"""Weight: the base weight that a module adapts, in the orientation (out, in) of its update."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout
from loralens.core.matching import Match, Shape, match
from loralens.core.names import expert
from loralens.core.structured import Update, Updates
from loralens.errors import FormatError, MismatchError

BLOCK = 1 << 20  # numbers of a weight that are read at a time: 4 MiB in float32


@final
@dataclass(frozen=True, slots=True)
class Weight:
    """The weight W (out, in) of the base that one module adapts; its numbers stay in the file until they are read.

    Attributes
    ----------
    key : str
        Of the stored tensor in the base checkpoint.
    stored : LazyArray, 2-D
        As the base holds it: a convolution flattened to (out, in·k…), one expert of a stack alone.
    transposed : bool
        Whether ``stored`` is (in, out): GPT-2's Conv1D, embeddings, some expert stacks.
    """

    key: str
    stored: LazyArray
    transposed: bool

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
        whole = None if self.stored.streams else self.stored.read()
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield part, self.stored.rows(part.start, part.stop).read() if whole is None else whole[part]

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
    kind of the base, or the other linear weights of the adapter.
    """
    check_rows(modules)
    shapes = {key: tensor.shape for key, tensor in base.items()}
    found = match({name: m.shape for name, m in modules.items()}, shapes, allow_missing=allow_missing)
    stored = {name: _flat(name, modules[name], base[key]) for name, key in found.keys.items()}
    lying = {name: _lies(modules[name], tensor.shape) for name, tensor in stored.items()}
    habit = conv1d or any(lies for name, lies in lying.items() if modules[name].layout.kind == "linear")

    def transposed(name: str) -> bool:
        lies, layout = lying[name], modules[name].layout
        return layout.transposed or (habit and layout.kind == "linear") if lies is None else lies

    weights = {name: Weight(found.keys[name], tensor, transposed(name)) for name, tensor in stored.items()}
    return Weights(weights, found)


def merged_dtype(stored: np.dtype[Any], wanted: DTypeLike | None, *, scaled: bool) -> np.dtype[Any]:
    """The dtype of a tensor in a merged model: ``wanted``, of floats of 16 bits and more, and of float8 under scales.

    All others, and all where None is wanted, keep their own.
    """
    if wanted is None or stored.kind not in "fV" or (stored.itemsize < 2 and not scaled):
        return stored
    return np.dtype(wanted)


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

    found = {name: layout(name, module) for name, module in adapter.items()}
    modules = {name: module.with_layout(new) for name, module in adapter.items() if (new := found[name])}
    return replace(adapter, modules={**adapter.modules, **modules}) if modules else adapter


def _flat(name: str, module: Update, tensor: LazyArray) -> LazyArray:
    """The 2-D array of one module: its expert of a stack, a kernel flattened."""
    one, shape = expert(name), tensor.shape
    if one and len(shape) == 3:
        if one.number >= shape[0]:
            raise MismatchError(f"{name}: the base has {shape[0]} experts", fix="give the base it was trained on")
        return tensor.rows(one.number, one.number + 1).reshape(*shape[1:])
    if len(shape) == 2:
        return tensor
    if shape[0] == 1 and module.layout.kind != "conv" and module.shape in (shape[1:], shape[:0:-1]):
        return tensor.reshape(*shape[1:])  # a stack of one expert, whose name says no number
    return tensor.reshape(shape[0], prod(shape[1:]))


def _lies(module: Update, stored: Shape) -> bool | None:
    """Whether a stored weight is (in, out); None where its shape does not tell."""
    if module.layout.kind == "embedding":
        return stored != module.shape or stored[0] == stored[1]
    if module.shape[0] == module.shape[1]:
        return None
    return stored != module.shape
