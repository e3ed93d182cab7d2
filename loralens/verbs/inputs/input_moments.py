"""Second moments of inputs for a sweep: found by the weights that read the inputs, and prepared one at a time."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import final

from loralens.core.few_bits.coded_weight import CodedWeight
from loralens.core.messages import note, warn
from loralens.core.names import some
from loralens.errors import FormatError, MismatchError, place
from loralens.formats.records.input_moments import InputMoments, load_input_moments
from loralens.merging.low_bit.sweep import SweepMoments, sweep_moments
from loralens.tables.numbers import size as size_text

# q, k and v read one input and are merged one after the other; two threads work on two inputs.
KEPT = 2  # prepared matrices in memory


@final
class SweepInputs:
    """The second moments of a model's inputs, for merges of its weights in several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._moments = path, load_input_moments(path)
        self._prepared: dict[str, SweepMoments] = {}
        self._lock = Lock()

    @property
    def digest(self) -> str:
        """The SHA-256 of the record of the file."""
        return self._moments.digest

    def of(self, key: str, width: int) -> SweepMoments | None:
        """The moments of the input of a weight with this key and number of columns; None if they were not measured.

        Raises
        ------
        MismatchError
            They have another width.
        FormatError
            They are damaged.
        """
        name = _find(self._moments, key)
        if name is None:
            return None
        # One thread prepares them, and the others wait: two matrices at a time would need twice the memory.
        with self._lock:
            if name not in self._prepared:
                with place(f"{self._path}: {name}"):
                    if self._moments.tensors[name].shape[0] != width:
                        raise MismatchError(
                            f"moments of {self._moments.tensors[name].shape[0]} inputs, and {key} has {width}",
                            fix="give the moments that were measured on this base",
                        )
                    while len(self._prepared) >= KEPT:
                        self._prepared.pop(next(iter(self._prepared)))
                    self._prepared[name] = sweep_moments(self._moments.read(name))
            return self._prepared[name]

    def tell(self, weights: Sequence[tuple[str, CodedWeight]]) -> None:
        """Say how much memory a sweep of these weights needs, and which of them have no moments.

        Raises
        ------
        FormatError
            None of them has moments.
        """
        missing = [key for key, _ in weights if _find(self._moments, key) is None]
        if len(missing) == len(weights):
            raise FormatError(
                f"{self._path}: has no moments for any weight that changes ({some(missing, 3)})",
                fix="give the moments that were measured on this base",
            )
        if missing:
            warn(
                f"{self._path}: has no moments for {some(missing, 3)}", "these are merged by stochastic rounding alone"
            )
        widest = max(weight.shape[1] for _, weight in weights)
        # The matrix, its integers, and what is alive while it is prepared.
        note(f"the sweep takes up to {size_text(3 * widest**2 * 4)} of memory for the moments of {widest:,} inputs")


def _find(moments: InputMoments, key: str) -> str | None:
    return moments.inputs.get(key.removesuffix(".weight"))
