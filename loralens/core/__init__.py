"""The basic types: `LowRank`, `Adapter`, names of modules, weights of the base, ranks."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.core.adapter import Adapter as Adapter
    from loralens.core.adapter import Extra as Extra
    from loralens.core.adapter import Finding as Finding
    from loralens.core.attached import Attachment as Attachment
    from loralens.core.lazy import LazyArray as LazyArray
    from loralens.core.lowrank import Layout as Layout
    from loralens.core.lowrank import LowRank as LowRank
    from loralens.core.lowrank import Scaling as Scaling
    from loralens.core.model_in_memory import ModelInMemory as ModelInMemory
    from loralens.core.ranks import Rule as Rule
    from loralens.core.stored import Moment as Moment
    from loralens.core.stored import Moments as Moments
    from loralens.core.stored import State as State
    from loralens.core.stored import Strength as Strength
    from loralens.core.structured import Dense as Dense
    from loralens.core.structured import Hadamard as Hadamard
    from loralens.core.structured import Kronecker as Kronecker
    from loralens.core.structured import Structured as Structured
    from loralens.core.weights import Weight as Weight
    from loralens.core.weights import weights_of as weights_of
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
