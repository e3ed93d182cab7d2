"""The exact product computed on a GPU: torch multiplies the same slices, and D has the same bits as on the CPU."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from loralens.linalg.device import Device
from loralens.linalg.exact import ExactProduct, Singles

Slices = tuple[tuple[Any, Any], ...]  # tensors on the device: both sides of each product that is added up


@final
@dataclass(frozen=True, slots=True)
class DeviceProduct:
    """The D = Σ s·B·A of an `ExactProduct`, float32, multiplied by torch; `product_on` makes it.

    Attributes
    ----------
    pieces : tuple of (tensor, tensor) pairs
        For each block of rank indices the pair B₁, A₁ and, if there are two slices, the pair B2, A2 of `SlicedBlock`.
        All are float64 and on the device.
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
        """Rows ``start`` to ``stop`` of D as a NumPy array, float32, shape (stop − start, n), in ``out`` if given.

        The terms are added in the same order as in `ExactProduct`. They are rounded to float32 on the device, which
        halves the bytes that are copied back.
        """
        import torch

        # The order of the additions is part of the definition of D (see `loralens.linalg.exact`).
        total = sum(
            (_piece(piece, start, stop) for piece in self.pieces[1:]), start=_piece(self.pieces[0], start, stop)
        )
        rows: Singles = total.to(torch.float32).cpu().numpy()
        if out is None:
            return rows
        np.copyto(out, rows)
        return out


def product_on(device: Device | None, product: ExactProduct) -> ExactProduct | DeviceProduct:
    """The product on ``device``: the argument itself for NumPy, else a `DeviceProduct` with its slices on the device.

    A float64 product of the slices involves no rounding in any order of summation, so every device gives the same bits.
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
    """Some rows of the product of one block of rank indices, float64, on the device."""
    products = [left[start:stop] @ right for left, right in pairs]
    return products[0] if len(products) == 1 else products[0] + products[1]
