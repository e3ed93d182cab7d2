"""`Structured`: an update of another form than a pair, whose exact rank is too large for a pair.

LyCORIS files have Kronecker products (LoKr), Hadamard products (LoHa) and full differences. If their exact rank is at
most min(out, in)/2, the reader converts them to a `LowRank`; otherwise they keep their form. Singular values, norms and
the dense update are computed from the form. Operations that need a pair raise an error that says how to get one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NoReturn, Self, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import SVD, Bases, Layout, LowRank, Origin, Scaling, check_float64
from loralens.errors import FormatError, MismatchError
from loralens.linalg.factor import Basis, require_finite
from loralens.linalg.measures import numerical_rank


@final
@dataclass(frozen=True, slots=True)
class Kronecker:
    """kron(first, second), the form of LoKr. Its singular values are the products of those of both factors.

    ``name`` is the name of a form in messages, ``rank`` the exact rank for generic factors, and ``dtype`` that of the
    stored factors.
    """

    first: "LowRank | Dense"
    second: "LowRank | Dense"
    name: str = field(default="Kronecker product", init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        (a, c), (b, d) = self.first.shape, self.second.shape
        return a * b, c * d

    @property
    def rank(self) -> int:
        """The product of the ranks of both factors."""
        # The width of a factor may exceed its number of rows or columns, which then limits its rank.
        return min(self.first.rank, *self.first.shape) * min(self.second.rank, *self.second.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the first factor."""
        return self.first.dtype

    def dense(self) -> Array:
        """The matrix, float64."""
        return np.kron(self.first.dense(), self.second.dense())

    def singular_values(self) -> Array:
        """σᵢ(first)·σⱼ(second), largest first, float64."""
        products = np.outer(self.first.singular_values(), self.second.singular_values()).ravel()
        # Factors of lower rank have fewer products; the other singular values are 0.
        s = np.zeros(min(self.shape))
        s[: products.size] = np.sort(products)[::-1]
        return s


