"""Adapters as vectors: exact sums, and the combining methods of the literature in the small space that they span."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.arithmetic.combine import Combination, combine_adapters
    from loralens.arithmetic.methods import METHODS

__all__ = [
    "METHODS",
    "Combination",
    "combine_adapters",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Combination": "combine",
        "METHODS": "methods",
        "combine_adapters": "combine",
    },
)
