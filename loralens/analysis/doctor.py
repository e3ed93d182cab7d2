"""What is wrong with adapters, most serious first."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from loralens.analysis.checks import CHECKS
from loralens.analysis.checks.base import Base, Merging, find, landings
from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis
from loralens.analysis.checks.patient import Patient, examine
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.naming.base_model import BaseModel
from loralens.core.threads import Step
from loralens.errors import place

UNREADABLE = "unreadable"

# Of files that no check sees.
OTHERS = {UNREADABLE: "The file cannot be read as an adapter: it is damaged, not downloaded, or something else."}


def diagnose(
    adapters: Mapping[str, Adapter],
    *,
    base: Base | None = None,
    dtype: str | None = None,
    stochastic: bool = False,
    modules: Sequence[str] = (),
    only_read: Collection[str] = (),
    reading: str = "",
    named: Mapping[str, BaseModel] | None = None,
    step: Step | None = None,
) -> list[Diagnosis]:
    """Everything that the checks find, most serious first, then in the order of `CHECKS`, then the worst module first.

    Parameters
    ----------
    adapters : mapping of str to Adapter
        Path → adapter, best loaded with ``strict=False``. Two or more are also compared with each other.
    base : Base, optional
        Names, sizes and rounding are then checked against its weights, from at most 2¹⁸ entries of each.
    dtype : str, optional
        The dtype of a merge; that of each weight by default, as in `loralens merge`.
    stochastic : bool
        The merge rounds stochastically, and not to the nearest.
    modules : sequence of str
        Globs over module names or kinds; all modules where empty.
    only_read : collection of str
        Dialects that cannot be written: commands that mend an adapter of theirs write it as PEFT's.
    reading : str
        Options that the adapters were read with, as a shell wants them: commands that mend them repeat them.
    named : mapping of str to BaseModel, optional
        Path → what is known of the base that the adapter names; its name alone by default.
    step : callable, optional
        Called with 1 after every module was read.

    Raises
    ------
    OptionError
        A glob that matches nothing.

    Notes
    -----
    The factors are read once or twice and not kept. Every check has its thresholds and their reasons in its file; each
    was held against adapters that people published, and says nothing of those that are well.
    """
    patients = examined(
        adapters,
        base=base,
        dtype=dtype,
        stochastic=stochastic,
        modules=modules,
        only_read=only_read,
        reading=reading,
        named=named,
        step=step,
    )
    return findings(patients)


def examined(
    adapters: Mapping[str, Adapter],
    *,
    base: Base | None = None,
    dtype: str | None = None,
    stochastic: bool = False,
    modules: Sequence[str] = (),
    only_read: Collection[str] = (),
    reading: str = "",
    named: Mapping[str, BaseModel] | None = None,
    step: Step | None = None,
) -> list[Patient]:
    """The adapters, each read once: what `findings` looks at. Parameters and errors as those of `diagnose`."""
    patients, merging = [], Merging(dtype, stochastic)
    for path, adapter in adapters.items():
        with place(path):
            to = "peft" if adapter.format in only_read else ""
            patient = examine(adapter, path, modules=modules, to=to, reading=reading, step=step)
        patient = replace(patient, named=(named or {}).get(path) or BaseModel.of(adapter.base_model))
        patients.append(_laid(patient, base, merging) if base else patient)
    return patients


def findings(patients: Sequence[Patient]) -> list[Diagnosis]:
    """What the checks find, most serious first; of two or more also what they have in common."""
    diagnoses: list[Diagnosis] = []
    for check in CHECKS:
        if check.one:
            diagnoses += [replace(diagnosis, adapter=p.path) for p in patients for diagnosis in check.one(p)]
        if check.all and len(patients) > 1:
            diagnoses += check.all(patients)
    return sorted(diagnoses, key=lambda diagnosis: LEVELS.index(diagnosis.level))


def rules() -> dict[str, str]:
    """Code → what it means: of every check, and of files that cannot be read. The readers' codes are their own."""
    return {code: text for check in CHECKS for code, text in check.rules.items()} | OTHERS


def _blamed(adapter: Adapter) -> Adapter:
    """The adapter whose rows the base could not put in order: that is an error, as they would go to wrong rows of W."""
    fix = "give a base whose folder has a config.json that says its heads"
    marked = [replace(one, level="error", fix=fix) if one.code == "rows-permuted" else one for one in adapter.findings]
    return replace(adapter, findings=tuple(marked))


def _laid(patient: Patient, base: Base, merging: Merging) -> Patient:
    """The patient against the base. What a merge makes of DoRA, which moves all of W, is not foretold from ΔW."""
    modules = {name: one.module for name, one in patient.readings.items()}
    if any(module.layout.rows for module in patient.adapter.modules.values()):
        patient = replace(patient, adapter=_blamed(patient.adapter))
    weights, strays = find(modules, base)
    bent = magnitudes(patient.adapter)
    plain = {name: weight for name, weight in weights.items() if name not in bent}
    landed, spoilt = landings(modules, patient.spectra, plain, merging, base)
    return replace(patient, landings=landed, strays=strays, spoilt=spoilt, base=base.model)
