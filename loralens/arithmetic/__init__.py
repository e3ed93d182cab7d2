"""Adapters as vectors: exact sums, and the combining methods of the literature in the small space that they span."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.arithmetic.combine import Combination as Combination
    from loralens.arithmetic.combine import combine_adapters as combine_adapters
    from loralens.arithmetic.methods import METHODS as METHODS
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
