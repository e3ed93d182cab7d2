"""The basic types: `LowRank`, `Adapter`, names of modules, weights of the base, ranks."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.core.adapter import Adapter, Finding
    from loralens.core.lazy import LazyArray
    from loralens.core.lowrank import LowRank
    from loralens.core.moments import Moments
    from loralens.core.ranks import Rule
    from loralens.core.scaling import Scaling
    from loralens.core.structured import Structured
    from loralens.core.weights import Weight, weights_of

__all__ = [
    "Adapter",
    "Finding",
    "LazyArray",
    "LowRank",
    "Moments",
    "Rule",
    "Scaling",
    "Structured",
    "Weight",
    "weights_of",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Adapter": "adapter",
        "Finding": "adapter",
        "LazyArray": "lazy",
        "LowRank": "lowrank",
        "Moments": "moments",
        "Rule": "ranks",
        "Scaling": "scaling",
        "Structured": "structured",
        "Weight": "weights",
        "weights_of": "weights",
    },
)
