"""Understand, shrink, combine, merge and trust LoRA adapters.

    >>> import loralens
    >>> adapter = loralens.load("my_adapter")
    >>> adapter["model.layers.0.self_attn.q_proj"].svd().s

The names below are imported when they are first used, and so are the packages, as in ``loralens.train.fit``: ``import
loralens`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loralens.version import __version__

if TYPE_CHECKING:
    from loralens.analysis.amplification import Amplification, amplification
    from loralens.analysis.behaviour import Behaviour, behaviour
    from loralens.analysis.checks.diagnosis import Diagnosis
    from loralens.analysis.doctor import diagnose
    from loralens.analysis.interference import interference
    from loralens.analysis.intruders import intruders, mitigated
    from loralens.analysis.pairwise import pairwise
    from loralens.analysis.similarity import Comparison, Similarity, similarity
    from loralens.analysis.spectrum import Spectrum, spectrum
    from loralens.analysis.trajectory import trajectory
    from loralens.arithmetic.combine import Combination, combine
    from loralens.compress.bits import allocate
    from loralens.compress.calibration import calibrate
    from loralens.compress.quantise import quantise
    from loralens.compress.truncate import truncate
    from loralens.core.adapter import Adapter
    from loralens.core.fingerprint import fingerprint
    from loralens.core.lowrank import LowRank
    from loralens.core.moments import Moments
    from loralens.core.ranks import Rule
    from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, ShapeError
    from loralens.formats import load, save
    from loralens.formats.moments import load_moments, save_moments
    from loralens.merge.extract import extract

_PACKAGES = ("analysis", "arithmetic", "compress", "core", "formats", "linalg", "merge", "plot", "report", "train")

_HOMES = {
    "Adapter": "loralens.core.adapter",
    "Amplification": "loralens.analysis.amplification",
    "Behaviour": "loralens.analysis.behaviour",
    "Combination": "loralens.arithmetic.combine",
    "Comparison": "loralens.analysis.similarity",
    "Diagnosis": "loralens.analysis.checks.diagnosis",
    "FormatError": "loralens.errors",
    "LoraLensError": "loralens.errors",
    "LowRank": "loralens.core.lowrank",
    "MismatchError": "loralens.errors",
    "Moments": "loralens.core.moments",
    "OptionError": "loralens.errors",
    "Rule": "loralens.core.ranks",
    "ShapeError": "loralens.errors",
    "Similarity": "loralens.analysis.similarity",
    "Spectrum": "loralens.analysis.spectrum",
    "allocate": "loralens.compress.bits",
    "amplification": "loralens.analysis.amplification",
    "behaviour": "loralens.analysis.behaviour",
    "calibrate": "loralens.compress.calibration",
    "combine": "loralens.arithmetic.combine",
    "diagnose": "loralens.analysis.doctor",
    "extract": "loralens.merge.extract",
    "fingerprint": "loralens.core.fingerprint",
    "interference": "loralens.analysis.interference",
    "intruders": "loralens.analysis.intruders",
    "load": "loralens.formats",
    "load_moments": "loralens.formats.moments",
    "mitigated": "loralens.analysis.intruders",
    "pairwise": "loralens.analysis.pairwise",
    "quantise": "loralens.compress.quantise",
    "save": "loralens.formats",
    "save_moments": "loralens.formats.moments",
    "similarity": "loralens.analysis.similarity",
    "spectrum": "loralens.analysis.spectrum",
    "trajectory": "loralens.analysis.trajectory",
    "truncate": "loralens.compress.truncate",
}

__all__ = [
    "Adapter",
    "Amplification",
    "Behaviour",
    "Combination",
    "Comparison",
    "Diagnosis",
    "FormatError",
    "LoraLensError",
    "LowRank",
    "MismatchError",
    "Moments",
    "OptionError",
    "Rule",
    "ShapeError",
    "Similarity",
    "Spectrum",
    "__version__",
    "allocate",
    "amplification",
    "behaviour",
    "calibrate",
    "combine",
    "diagnose",
    "extract",
    "fingerprint",
    "interference",
    "intruders",
    "load",
    "load_moments",
    "mitigated",
    "pairwise",
    "quantise",
    "save",
    "save_moments",
    "similarity",
    "spectrum",
    "trajectory",
    "truncate",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"loralens.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'loralens' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
