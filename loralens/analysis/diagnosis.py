"""What the checks of the doctor get, an `Examination`, and what they return: diagnoses, grouped by cause."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any, final

from loralens.analysis.merge_effect import MergeEffect, Reason
from loralens.analysis.readings import ModuleReading
from loralens.analysis.spectrum import Outlier, Spectrum, find_outliers
from loralens.choices import Level
from loralens.core.adapter import Adapter
from loralens.core.base_model import BaseModel
from loralens.core.messages import quote_word
from loralens.core.names import is_expert_alone
from loralens.errors import spell
from loralens.tables.table import Keys, Recorded

LEVELS: tuple[Level, ...] = ("error", "warning", "note")  # most serious first
ALONE = 3  # up to so many findings of one code without a module are shown one by one; more have one common cause


@final
@dataclass(frozen=True, slots=True)
class Diagnosis(Recorded):
    """The result of one check about one module or the whole adapter.

    Attributes
    ----------
    level : str
        ``error``: the adapter does not work as it is. ``warning``: it may not do what was meant. ``note``: information.
    code : str
        The stable name of this kind of finding, for programs.
    evidence : str
        What was measured, in words.
    fix : str
        A command or one sentence that says what to do; empty if nothing needs to be done.
    module : str or None
        None if the finding is about the whole adapter.
    adapter : str
        The path of the adapter, as it was given.
    """

    level: Level
    code: str
    evidence: str
    fix: str = ""
    module: str | None = None
    adapter: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fix", spell(self.fix))

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "level",
            "code",
            "adapter",
            "module",
            "evidence",
            "fix",
        )


def by_cause(findings: Iterable[Diagnosis]) -> list[list[Diagnosis]]:
    """Groups of findings with one cause, in the order of the first finding of each group.

    Findings of one level, code and adapter form a group if they are about modules, or if there are more than `ALONE`.
    Of other findings, those with equal texts form a group.
    """
    findings = list(findings)
    loose = Counter((finding.level, finding.code, finding.adapter) for finding in findings if not finding.module)
    groups: dict[tuple[str, ...], list[Diagnosis]] = {}
    for finding in findings:
        cause = (finding.level, finding.code, finding.adapter)
        # Many findings without a module, such as one for each odd tensor, have one cause too.
        together = finding.module or loose[cause] > ALONE
        key = (*cause, "") if together else (finding.level, finding.code, finding.evidence, finding.fix, "")
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def share(count: int, of: int) -> str:
    """``all 12 modules``, ``3 of 12 modules``, ``the only module``."""
    if of == 1 == count:
        return "the only module"
    return f"all {of} modules" if count == of else f"{count} of {of} modules"


# Suffixes of adapters that are one file. A suggested output keeps the suffix, because it decides the container.
SUFFIXES = (".safetensors", ".bin", ".gguf")


@final
@dataclass(frozen=True, slots=True)
class CodesPrediction:
    """The expected effect of a merge into codes, for all modules together and for every module.

    Attributes
    ----------
    layouts : str
        The layouts of the weights.
    gain, noise : float
        The expected gain, and the noise of one stochastic rounding relative to the update.
    own_error : float or None
        The expected error in the input directions of the update, relative to it; None if an update is not a pair.
    changed, clipped : float
        The shares of codes that are expected to change, and to stop at the end of their range.
    mean_move : float
        The mean move of a code that the adapter requires, in steps.
    noises : mapping of str to float
        The noise of every module.
    base : str
        The base as the user wrote it, for a suggested command.
    """

    layouts: str
    gain: float
    noise: float
    own_error: float | None
    changed: float
    clipped: float
    mean_move: float
    noises: Mapping[str, float] = field(default_factory=dict)
    base: str = ""


# Without slots: the cached properties keep their values in the dictionary of the object, as many checks ask for them.
@final
@dataclass(frozen=True, kw_only=True)
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
    base_tensors : collection of str
        The names of the tensors of that base.
    codes : CodesPrediction or None
        The expected effect of a merge into the codes of a low-bit base.
    saving : callable, optional
        This examination and a share of the energy → the share of the file that `compress` to this energy would save;
        None where the size of that file is not known.
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
    base_tensors: Collection[str] = ()
    codes: CodesPrediction | None = None
    saving: "Saving | None" = None

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

    def writes(self, verb: str, word: str, *arguments: str) -> str:
        """The command line that runs a verb on this adapter and writes the result next to it."""
        return self.command(verb, "-o", self.sibling(word), *arguments, *(["--to", self.to] if self.to else []))

    def compress(self, word: str, rule: str) -> str:
        """The command line that compresses this adapter into a file next to it, which PEFT can load."""
        return self.writes("compress", word, rule, *(["--uniform"] if self.needs_one_rank else []))

    @property
    def needs_one_rank(self) -> bool:
        """Whether a smaller adapter needs one rank for all modules to be loaded."""
        # PEFT joins experts that are modules of their own into one stack, and mlx-lm reads one rank for all layers.
        return self.adapter.format == "mlx" or any(map(is_expert_alone, self.adapter))

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """Spectra of the modules without NaN and Inf."""
        return {name: one.spectrum for name, one in self.readings.items() if one.spectrum is not None}

    @cached_property
    def pairs(self) -> dict[str, ModuleReading]:
        """The modules whose pair is finite and not 0."""
        return {
            name: one for name, one in self.readings.items() if one.A and one.spectrum and one.spectrum.spectral > 0
        }

    @cached_property
    def outliers(self) -> list[Outlier]:
        """The modules that stand out from their kind (`find_outliers`)."""
        return find_outliers(self.spectra)

    def setting(self, key: str) -> Any:
        """A field of the configuration of the adapter; None if it is not there."""
        return (self.adapter.config or {}).get(key)


Saving = Callable[[Examination, float], float | None]
