"""The directions of updates that are needed several times, without keeping their factors."""

from typing import NamedTuple

from loralens.core.lowrank import Bases, LowRank
from loralens.core.structured import Update
from loralens.linalg.basis import Basis
from loralens.linalg.factor import Array, Floats

LIMIT = 1 << 22  # numbers that are kept at most, 32 MiB: those of all modules of 400 adapters of rank 8 with 64 modules


class _Small(NamedTuple):
    """The singular values of a pair, and the matrices T of its two bases, which refer to the factors themselves."""

    T_left: Floats
    s: Floats
    T_right: Floats


class KnownBases:
    """Two r × r matrices for every update whose directions were computed, from which they follow with the same bits.

    Many adapters are compared in several passes, and to compute the directions takes far longer than to read factors.
    """

    def __init__(self) -> None:
        self._known: dict[LowRank, _Small] = {}
        self._room = LIMIT

    def of(self, update: Update) -> tuple[Update, Bases]:
        """The update with its factors in memory, and its directions (`LowRank.bases`).

        Raises
        ------
        FormatError
            A factor holds NaN or Inf.
        """
        loaded = update.load()
        if not isinstance(update, LowRank) or not isinstance(loaded, LowRank):
            return loaded, loaded.bases()
        B, A = loaded.B, loaded.A
        small = self._known.get(update)
        if small:
            return loaded, Bases(Basis(B, small.T_left), small.s, Basis(A.T, small.T_right))
        bases = loaded.bases()
        # Of ill-conditioned factors the bases have columns of their own, which are too large to be kept.
        small = _Small(bases.left.T, bases.s, bases.right.T)
        numbers = sum(array.size for array in small)
        if numbers <= self._room and _is_same(bases.left.X, B) and _is_same(bases.right.X, A.T):
            self._known[update] = small
            self._room -= numbers
        return loaded, bases


def _is_same(X: Array, factor: Array) -> bool:
    """Whether an array is the factor itself, or another view of all of its memory."""
    return (X.ctypes.data, X.shape, X.strides, X.dtype) == (
        factor.ctypes.data,
        factor.shape,
        factor.strides,
        factor.dtype,
    )
