"""`LowRank`: the update ΔW = scale · B · A of one weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import copysign, isfinite, prod, sqrt
from typing import Any, Literal, NamedTuple, Self, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.tensors import array_of, is_tensor
from loralens.errors import FormatError, OptionError, ShapeError
from loralens.linalg.factor import Basis
from loralens.linalg.product import product_bases, product_singular_values, product_svd

ScaleFormula = Literal["alpha/r", "alpha/sqrt(r)", "given", "unknown"]

TWICE = "twice, as PEFT adds it"  # end of the origin of the scale of an nn.MultiheadAttention's out_proj
CONVENTION = "no alpha in the file"  # beginning of the origin of a scale that follows from a convention


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a scale was determined.

    This is stored in addition to the scale because α cannot be computed from it: (α/r)·r differs from α in float64 for
    7.7 % of all pairs of small integers. A writer of the same dialect uses ``alpha`` again if scale and rank are
    unchanged.

    Attributes
    ----------
    formula : str
        ``alpha/r``, ``alpha/sqrt(r)`` (rsLoRA), ``given`` (the scale itself was given) or ``unknown`` (taken as 1).
    alpha, rank : float, int or None
        The numbers in the formula; None if the scale itself was given, or is unknown.
    origin : str
        The source of the numbers, in words: ``adapter_config.json``, ``alpha_pattern 'q_proj'``, ``--alpha`` …
    """

    formula: ScaleFormula = "given"
    alpha: float | None = None
    rank: int | None = None
    origin: str = ""

    @property
    def stated(self) -> bool:
        """Whether the scale is in the file, so it is neither unknown nor a convention of the dialect."""
        return self.formula != "unknown" and not self.origin.startswith(CONVENTION)

    @property
    def twice(self) -> bool:
        """Whether the scale is twice that of the file, because PEFT adds the update twice (see `doubled`)."""
        return self.origin.endswith(TWICE)

    def doubled(self) -> "Scaling":
        """The scaling of an update that PEFT adds twice, also in training."""
        # α is doubled with the scale, so that the formula still gives it.
        alpha = None if self.alpha is None else 2 * self.alpha
        return replace(self, alpha=alpha, origin=f"{self.origin}, {TWICE}" if self.origin else TWICE)

    def once(self) -> "Scaling":
        """The scaling as the file states it, if the update is `doubled`; unchanged for any other update."""
        if not self.twice:
            return self
        alpha = None if self.alpha is None else self.alpha / 2
        return replace(self, alpha=alpha, origin=self.origin.removesuffix(TWICE).removesuffix(", "))

    @property
    def value(self) -> float:
        """The scale that the formula gives; 1 if it is ``given`` or ``unknown``."""
        # A scale that is unknown, or that was given itself, has no α and r.
        if self.alpha is None or self.rank is None:
            return 1.0
        return scale_of(self.alpha, self.rank, self.formula)

    def alpha_for(self, scale: float, rank: int, formula: ScaleFormula) -> float:
        """The α that gives ``scale`` at ``rank`` by ``formula``; this is the α that was read, if it still applies."""
        # The α that was read is written again to the bit; a computed one may differ in the last place.
        if self.alpha is not None and self.formula == formula and self.rank == rank and self.value == scale:
            return self.alpha
        return alpha_of(scale, rank, formula)

    def with_whole_alpha(self, scale: float, rank: int) -> "Scaling":
        """The scaling nearest to ``scale`` at ``rank`` whose α is a whole number; itself if its α is one already."""
        formula: ScaleFormula = self.formula if self.formula == "alpha/sqrt(r)" else "alpha/r"
        # Of an update that is added twice the file holds one half.
        alpha, step = self.alpha_for(scale, rank, formula), 2 if self.twice else 1
        if not alpha or (alpha / step).is_integer():
            return self
        whole = copysign(max(1, round(abs(alpha) / step)) * step, alpha)
        return Scaling(formula, whole, rank, self.origin)

    def __str__(self) -> str:
        if self.formula == "unknown":
            return f"unknown, taken as 1, {TWICE}" if self.twice else "unknown, taken as 1"
        symbol, root = {"alpha/r": ("α/r", ""), "alpha/sqrt(r)": ("α/√r", "√")}.get(self.formula, ("given", ""))
        stated = self.alpha is not None and self.formula != "given"
        formula = f"{symbol} = {self.alpha:g}/{root}{self.rank}" if stated else symbol
        return f"{formula} ({self.origin})" if self.origin else formula


