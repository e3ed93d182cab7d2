"""What the checks know of an adapter: its modules, each read once, and how they fit the base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, final

import numpy as np

from loralens.analysis.checks.low_bit import CodesPrediction
from loralens.analysis.checks.merge_effect import MergeEffect, Reason
from loralens.analysis.spectrum import Spectrum
from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.messages import quote_word
from loralens.core.names import is_expert_alone
from loralens.core.naming.base_model import BaseModel
from loralens.core.naming.selection import select
from loralens.core.structured import Update
from loralens.core.threads import Step
from loralens.errors import FormatError
from loralens.linalg.factor import Floats

# Suffixes of adapters that are one file. A suggested output keeps the suffix, because it decides the container.
SUFFIXES = (".safetensors", ".bin", ".gguf")


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """Statistics of one factor along its rank: of the rows of A, or the columns of B.

    Attributes
    ----------
    lengths : float64 array, shape (r,)
        Euclidean lengths of the rows of A, or the columns of B.
    skew : float
        Largest |cosine| between two of these vectors that are not 0; it is 0 if they are orthogonal.
    zeros : float
        Share of the entries that are exactly 0, in [0, 1].
    unevenness : float
        Standard deviation of the lengths along the other axis, the columns of A or the rows of B, over their mean. It
        is 0 if all inputs, or outputs, take part equally.
    dead : int
        The number of columns of A, or rows of B, that are exactly 0.
    largest : float
        Largest |entry|.
    digest : int
        Python's hash of the numbers and their dtype: another one in every process, and equal for other numbers with a
        chance of 2⁻⁶⁴. Those of hashlib would load OpenSSL, which takes 4 MB.
    """

    lengths: Array
    skew: float
    zeros: float
    unevenness: float = 0.0
    dead: int = 0
    largest: float = 0.0
    digest: int = 0


@final
@dataclass(frozen=True, slots=True)
class ModuleReading:
    """What one pass over the numbers of a module has measured.

    Attributes
    ----------
    spectrum : Spectrum or None
        None if a factor holds NaN or Inf.
    B, A : Factor or None
        None if the update is not a pair, or has no spectrum.
    """

    module: Update
    spectrum: Spectrum | None
    B: Factor | None = None
    A: Factor | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """An adapter that was read once, with everything that the checks need.

    Attributes
    ----------
    path : str
        The path as the user wrote it, for messages and commands.
    readings : mapping of str to ModuleReading
        The chosen modules, in natural order.
    merge_effects : mapping of str to MergeEffect
        The effect of merging each module into its weight; empty without a base.
    unmatched : mapping of str to pair of str
        Modules without a weight in the base → the reason and a fix. A reason for all modules is under the key "".
    non_finite_weights : mapping of str to int
        Modules whose weight in the base holds NaN or Inf → the number of such entries.
    to : str
        The dialect in which a suggested command has to write the adapter; empty if its own dialect can be written.
    reading : str
        The options with which the adapter was read, quoted for a shell; suggested commands repeat them.
    named : BaseModel
        The base that the adapter names.
    base : BaseModel or None
        The base that the adapter is checked against.
    codes : CodesPrediction or None
        The expected effect of a merge into the codes of a low-bit base.
    """

    path: str
    adapter: Adapter
    readings: Mapping[str, ModuleReading]
    merge_effects: Mapping[str, MergeEffect] = field(default_factory=dict)
    unmatched: Mapping[str, Reason] = field(default_factory=dict)
    non_finite_weights: Mapping[str, int] = field(default_factory=dict)
    to: str = ""
    reading: str = ""
    named: BaseModel = field(default_factory=lambda: BaseModel(""))
    base: BaseModel | None = None
    codes: CodesPrediction | None = None

    @property
    def quoted(self) -> str:
        """The path, quoted for a shell."""
        return quote_word(self.path)

    def sibling(self, word: str) -> str:
        """A path next to this one for the output of a suggested command, quoted for a shell."""
        path = PurePath(self.path)
        # Only known suffixes are kept at the end: a folder may be called adapter-v1.5.
        if path.name in ("", ".."):  # such as the current folder, which has no name to extend
            return quote_word(str(path / ".." / f"adapter-{word}"))
        name = f"{path.stem}-{word}{path.suffix}" if path.suffix in SUFFIXES else f"{path.name}-{word}"
        return quote_word(str(path.with_name(name)))

    def command(self, verb: str, *arguments: str) -> str:
        """The `loralens` command line that runs a verb on this adapter."""
        return " ".join(["loralens", verb, self.quoted, *arguments, *([self.reading] if self.reading else [])])

    def compress(self, word: str, rule: str) -> str:
        """The command line that compresses this adapter into a file next to it, which PEFT can load."""
        to = ["--to", self.to] if self.to else []
        # PEFT joins experts that are modules of their own into one stack, which has one rank.
        uniform = ["--uniform"] if any(map(is_expert_alone, self.adapter)) else []
        return self.command("compress", "-o", self.sibling(word), rule, *uniform, *to)

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """Spectra of the modules without NaN and Inf."""
        return {name: one.spectrum for name, one in self.readings.items() if one.spectrum is not None}

    @property
    def pairs(self) -> dict[str, ModuleReading]:
        """The modules whose pair is finite and not 0."""
        return {
            name: one for name, one in self.readings.items() if one.A and one.spectrum and one.spectrum.spectral > 0
        }

    def setting(self, key: str) -> Any:
        """A field of the configuration of the adapter; None if it is not there."""
        return (self.adapter.config or {}).get(key)


def examine_adapter(
    adapter: Adapter,
    path: str,
    *,
    modules: Sequence[str] = (),
    to: str = "",
    reading: str = "",
    step: Step | None = None,
) -> Examination:
    """Read an adapter once, module by module, without keeping its factors. ``step`` is called with 1 after each.

    Raises
    ------
    OptionError
        A glob that matches nothing.
    """
    readings = {}
    for name in select(adapter, modules):
        readings[name] = _read_module(adapter[name])
        if step:
            step(1)
    return Examination(path=path, adapter=adapter, readings=readings, to=to, reading=reading)


def _read_module(module: Update) -> ModuleReading:
    try:
        # A structured update has no factors along its rank whose statistics the checks could use.
        if not isinstance(module, LowRank):
            return ModuleReading(module, Spectrum(module.singular_values(), module.shape, module.rank))
        loaded = module.load()
        spectrum = Spectrum(loaded.singular_values(), loaded.shape, loaded.rank)
    except FormatError:  # the only error of this arithmetic is one about NaN or Inf
        return ModuleReading(module, None)
    # B transposed, so that both factors have their directions as rows. The module itself is kept unread.
    return ModuleReading(module, spectrum, _factor_statistics(loaded.B.T), _factor_statistics(loaded.A))


def _factor_statistics(X: Array) -> Factor:
    """The statistics of the rows of X (r, n)."""
    # The dtype is part of the hash: zeros of two dtypes with entries of one size have equal bytes.
    digest = hash((X.tobytes(), str(X.dtype)))
    X = X.astype(np.float64)
    largest = float(np.abs(X).max(initial=0.0))
    zeros = 1 - np.count_nonzero(X) / max(X.size, 1)
    # Entries are divided by the largest one, and the result is scaled back below.
    if largest:
        X = X / largest  # the squares of numbers below 1e-162 underflow to 0
    # These are the norms, mean and deviation of NumPy, whose wrappers take longer than the sums for small factors.
    squares = X * X
    lengths, across = np.sqrt(np.add.reduce(squares, axis=1)), np.sqrt(np.add.reduce(squares, axis=0))
    # Rows of 0 have no direction.
    unit = X[lengths > 0] / lengths[lengths > 0, None]
    cosines = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 0.0)
    return Factor(
        lengths=lengths * largest,
        skew=float(cosines.max(initial=0.0)),
        zeros=zeros,
        unevenness=_unevenness(across) if largest else 0.0,
        dead=across.size - int(np.count_nonzero(X.any(axis=0))),
        largest=largest,
        digest=digest,
    )


def _unevenness(values: Floats) -> float:
    """The standard deviation of some values, relative to their mean."""
    mean = np.add.reduce(values) / values.size
    deviations = values - mean
    return float(np.sqrt(np.add.reduce(deviations * deviations) / values.size) / mean)
