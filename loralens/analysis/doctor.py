"""The diagnosis of adapters: all checks are run, and their findings are sorted by level."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from loralens.analysis.checks import CHECKS
from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis
from loralens.analysis.checks.examination import Examination, examine_adapter
from loralens.analysis.checks.merge_effect import Base, find_weights, merge_effects
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.naming.base_model import BaseModel
from loralens.core.threads import Step
from loralens.errors import place

UNREADABLE = "unreadable"

# Codes for files that cannot be loaded, and so never reach a check.
OTHERS = {UNREADABLE: "The file cannot be read as an adapter: it is damaged, not downloaded, or something else."}


def examine_all(
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
) -> list[Examination]:
    """Read every adapter, once or twice and without keeping its factors, and collect what `run_checks` needs.

    Parameters
    ----------
    adapters : mapping of str to Adapter
        Path → adapter, preferably loaded with ``strict=False``, so that files with wrong numbers are examined too.
    base : Base, optional
        The base model. Names, shapes and rounding are checked against its weights, with at most 2¹⁸ entries of each.
    dtype : str, optional
        The dtype of a merge; by default that of each weight, as in `loralens merge`.
    stochastic : bool
        Whether the merge rounds stochastically instead of to the nearest number.
    modules : sequence of str
        Globs over module names or kinds; all modules where empty.
    only_read : collection of str
        Dialects that cannot be written. Suggested commands convert such adapters to PEFT.
    reading : str
        The options with which the adapters were read, quoted for a shell. Suggested commands repeat them.
    named : mapping of str to BaseModel, optional
        Path → the base that the adapter names; by default only its name is known.
    step : callable, optional
        Called with 1 after every module was read, and again for every module that is compared with its weight.

    Raises
    ------
    OptionError
        A glob matches nothing.
    """
    exams = []
    for path, adapter in adapters.items():
        with place(path):
            # A suggested command writes a file, which these dialects do not allow.
            to = "peft" if adapter.format in only_read else ""
            exam = examine_adapter(adapter, path, modules=modules, to=to, reading=reading, step=step)
        exam = replace(exam, named=(named or {}).get(path) or BaseModel.of(adapter.base_model))
        exams.append(_match_base(exam, base, dtype=dtype, stochastic=stochastic, step=step) if base else exam)
    return exams


def run_checks(exams: Sequence[Examination]) -> list[Diagnosis]:
    """Run all checks on every adapter, and on two or more adapters together.

    The findings come by level, the most serious first, then in the order of `CHECKS`, then with the worst module first.
    The thresholds of a check, and their reasons, are in its file. Every check was tested on published adapters and does
    not report those that are in order.
    """
    diagnoses: list[Diagnosis] = []
    for check in CHECKS:
        if check.single:
            diagnoses += [replace(diagnosis, adapter=exam.path) for exam in exams for diagnosis in check.single(exam)]
        if check.several and len(exams) > 1:
            diagnoses += check.several(exams)
    # Sorting is stable, so within a level the order of the checks stays.
    return sorted(diagnoses, key=lambda diagnosis: LEVELS.index(diagnosis.level))


def diagnosis_codes() -> dict[str, str]:
    """Code → its meaning, for every check and for files that cannot be read. Codes of readers are not included."""
    return {code: text for check in CHECKS for code, text in check.codes.items()} | OTHERS


def _match_base(
    exam: Examination, base: Base, *, dtype: str | None, stochastic: bool, step: Step | None
) -> Examination:
    """Add what the base shows: modules without a weight, weights with NaN, and the effects of merging the others."""
    if any(module.layout.rows for module in exam.adapter.modules.values()):
        # The base could not say the order of the rows either, so a merge would change the wrong rows of W.
        fix = "give a base whose folder has a config.json with its numbers of heads"
        findings = tuple(
            replace(finding, level="error", fix=fix) if finding.code == "rows-permuted" else finding
            for finding in exam.adapter.findings
        )
        exam = replace(exam, adapter=replace(exam.adapter, findings=findings))
    modules = {name: reading.module for name, reading in exam.readings.items()}
    weights, unmatched = find_weights(modules, base)
    # DoRA modules get no merge effect, because merging them changes W by more than ΔW.
    dora = magnitudes(exam.adapter)
    plain = {name: weight for name, weight in weights.items() if name not in dora}
    effects, non_finite = merge_effects(
        modules, exam.spectra, plain, base, dtype=dtype, stochastic=stochastic, step=step
    )
    return replace(
        exam,
        merge_effects=effects,
        unmatched=unmatched,
        non_finite_weights=non_finite,
        base=base.model,
        base_tensors=base.tensors.keys(),
    )
