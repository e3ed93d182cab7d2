"""The leading singular directions of a weight or of a gradient: the same numbers in every call and on every device."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from loralens.core.lazy import Array
from loralens.linalg.device import Device
from loralens.linalg.randomized import is_dense, leading_svd

# The bytes of directions that are kept, so that several runs on one base in a process compute them once. Those of a
# model of 7 billion parameters take 0.3 GB at rank 16.
KEPT = 1 << 30
# The smaller side of matrices whose directions take so little time that they are not kept.
SMALL = 128
VERSION = "loralens directions 3"  # of their computation; it is part of the digest


class TruncatedSvd(NamedTuple):
    """U (out, r), s (r,) and V (in, r)."""

    U: Array
    s: Array
    V: Array


class DirectionStore(Protocol):
    """A place that keeps directions between processes."""

    def read(self, key: str, shape: tuple[int, int], rank: int) -> TruncatedSvd | None:
        """The directions under a key; None if there are none."""

    def write(self, key: str, directions: TruncatedSvd) -> None:
        """Keep directions under a key."""


_known: dict[str, TruncatedSvd] = {}  # by a digest of a weight and a rank
_store: ContextVar[DirectionStore | None] = ContextVar("direction_store", default=None)


@contextmanager
def keeping_directions(store: DirectionStore) -> Iterator[None]:
    """Within the context, directions of weights are looked up in a store, and kept there."""
    token = _store.set(store)
    try:
        yield
    finally:
        _store.reset(token)


def truncated_svd(W: Tensor, rank: int, *, keep: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,) and Vᵀ (r, in), on the device of W.

    ``keep`` says whether the same matrix will come again, as a weight does in the next run.
    """
    if W.dtype == torch.float64 or min(W.shape) <= SMALL or not keep:
        svd = _compute(W, rank)
    else:
        svd = _look_up(W, rank)
    U, s, V = (torch.from_numpy(part.copy()).to(W.device) for part in svd)
    return U, s, V.T


def _look_up(W: Tensor, rank: int) -> TruncatedSvd:
    """The directions of a weight, computed if they are neither known in this process nor in the store."""
    matrix = W.float().cpu().contiguous().numpy()
    key = blake2b(matrix.data, digest_size=32, key=f"{VERSION} {matrix.shape} {rank}".encode()).hexdigest()
    if key not in _known:
        store = _store.get()
        svd = store.read(key, (W.shape[0], W.shape[1]), rank) if store else None
        if svd is None:
            svd = _compute(W, rank)
            if store:
                store.write(key, svd)
        _known[key] = svd
        # The oldest is forgotten first; a dictionary gives its keys in the order of insertion.
        while len(_known) > 1 and sum(part.nbytes for parts in _known.values() for part in parts) > KEPT:
            del _known[next(iter(_known))]
    return _known[key]


def _compute(W: Tensor, rank: int) -> TruncatedSvd:
    if W.dtype == torch.float64 or is_dense((W.shape[0], W.shape[1]), rank):
        U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        return TruncatedSvd(*(part.cpu().contiguous().numpy() for part in (U[:, :rank], s[:rank], Vh[:rank].T)))
    # This is computed on the CPU wherever W is, so that all devices start from the same pair. The iteration starts from
    # a fixed seed and not from that of the run, so that the pair depends on W alone.
    matrix = W.float().cpu().contiguous().numpy()
    leading = leading_svd(matrix, rank, rng=np.random.default_rng(0), device=Device())
    return TruncatedSvd(leading.U, leading.s, leading.V)


def signs(Vh: Tensor) -> Tensor:
    """−1 or 1 for each row, shape (r, 1), which makes the largest entry of the row positive.

    An SVD leaves the signs open, and libraries choose them differently.
    """
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0)
