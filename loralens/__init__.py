"""Understand, shrink, combine, merge and trust LoRA adapters.

    >>> import loralens
    >>> adapter = loralens.load("my_adapter")
    >>> loralens.spectrum(adapter).to_frame()
    >>> loralens.compress(adapter, rank=8, output="smaller")

Every command of the command line is a function of the same name, with the same options; `plot` draws what they return,
`load` and `save` read and write adapters:

    inspect      Show what is in an adapter file, and how it was understood.
    convert      Write an adapter in another dialect, with its names and scales.
    equal        Test whether two adapters are the same update.
    spectrum     Show the singular values of ΔW, and the ranks and norms that follow from them.
    similarity   Compare the directions of adapters: φ(i, j), cosines, angles, beside chance.
    trajectory   Follow one run through its checkpoints.
    survey       List the adapters under a folder, and name duplicates.
    amplify      Show what ΔW amplifies of W, beside random and top directions.
    intruders    Find singular vectors of W + ΔW that W does not have.
    doctor       Examine adapters for faults, and say how to mend them.
    compress     Make an adapter smaller, and measure the error of that.
    curve        Show rank against size against error, before anything is written.
    calibrate    Measure the second moments of real inputs, for compress --activations.
    combine      Combine several adapters into one: exact sums, and the methods of the literature.
    negate       Change the sign of an adapter, everywhere or in some modules.
    scale        Change the strength of an adapter, everywhere or in some modules.
    subtract     Subtract one adapter from another, exactly.
    interpolate  Write a point on the line between two adapters, exactly.
    drop         Leave out modules of an adapter.
    merge        Merge adapters into a base model, with a certificate and an undo patch.
    unmerge      Restore the base from a merged model, bit for bit.
    verify       Test whether a merged model holds an adapter, and how faithfully.
    extract      Make an adapter from two models: of a full fine-tune, or of a merge.
    report       Write one page about adapters, to read and to send.
    train        Train LoRA layers on texts: adapters to study, and to use.
    evaluate     Measure a model on held-out texts, with each of several adapters.
    behave       Show what adapters do to a model's outputs on real inputs.

Functions, types and packages are imported when they are first used, so ``import loralens`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loralens.exports import with_options_written_out
from loralens.verbs import VERBS
from loralens.version import __version__

if TYPE_CHECKING:
    from loralens.analysis.base.amplification import Amplification
    from loralens.analysis.behaviour import Behaviour
    from loralens.analysis.checks.diagnosis import Diagnosis
    from loralens.analysis.compare.similarity import Comparison, Similarity
    from loralens.analysis.spectrum import Spectrum
    from loralens.arithmetic.combine import Combination
    from loralens.core.adapter import Adapter
    from loralens.core.fingerprint import fingerprint
    from loralens.core.lowrank import LowRank
    from loralens.core.moments import Moments
    from loralens.core.ranks import Rule
    from loralens.errors import DivergenceError, FormatError, LoraLensError, MismatchError, OptionError, ShapeError
    from loralens.formats import load, save
    from loralens.formats.records.moments import load_moments, save_moments
    from loralens.verbs.amplify import amplify
    from loralens.verbs.behave import behave
    from loralens.verbs.calibrate import calibrate
    from loralens.verbs.combine import combine
    from loralens.verbs.compress import compress
    from loralens.verbs.convert import convert
    from loralens.verbs.curve import curve
    from loralens.verbs.doctor import doctor
    from loralens.verbs.drop import drop
    from loralens.verbs.equal import equal
    from loralens.verbs.evaluate import evaluate
    from loralens.verbs.extract import extract
    from loralens.verbs.inspect import inspect
    from loralens.verbs.interpolate import interpolate
    from loralens.verbs.intruders import intruders
    from loralens.verbs.merge import merge
    from loralens.verbs.negate import negate
    from loralens.verbs.plot import plot
    from loralens.verbs.report import report
    from loralens.verbs.scale import scale
    from loralens.verbs.similarity import similarity
    from loralens.verbs.spectrum import spectrum
    from loralens.verbs.subtract import subtract
    from loralens.verbs.survey import survey
    from loralens.verbs.train import train
    from loralens.verbs.trajectory import trajectory
    from loralens.verbs.unmerge import unmerge
    from loralens.verbs.verify import verify

_PACKAGES = (
    "analysis",
    "arithmetic",
    "charts",
    "compression",
    "core",
    "formats",
    "linalg",
    "merging",
    "reporting",
    "tables",
    "training",
    "verbs",
)

_HOMES = {
    "Adapter": "loralens.core.adapter",
    "Amplification": "loralens.analysis.base.amplification",
    "Behaviour": "loralens.analysis.behaviour",
    "Combination": "loralens.arithmetic.combine",
    "Comparison": "loralens.analysis.compare.similarity",
    "Diagnosis": "loralens.analysis.checks.diagnosis",
    "DivergenceError": "loralens.errors",
    "FormatError": "loralens.errors",
    "LoraLensError": "loralens.errors",
    "LowRank": "loralens.core.lowrank",
    "MismatchError": "loralens.errors",
    "Moments": "loralens.core.moments",
    "OptionError": "loralens.errors",
    "Rule": "loralens.core.ranks",
    "ShapeError": "loralens.errors",
    "Similarity": "loralens.analysis.compare.similarity",
    "Spectrum": "loralens.analysis.spectrum",
    "fingerprint": "loralens.core.fingerprint",
    "load": "loralens.formats",
    "load_moments": "loralens.formats.records.moments",
    "save": "loralens.formats",
    "save_moments": "loralens.formats.records.moments",
}

__all__ = [
    "Adapter",
    "Amplification",
    "Behaviour",
    "Combination",
    "Comparison",
    "Diagnosis",
    "DivergenceError",
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
    "amplify",
    "behave",
    "calibrate",
    "combine",
    "compress",
    "convert",
    "curve",
    "doctor",
    "drop",
    "equal",
    "evaluate",
    "extract",
    "fingerprint",
    "inspect",
    "interpolate",
    "intruders",
    "load",
    "load_moments",
    "merge",
    "negate",
    "plot",
    "report",
    "save",
    "save_moments",
    "scale",
    "similarity",
    "spectrum",
    "subtract",
    "survey",
    "train",
    "trajectory",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"loralens.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in VERBS or name == "plot":
        function = with_options_written_out(getattr(import_module(f"loralens.verbs.{name}"), name))
        globals()[name] = function
        return function
    raise AttributeError(f"module 'loralens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