def scale_of(alpha: float, rank: int, formula: ScaleFormula) -> float:
    """α/r, or α/√r for rsLoRA, as the field's software computes it in float64."""
    return alpha / sqrt(rank) if formula == "alpha/sqrt(r)" else alpha / rank


def alpha_of(scale: float, rank: int, formula: ScaleFormula) -> float:
    """The α for which ``scale_of(α, rank, formula)`` is ``scale``, bit for bit if float64 has such an α.

    It is the product scale·r, rounded once, or the whole number beside it if that gives the same scale. No neighbouring
    number is better: the α that give a scale lie symmetrically around the exact product, unless the scale is a power of
    two, and then the product is exact.
    """
    alpha = scale * (sqrt(rank) if formula == "alpha/sqrt(r)" else rank)
    whole = float(round(alpha)) if isfinite(alpha) else alpha
    return whole if rank and scale_of(whole, rank, formula) == scale else alpha


# The square of 1e140 is 1e280, so 1e28 such squares can be added before float64 overflows.
LARGEST = 1e140  # largest singular value of ΔW, so that the sum of all squares in a model stays in float64
# what to do about an update that leaves the range of floats
TOO_LARGE = "correct α or the scale in its configuration, or give --scale if it states none"


class SVD(NamedTuple):
    """A thin singular value decomposition: U (out, k), s (k,) largest first, Vh (k, in), all float64."""

    U: Array
    s: Array
    Vh: Array


class Bases(NamedTuple):
    """A singular value decomposition with vectors in product form: left (out, k), s (k,), right (in, k).

    Directions with σ = 0 are left out, so k is at most the numerical rank, and 0 if ΔW = 0. The columns of ``left`` and
    ``right`` belong together in pairs, each pair up to a common sign.
    """

    left: Basis
    s: Array
    right: Basis


@dataclass(frozen=True, slots=True)
class Layout:
    """The kind of weight that a module adapts, and how the base model stores it.

    Attributes
    ----------
    kind : str
        ``linear``, ``conv``, ``embedding``, ``experts`` (one expert of a stack), ``merged`` (fused projections of
        which only some are adapted, as one block-diagonal pair) or ``parameter`` (a weight that is not ``.weight``).
    kernel : tuple of int
        Kernel size of a convolution; its update is (out, in · k…). Empty for a convolution whose kernel nothing says.
    groups : int
        Groups of a grouped convolution, or blocks of a ``merged`` pair. 0 for a convolution that may have groups.
    transposed : bool
        Whether the file says that the base stores this weight as (in, out). If the shape of the weight says otherwise,
        the shape counts.
    rows : str
        If the rows of B are in the order of other software, and could not be put into that of the base: the name of
        that software. Otherwise empty. Such an update cannot be added to a weight
        (`loralens.core.structured.check_rows`).
    """

    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    rows: str = ""

    @property
    def blocks(self) -> int:
        """Number of blocks of a ``merged`` pair, each of which has rank r; 1 for every other kind."""
        return self.groups if self.kind == "merged" else 1


