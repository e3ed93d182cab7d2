"""Patient: an adapter read once, and all that the checks ask about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, final

import numpy as np

from loralens.analysis.checks.base import Landing, Reason
from loralens.analysis.spectrum import Spectrum
from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import is_expert_alone, select
from loralens.core.naming.base_model import BaseModel
from loralens.core.shell import quoted
from loralens.core.structured import Update
from loralens.core.threads import Step
from loralens.errors import FormatError

SUFFIXES = (".safetensors", ".bin", ".gguf")  # of adapters that are a file, not a folder


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """One factor in its rank direction: rows of A, or columns of B.

    Attributes
    ----------
    lengths : float64 array, shape (r,)
        Euclidean lengths.
    skew : float
        Largest |cosine| between two of them that have a length: 0 where they are orthogonal.
    zeros : float
        Share of the entries that are exactly 0, in [0, 1].
    unevenness : float
        Spread of the lengths on the other axis over their mean: of the columns of A, or the rows of B. 0 where all
        inputs, or outputs, take part equally.
    dead : int
        Columns of A, or rows of B, that are exactly 0.
    largest : float
        Largest |entry|.
    digest : bytes
        Of the numbers and their dtype: equal only where all numbers are.
    """

    lengths: Array
    skew: float
    zeros: float
    unevenness: float = 0.0
    dead: int = 0
    largest: float = 0.0
    digest: bytes = b""


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over the numbers of a module showed.

    Attributes
    ----------
    module : LowRank or Structured
    spectrum : Spectrum or None
        None where a factor holds NaN or Inf.
    B, A : Factor or None
        None where there is no pair, or no spectrum.
    """

    module: Update
    spectrum: Spectrum | None
    B: Factor | None = None
    A: Factor | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """An adapter, read once.

    Attributes
    ----------
    path : str
        Where it is, as the user wrote it: for messages and commands.
    adapter : Adapter
    readings : mapping of str to Reading
        The modules asked for, in natural order.
    landings : mapping of str to Landing
        What the base's weight makes of a module; empty without a base.
    strays : mapping of str to pair of str
        Modules that find no weight in the base: why, and a fix; under "" where that is so of all of them.
    spoilt : mapping of str to int
        Modules whose weight in the base holds NaN or Inf, and how many.
    to : str
        The dialect that a command has to write it in; empty where its own will do.
    reading : str
        The options that it was read with, as a shell wants them: a command has to be given them too.
    named : BaseModel
        The base that it names.
    base : BaseModel or None
        The base that it is held against.
    """

    path: str
    adapter: Adapter
    readings: Mapping[str, Reading]
    landings: Mapping[str, Landing] = field(default_factory=dict)
    strays: Mapping[str, Reason] = field(default_factory=dict)
    spoilt: Mapping[str, int] = field(default_factory=dict)
    to: str = ""
    reading: str = ""
    named: BaseModel = field(default_factory=lambda: BaseModel(""))
    base: BaseModel | None = None

    @property
    def quoted(self) -> str:
        """The path as a shell wants it."""
        return quoted(self.path)

    def beside(self, word: str) -> str:
        """A path beside this one for what a command would make of it, as a shell wants it."""
        path = PurePath(self.path)
        if path.name in ("", ".."):  # a folder without a name of its own here, such as the one worked in
            return quoted(str(path / ".." / f"adapter-{word}"))
        name = f"{path.stem}-{word}{path.suffix}" if path.suffix in SUFFIXES else f"{path.name}-{word}"
        return quoted(str(path.with_name(name)))

    def command(self, verb: str, *arguments: str) -> str:
        """The command that does something with it."""
        return " ".join(["loralens", verb, self.quoted, *arguments, *([self.reading] if self.reading else [])])

    def compress(self, word: str, rule: str) -> str:
        """The command that writes it smaller, beside itself, so that PEFT can load it."""
        to = ["--to", self.to] if self.to else []
        uniform = ["--uniform"] if any(map(is_expert_alone, self.adapter)) else []  # PEFT joins such experts into one
        return self.command("compress", "-o", self.beside(word), rule, *uniform, *to)

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """Spectra of the modules that are finite."""
        return {name: one.spectrum for name, one in self.readings.items() if one.spectrum is not None}

    @property
    def pairs(self) -> dict[str, Reading]:
        """The modules whose pair is finite and not zero."""
        return {
            name: one for name, one in self.readings.items() if one.A and one.spectrum and one.spectrum.spectral > 0
        }

    def setting(self, key: str, default: Any = None) -> Any:
        """A field of the adapter's configuration."""
        return (self.adapter.config or {}).get(key, default)


def examine(
    adapter: Adapter,
    path: str,
    *,
    modules: Sequence[str] = (),
    to: str = "",
    reading: str = "",
    step: Step | None = None,
) -> Patient:
    """The adapter read once, module by module; its factors are not kept. ``step`` is called with 1 after every module.

    Raises
    ------
    OptionError
        A glob that matches nothing.
    """
    readings = {}
    for name in select(adapter, modules):
        readings[name] = _reading(adapter[name])
        if step:
            step(1)
    return Patient(path=path, adapter=adapter, readings=readings, to=to, reading=reading)


def _reading(module: Update) -> Reading:
    try:
        if not isinstance(module, LowRank):
            return Reading(module, Spectrum(module.singular_values(), module.shape, module.rank))
        loaded = module.load()
        spectrum = Spectrum(loaded.singular_values(), loaded.shape, loaded.rank)
    except FormatError:  # the one thing that arithmetic refuses: NaN or Inf
        return Reading(module, None)
    return Reading(module, spectrum, _factor(loaded.B.T), _factor(loaded.A))


def _factor(X: Array) -> Factor:
    """The `Factor` of the rows of X (r, n)."""
    digest = blake2b(X.tobytes() + str(X.dtype).encode(), digest_size=16).digest()
    X = X.astype(np.float64)
    largest = float(np.abs(X).max(initial=0.0))
    zeros = 1 - np.count_nonzero(X) / max(X.size, 1)
    if largest:
        X = X / largest  # squares of numbers below 1e-162 are 0
    lengths, across = np.linalg.norm(X, axis=1), np.linalg.norm(X, axis=0)
    unit = X[lengths > 0] / lengths[lengths > 0, None]
    cosines = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 0.0)
    return Factor(
        lengths=lengths * largest,
        skew=float(cosines.max(initial=0.0)),
        zeros=zeros,
        unevenness=float(across.std() / across.mean()) if largest else 0.0,
        dead=int(np.count_nonzero(~X.any(axis=0))),
        largest=largest,
        digest=digest,
    )
