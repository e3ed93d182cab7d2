"""An exact product made on another device: torch multiplies the same slices, and D has the same bits."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from loralens.linalg.device import Device
from loralens.linalg.exact import ExactProduct, Singles

Slices = tuple[tuple[Any, Any], ...]  # tensors there: the left and the right side of each product that is added up


@final
@dataclass(frozen=True, slots=True)
class DeviceProduct:
    """D = Σ s·B·A, float32, of an `ExactProduct`, multiplied by torch; made by `product_on`.

    Attributes
    ----------
    pieces : tuple of (tensor, tensor) pairs
        Of each block of rank indices B₁, A₁ and, of two slices, what `Piece` calls B2, A2: float64, on the device.
    shape : tuple of int
        (m, n).
    """

    pieces: tuple[Slices, ...]
    shape: tuple[int, int]

    @property
    def T(self) -> "DeviceProduct":
        """Dᵀ, with the same bits."""
        swapped = tuple(tuple((right.T, left.T) for left, right in piece) for piece in self.pieces)
        return DeviceProduct(swapped, self.shape[::-1])

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Rows ``start`` to ``stop`` of D as NumPy's, float32, shape (stop − start, n); into ``out`` where given.

        The terms are added in the order in which `ExactProduct` adds them, and rounded to float32 there, so that half
        as many bytes come back.
        """
        import torch

        total = sum(
            (_piece(piece, start, stop) for piece in self.pieces[1:]), start=_piece(self.pieces[0], start, stop)
        )
        made: Singles = total.to(torch.float32).cpu().numpy()
        if out is None:
            return made
        np.copyto(out, made)
        return out


def product_on(device: Device | None, product: ExactProduct) -> ExactProduct | DeviceProduct:
    """The product where its rows are to be made: itself for NumPy, else one whose slices are on the device.

    A float64 product of the slices commits no rounding in whatever order it is summed, so it does not matter who sums.
    """
    if device is None or device.torch is None:
        return product
    pieces = []
    for piece in product.pieces:
        pairs = [(piece.B1, piece.A1)]
        if piece.B2 is not None and piece.A2 is not None:
            pairs.append((piece.B2, piece.A2))
        pieces.append(tuple((device.put(left, "float64"), device.put(right, "float64")) for left, right in pairs))
    return DeviceProduct(tuple(pieces), product.shape)


def _piece(pairs: Slices, start: int, stop: int) -> Any:
    """Some rows of one block of rank indices, float64, on the device."""
    products = [left[start:stop] @ right for left, right in pairs]
    return products[0] if len(products) == 1 else products[0] + products[1]