@dataclass(frozen=True, slots=True)
class Origin:
    """The stored tensors from which a module was read, so that an unchanged module is written back bit for bit.

    Attributes
    ----------
    format : str
        The dialect of the file. Another name than that of the adapter's dialect says that the tensors are no pair, but
        what the factors are a product of.
    tensors : mapping of str to LazyArray
        Tensors by their key in the file. The experts of a stack share tensors.
    share : int
        Number of modules that share these tensors.
    """

    format: str
    tensors: Mapping[str, LazyArray]
    share: int = 1

    @property
    def parameters(self) -> int:
        """Number of stored numbers of one module, not counting α."""
        return sum(tensor.size for tensor in self.tensors.values() if tensor.ndim) // self.share

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The widest dtype of the tensors; None if there are none."""
        # A number alone is α.
        dtypes = (tensor.dtype for tensor in self.tensors.values() if tensor.ndim)
        return max(dtypes, key=lambda dtype: dtype.itemsize, default=None)

    @property
    def nbytes(self) -> int:
        """Bytes stored for one module."""
        return sum(tensor.nbytes for tensor in self.tensors.values() if tensor.ndim) // self.share


def check_float64(scale: float, s: Array) -> Array:
    """Scale · s, the singular values of ΔW, after a check that norms of ΔW stay within float64.

    Raises
    ------
    FormatError
        The singular values are too large.
    """
    top = float(s[0]) if len(s) else 0.0
    # `not <=` also refuses NaN.
    if not scale * top <= LARGEST:
        raise FormatError(
            "ΔW is too large for float64, which has to hold sums of its squares: its scale is "
            f"{scale:g} and the largest singular value of B·A is {top:g}",
            fix=TOO_LARGE,
        )
    return scale * s


def _as_factor(name: str, factor: Any) -> Array | LazyArray:
    """A factor as an array of NumPy, if it is not one already and not lazy."""
    if isinstance(factor, np.ndarray | LazyArray):
        return factor
    try:
        return array_of(factor) if is_tensor(factor) else np.asarray(factor)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{name} cannot be read as an array of NumPy: {str(error).splitlines()[0]:.200}"
        raise OptionError(what, fix="give an array of NumPy, or a dense tensor of torch") from error


@final
@dataclass(frozen=True, slots=True, init=False, repr=False, eq=False)
class LowRank:
    """The update ΔW = scale · B · A of one weight, in the orientation (out, in).

    Parameters
    ----------
    B : array or LazyArray, shape (out, r)
    A : array or LazyArray, shape (r, in)
        Any real floating dtype. Lazy factors are read each time ``B`` or ``A`` is asked for. A tensor of torch becomes
        an array of NumPy: with the same memory if it is on the CPU, else as a copy.
    scale : float
        Any finite number, negative ones included.
    scaling : Scaling
        Where the scale came from.
    layout : Layout
        What kind of weight this adapts.
    origin : Origin or None
        The tensors it was read from; dropped by everything that makes new factors.

    Raises
    ------
    ShapeError
        B and A do not multiply.
    OptionError
        A factor is not an array and cannot become one, such as a sparse tensor.
    """

    _B: Array | LazyArray
    _A: Array | LazyArray
    scale: float
    scaling: Scaling
    layout: Layout
    origin: Origin | None

    def __init__(
        self,
        B: Array | LazyArray,
        A: Array | LazyArray,
        scale: float = 1.0,
        *,
        scaling: Scaling | None = None,
        layout: Layout | None = None,
        origin: Origin | None = None,
    ) -> None:
        B, A = _as_factor("B", B), _as_factor("A", A)
        if len(B.shape) != 2 or len(A.shape) != 2 or B.shape[1] != A.shape[0]:
            raise ShapeError(
                f"B {B.shape} and A {A.shape} do not multiply",
                fix="B must be (out, r) and A (r, in): save the adapter again from its training code",
            )
        for name, value in (
            ("_B", B),
            ("_A", A),
            ("scale", float(scale)),
            ("scaling", scaling or Scaling()),
            ("layout", layout or Layout()),
            ("origin", origin),
        ):
            object.__setattr__(self, name, value)

    @property
    def B(self) -> Array:
        """The factor on the out side, shape (out, r), in the dtype of the file."""
        return self._B.read() if isinstance(self._B, LazyArray) else self._B

    @property
    def A(self) -> Array:
        """The factor on the in side, shape (r, in), in the dtype of the file."""
        return self._A.read() if isinstance(self._A, LazyArray) else self._A

    @property
    def rank(self) -> int:
        """Nominal rank r: the width of the factors."""
        return int(self._B.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return int(self._B.shape[0]), int(self._A.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of B (A nearly always shares it)."""
        return self._B.dtype

    @property
    def parameters(self) -> int:
        """Numbers stored for this module."""
        return self.origin.parameters if self.origin else prod(self._B.shape) + prod(self._A.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored for this module."""
        if self.origin:
            return self.origin.nbytes
        return prod(self._B.shape) * self._B.dtype.itemsize + prod(self._A.shape) * self._A.dtype.itemsize

    @property
    def factors(self) -> tuple[LazyArray, LazyArray]:
        """B and A as they are, unread."""
        return LazyArray.of(self._B), LazyArray.of(self._A)

    def load(self) -> Self:
        """The same module with its factors held in memory."""
        return self.holding(self.B, self.A)

    def holding(self, B: Array, A: Array) -> Self:
        """The same module with its factors, which were read by the caller."""
        return self._with(B=B, A=A)

    def rescaled(self, scale: float, scaling: Scaling) -> Self:
        """The same factors, unread, under another scale."""
        return self._with(scale=scale, scaling=scaling)

    def without_origin(self) -> Self:
        """The same update without its `Origin`, so that it is written anew."""
        return self._with(origin=None)

    def with_layout(self, layout: Layout) -> Self:
        """The same update with another layout and without its `Origin`."""
        return self._with(layout=layout, origin=None)

    def _with(self, **changes: Any) -> Self:
        own = {
            "B": self._B,
            "A": self._A,
            **{name: getattr(self, name) for name in ("scale", "scaling", "layout", "origin")},
        }
        return type(self)(**{**own, **changes})

    def dense(self) -> Array:
        """ΔW itself, float64, shape (out, in). This takes out · in numbers; the pair has r · (out + in)."""
        return self.scale * (self.B.astype(np.float64) @ self.A.astype(np.float64))

    def singular_values(self) -> Array:
        """Singular values of ΔW, float64, shape (min(out, r, in),), largest first: |scale| · σ(B·A)."""
        return check_float64(abs(self.scale), product_singular_values(self.B, self.A))

    def svd(self) -> SVD:
        """Thin SVD of ΔW in float64, without forming it.

        Returns
        -------
        SVD
            ``U`` (out, k), ``s`` (k,) largest first, ``Vh`` (k, in), k = min(out, r, in). A negative scale goes into
            the signs of ``U``, so ``U @ diag(s) @ Vh`` is ΔW.
        """
        U, s, Vh = product_svd(self.B, self.A)
        return SVD(-U if self.scale < 0 else U, check_float64(abs(self.scale), s), Vh)

    def bases(self) -> Bases:
        """Singular directions of ΔW on both sides in product form, from which overlaps are computed."""
        left, s, right = product_bases(self.B, self.A)
        return Bases(Basis(left.X, -left.T) if self.scale < 0 else left, check_float64(abs(self.scale), s), right)

    def __repr__(self) -> str:
        out, in_ = self.shape
        return f"LowRank(out={out}, in={in_}, rank={self.rank}, scale={self.scale:g}, dtype={self.dtype})"


def same_numbers(first: LowRank, second: LowRank) -> bool:
    """Whether two pairs have the same factors entry by entry and the same scale; False if there is a NaN."""
    if (first.rank, first.scale) != (second.rank, second.scale):
        return False
    return np.array_equal(first.B, second.B) and np.array_equal(first.A, second.A)
