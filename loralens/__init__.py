"""Understand, shrink, combine, merge and trust LoRA adapters.

    >>> import loralens
    >>> adapter = loralens.load("my_adapter")
    >>> adapter["model.layers.0.self_attn.q_proj"].svd().s

The names below are imported when they are first used, so that ``import loralens`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loralens.version import __version__

if TYPE_CHECKING:
    from loralens.analysis.spectrum import Spectrum, spectrum
    from loralens.core.adapter import Adapter
    from loralens.core.lowrank import LowRank
    from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, ShapeError
    from loralens.formats import load, save

_HOMES = {
    "Adapter": "loralens.core.adapter",
    "FormatError": "loralens.errors",
    "LoraLensError": "loralens.errors",
    "LowRank": "loralens.core.lowrank",
    "MismatchError": "loralens.errors",
    "OptionError": "loralens.errors",
    "ShapeError": "loralens.errors",
    "Spectrum": "loralens.analysis.spectrum",
    "load": "loralens.formats",
    "save": "loralens.formats",
    "spectrum": "loralens.analysis.spectrum",
}

__all__ = [
    "Adapter",
    "FormatError",
    "LoraLensError",
    "LowRank",
    "MismatchError",
    "OptionError",
    "ShapeError",
    "Spectrum",
    "__version__",
    "load",
    "save",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loralens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
