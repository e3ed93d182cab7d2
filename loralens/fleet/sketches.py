"""`Sketches`: the sketches of the adapters of a fleet as matrices, and the `Sketch` of one adapter."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.names import normal_form

WIDTH = 4096  # numbers in the sketch of an update
START_WIDTH = 256  # numbers in the start sketch
BLOCK = 4096  # sketches that are shortened at a time: 16 MiB
LARGEST_CODE = 127  # −128 is not used, so that −ΔW has the codes of ΔW with the opposite sign


@final
@dataclass(frozen=True, slots=True)
class Sketch:
    """The sketch of one update and of its start.

    Attributes
    ----------
    codes : int8 array, shape (4096,)
        The sketch of ΔW is step · codes.
    step : float
        0 if ΔW = 0.
    start : int8 array, shape (256,)
        The direction of the start sketch of A; its length means nothing.
    """

    codes: NDArray[np.int8]
    step: float
    start: NDArray[np.int8]


@final
@dataclass(frozen=True, slots=True)
class Sketches:
    """The sketches of all members; row i belongs to ``members()[i]``.

    Attributes
    ----------
    codes : int8 array, shape (n, 4096)
        The sketch of the ΔW of a member is step · codes.
    steps : float64 array, shape (n,)
        0 where ΔW = 0.
    starts : int8 array, shape (n, 256)
        Directions of the start sketches of A.
    """

    codes: NDArray[np.int8]
    steps: NDArray[np.float64]
    starts: NDArray[np.int8]
    _shorter: dict[int, NDArray[np.float32]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"Sketches({len(self)})"

    def at(self, row: int) -> Sketch:
        """The sketch of one member."""
        return Sketch(self.codes[row], float(self.steps[row]), self.starts[row])

    def take(self, rows: NDArray[np.intp]) -> "Sketches":
        """The sketches of some members, in this order."""
        return Sketches(self.codes[rows], self.steps[rows], self.starts[rows])

    def directions(self, width: int = WIDTH, rows: Any = slice(None)) -> NDArray[np.float32]:
        """The sketches folded to ``width`` numbers and divided by their own lengths; rows of zeros stay zeros.

        Inner products of rows estimate cosines of whole updates.
        """
        return unit_rows(fold(self.codes[rows], width))

    def shorter(self, width: int) -> NDArray[np.float32]:
        """`directions` of all rows in this width, computed at the first call and kept: 20 MB for 10,000 rows of 512."""
        if width not in self._shorter:
            shorter = np.empty((len(self), width), np.float32)
            for start in range(0, len(self), BLOCK):
                shorter[start : start + BLOCK] = self.directions(width, slice(start, start + BLOCK))
            self._shorter[width] = shorter
        return self._shorter[width]

    def start_directions(self, rows: Any = slice(None)) -> NDArray[np.float32]:
        """The start sketches, divided by their own lengths."""
        return unit_rows(self.starts[rows].astype(np.float32))


def to_codes(vector: NDArray[np.float64]) -> tuple[NDArray[np.int8], float]:
    """A vector as whole numbers from −127 to 127 and the step between them; the step of a vector of zeros is 0."""
    largest = float(np.abs(vector).max(initial=0))
    if not largest:
        return np.zeros(len(vector), np.int8), 0.0
    # Divided by the largest number first, because 127 / largest may overflow.
    return np.rint(vector / largest * LARGEST_CODE).astype(np.int8), largest / LARGEST_CODE


def fold(codes: NDArray[np.int8], width: int) -> NDArray[np.float32]:
    """Sketches of ``width`` numbers, a divisor of 4096: the parts of a sketch add up to a shorter one."""
    *rows, length = codes.shape
    assert length % width == 0, (length, width)
    shorter: NDArray[np.float32] = codes.reshape(*rows, length // width, width).sum(axis=-2, dtype=np.float32)
    return shorter


def unit_rows(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows divided by their lengths; rows of zeros stay zeros."""
    lengths = np.sqrt(np.einsum("...j,...j->...", matrix, matrix, dtype=np.float64)).astype(np.float32)
    lengths[lengths == 0] = 1
    matrix /= lengths[..., None]
    return matrix


# The name of a model around its blocks, which depends on the class that loaded it: ``distilbert.transformer.layer.0``
# and ``transformer.layer.0`` are one module. ``encoder``, ``decoder``, ``down_blocks`` and ``up_blocks`` say which
# block is meant, and stay. The name of a class is part of ``transformer_blocks``, which says which block is meant too.
_MODEL = re.compile(
    r"^(?:(?:base_model|model|module|roberta|xlm_roberta|camembert|bert|distilbert|deberta|electra|albert|mpnet"
    r"|transformer(?!_blocks)|gpt_neox|vit|language_model|text_model)_)+"
)


def module_keys(names: Iterable[str]) -> dict[str, str]:
    """Name of a module → its key: the normal form without the name of the model.

    If two modules of an adapter would have the same key, both keep the name of the model.
    """
    forms = {name: normal_form(name) for name in names}
    keys = {name: _MODEL.sub("", form) or form for name, form in forms.items()}
    for longer in (forms, {name: name for name in forms}):
        uses = Counter(keys.values())
        keys = {name: key if uses[key] == 1 else longer[name] for name, key in keys.items()}
    return keys