@final
@dataclass(frozen=True, slots=True)
class Hadamard:
    """The entrywise product first ∘ second, the form of LoHa."""

    first: LowRank
    second: LowRank
    name: str = field(default="Hadamard product", init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.first.shape

    @property
    def rank(self) -> int:
        """The product of the ranks of both factors, limited by the size of the matrix."""
        return min(self.first.rank * self.second.rank, *self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the first factor."""
        return self.first.dtype

    def dense(self) -> Array:
        """The matrix, float64."""
        return self.first.dense() * self.second.dense()

    def singular_values(self) -> Array:
        """Singular values of the dense matrix, since there is no shorter way for an entrywise product."""
        return _dense_singular_values(self.dense())


@final
@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix given in full: a stored difference, or a full factor of a Kronecker product."""

    array: LazyArray
    name: str = field(default="full difference", init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.array.shape[0]), prod(self.array.shape[1:])

    @property
    def rank(self) -> int:
        """min(out, in)."""
        return min(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the stored array."""
        return self.array.dtype

    def dense(self) -> Array:
        """The matrix, float64."""
        return self.array.read().astype(np.float64).reshape(self.shape)

    def singular_values(self) -> Array:
        """Singular values of the dense matrix."""
        return _dense_singular_values(self.dense())


Form = Kronecker | Hadamard | Dense


@final
@dataclass(frozen=True, slots=True)
class Structured:
    """The update ΔW = scale · form. It has the interface of a `LowRank`, except for the factors B and A.

    Attributes
    ----------
    form : Kronecker, Hadamard or Dense
    scale, scaling, layout, origin
        As in `LowRank`.
    """

    form: Form
    scale: float = 1.0
    scaling: Scaling = field(default_factory=Scaling)
    layout: Layout = field(default_factory=Layout)
    origin: Origin | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.form.shape

    @property
    def rank(self) -> int:
        """The exact rank for generic factors."""
        return self.form.rank

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the stored factors."""
        return self.form.dtype

    @property
    def parameters(self) -> int:
        """Numbers stored for this module."""
        # Without a file the dense matrix is what would be stored.
        return self.origin.parameters if self.origin else prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored for this module."""
        return self.origin.nbytes if self.origin else prod(self.shape) * self.dtype.itemsize

    def dense(self) -> Array:
        """ΔW, float64, shape (out, in)."""
        return self.scale * self.form.dense()

    def singular_values(self) -> Array:
        """Singular values of ΔW, float64, shape (min(out, in),), largest first."""
        return check_float64(abs(self.scale), self.form.singular_values())

    def svd(self) -> SVD:
        """Thin SVD of the dense ΔW, float64."""
        # NaN and Inf are refused with a message first; LAPACK would say only that it does not converge.
        U, s, Vh = np.linalg.svd(require_finite(self.dense()), full_matrices=False)
        return SVD(U, check_float64(1.0, s), Vh)

    def bases(self) -> Bases:
        """Singular directions of the dense ΔW with σ above rounding."""
        U, s, Vh = self.svd()
        k = numerical_rank(s, self.shape)
        return Bases(Basis.of(U[:, :k]), s[:k], Basis.of(Vh[:k].T))

    def truncated(self, rank: int) -> LowRank:
        """The nearest pair of this rank (Eckart–Young), float32, factors balanced."""
        U, s, Vh = self.svd()
        root = np.sqrt(s[:rank])
        B, A = (U[:, :rank] * root).astype(np.float32), (root[:, None] * Vh[:rank]).astype(np.float32)
        scaling = Scaling("given", origin=f"rank {rank} of a {self.form.name}")
        return LowRank(B, A, scaling=scaling, layout=self.layout)

    def load(self) -> Self:
        """Return itself; the form reads its arrays on demand."""
        return self

    def without_origin(self) -> "Structured":
        """The same update without its `Origin`."""
        return replace(self, origin=None)

    def rescaled(self, scale: float, scaling: Scaling) -> "Structured":
        """The same form under another scale."""
        return replace(self, scale=scale, scaling=scaling)

    def with_layout(self, layout: Layout) -> "Structured":
        """The same update with another layout and without its `Origin`."""
        return replace(self, layout=layout, origin=None)

    @property
    def factors(self) -> NoReturn:
        """Raises MismatchError, since there is no pair. ``B`` and ``A`` do the same."""
        raise MismatchError(
            f"a {self.form.name} of rank {self.rank} is kept in its own form and has no factors B and A",
            fix="make it a pair first: loralens convert --rank R",
        )

    B = A = factors


def _dense_singular_values(matrix: Array) -> Array:
    """Singular values, largest first, float64; raises FormatError if the matrix holds NaN or Inf."""
    return np.asarray(np.linalg.svd(require_finite(matrix), compute_uv=False))


Update = LowRank | Structured
Updates = Mapping[str, Update]


def check_rows(modules: Updates) -> None:
    """Refuse modules whose rows are not in the order of the base, since their updates would change other rows of W.

    Raises
    ------
    FormatError
        The numbers of heads, on which the order depends, were unknown when the file was read.
    """
    turned = [name for name, module in modules.items() if module.layout.rows]
    if turned:
        raise FormatError(
            f"the rows of {len(turned)} modules (the first is {turned[0]}) are in the order of "
            f"{modules[turned[0]].layout.rows}, and nothing says how many heads they belong to",
            fix="give a base whose folder has a config.json with its numbers of heads (in Python: load(…, base=…))",
        )


def product_dtype(module: Update) -> np.dtype[Any] | None:
    """The dtype of the stored tensors that a module is a product of; None if its factors are read as they are.

    New factors in the place of the product get this dtype.
    """
    stored = module.origin.dtype if module.origin else None
    if isinstance(module, Structured):
        stored = stored or module.dtype
    elif stored and stored.itemsize >= max(factor.dtype.itemsize for factor in module.factors):
        return None
    # Products of numbers of 8 bits need more digits than these have.
    return stored if stored and stored.itemsize > 1 else None


def factor_dtypes(module: Update) -> set[np.dtype[Any]]:
    """The dtypes of the factors of a module, or of the tensors that they are a product of."""
    product = product_dtype(module)
    return {product} if product else {factor.dtype for factor in module.factors}
