"""What is wrong with adapters, most serious first."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from loralens.analysis.checks import CHECKS
from loralens.analysis.checks.base import Base, find, landings
from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis
from loralens.analysis.checks.patient import Patient, examine
from loralens.core.adapter import Adapter
from loralens.errors import place

UNREADABLE = "unreadable"

# Of files that no check sees.
OTHERS = {UNREADABLE: "The file cannot be read as an adapter: it is damaged, not downloaded, or something else."}


def diagnose(
    adapters: Mapping[str, Adapter],
    *,
    base: Base | None = None,
    dtype: str | None = None,
    modules: Sequence[str] = (),
    only_read: Collection[str] = (),
) -> list[Diagnosis]:
    """Everything that the checks find, most serious first, then in the order of `CHECKS`, then the worst module first.

    Parameters
    ----------
    adapters : mapping of str to Adapter
        Path → adapter, best loaded with ``strict=False``. Two or more are also compared with each other.
    base : Base, optional
        Names, sizes and rounding are then checked against its weights, from 8,192 entries of each.
    dtype : str, optional
        The dtype of a merge; that of the base by default.
    modules : sequence of str
        Globs over module names or kinds; all modules where empty.
    only_read : collection of str
        Dialects that cannot be written: commands that mend an adapter of theirs write it as PEFT's.

    Raises
    ------
    OptionError
        A glob that matches nothing.

    Notes
    -----
    The factors are read once or twice and not kept. Every check has its thresholds and their reasons in its file; each
    was held against adapters that people published, and says nothing of those that are well.
    """
    patients = []
    found: list[Diagnosis] = []
    for path, adapter in adapters.items():
        with place(path):
            patient = examine(adapter, path, modules=modules, to="peft" if adapter.format in only_read else "")
        if base:
            patient = _laid(patient, base, dtype)
        patients.append(patient)
    for check in CHECKS:
        if check.one:
            found += [replace(one, adapter=p.path) for p in patients for one in check.one(p)]
        if check.all and len(patients) > 1:
            found += check.all(patients)
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def rules() -> dict[str, str]:
    """Code → what it means: of every check, and of files that cannot be read. The readers' codes are their own."""
    return {code: text for check in CHECKS for code, text in check.rules.items()} | OTHERS


def _laid(patient: Patient, base: Base, dtype: str | None) -> Patient:
    """The patient against the base."""
    modules = {name: one.module for name, one in patient.readings.items()}
    weights, strays = find(modules, base)
    return replace(patient, landings=landings(modules, patient.spectra, weights, dtype), strays=strays)
