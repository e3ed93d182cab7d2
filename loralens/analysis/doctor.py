"""The doctor: the table of all checks, their run on adapters, and their findings by level."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from loralens.analysis.base_checks import (
    find_different_bases,
    find_dominating_updates,
    find_lossy_merges,
    find_other_base,
    find_unmatched_modules,
    predict_merge_into_codes,
)
from loralens.analysis.damage_checks import (
    find_copies,
    find_dead_sides,
    find_missing_modules,
    find_non_finite,
    find_swapped_factors,
    find_zero_updates,
)
from loralens.analysis.diagnosis import LEVELS, Diagnosis, Examination
from loralens.analysis.learning_checks import (
    find_random_spectra,
    find_shared_initialisations,
    find_spikes,
    find_unused_rank,
    report_outliers,
)
from loralens.analysis.loading_checks import (
    find_client_errors,
    find_foreign_code,
    find_missing_head,
    report_reader_findings,
)
from loralens.analysis.merge_effect import Base, find_weights, merge_effects
from loralens.analysis.readings import read_module
from loralens.analysis.strength_checks import (
    find_combining_bug,
    find_joined_pairs,
    find_weighted_sums,
    find_wrong_scales,
)
from loralens.core.adapter import Adapter
from loralens.core.base_model import BaseModel
from loralens.core.selection import select
from loralens.core.threads import Step
from loralens.core.together import magnitudes
from loralens.errors import place


@final
@dataclass(frozen=True, slots=True)
class Check:
    """A check: code → what it means and why it matters; and the function that checks one adapter, or several together.

    The diagnoses of a function for several adapters name their ``adapter``.
    """

    codes: Mapping[str, str]
    single: Callable[[Examination], Iterable[Diagnosis]] | None = None
    several: Callable[[Sequence[Examination]], Iterable[Diagnosis]] | None = None


# Findings of one level are reported in this order: what makes a file unusable comes before what makes it wasteful.
CHECKS: tuple[Check, ...] = (
    Check(
        {
            "non-finite": "A tensor holds NaN or Inf: every output of a model with this adapter will be NaN.",
            "base-non-finite": "A weight of the base holds NaN or Inf: its outputs are NaN with any adapter and "
            "without one.",
        },
        find_non_finite,
    ),
    Check(
        {
            "head-missing": "The task or the class needs a head that a pretrained base does not have, and the file "
            "does not have it either. PEFT refuses to load such a file, or predicts with a head of random numbers.",
        },
        find_missing_head,
    ),
    Check(
        {
            "factors-swapped": "B and A seem to be exchanged, so that ΔW is another matrix (its transpose, if the "
            "factors were transposed too). A starts at random, and its rows stay equally long and reach all inputs "
            "alike. B starts at zero, and stays shorter and more uneven.",
        },
        find_swapped_factors,
    ),
    Check(
        {
            "base-mismatch": "The base has no weight of this name and shape. Servers skip such modules without a "
            "message, so that the adapter does less than it should, or nothing.",
        },
        find_unmatched_modules,
    ),
    Check(
        {
            "base-differs": "The adapter names another base than this one. Even if names and shapes match, "
            "measurements and merges with this base mean nothing.",
        },
        find_other_base,
    ),
    Check(
        {
            "bases-differ": "The adapters belong to different bases. An update has a meaning only for the weights "
            "that it was trained on, so comparisons between them have none.",
        },
        several=find_different_bases,
    ),
    Check({}, report_reader_findings),  # readers have codes of their own, whose texts explain themselves
    Check(
        {
            "foreign-code": "The configuration names code that other software imports, and so runs, when it loads "
            "the adapter.",
        },
        find_foreign_code,
    ),
    Check(
        {
            "client": "A program that commonly loads adapters of this dialect refuses this one, or leaves out a part "
            "of it. This is an error if all of these programs do, else a note.",
        },
        find_client_errors,
    ),
    Check(
        {
            "zero-update": "B or A is all zero, so the module adds nothing: it was never trained, or was trained and "
            "not saved. Or both are so small that their product is lost.",
        },
        find_zero_updates,
    ),
    Check(
        {
            "module-missing": "A module is missing that all other blocks have: it was lost when the adapter was "
            "saved or converted, or it was left out on purpose.",
        },
        find_missing_modules,
    ),
    Check(
        {
            "module-copied": "A module has the same B and the same A as another one: one was written over the other.",
            "factor-copied": "A module has the B or the A of another one, although the others have their own.",
            "factor-shared": "Many modules share one B or one A. That is a design (VeRA, a frozen or tied A, the "
            "parts of a fused projection), or every module was started from one seed.",
        },
        find_copies,
    ),
    Check(
        {
            "dead-rows": "Rows of B are exactly zero: these outputs are never moved. A shard was not saved, the "
            "tensor was padded, or they were pruned on purpose.",
            "dead-columns": "Columns of A are exactly zero, although A starts at random: these inputs are never "
            "read. A shard was not saved, the tensor was padded, or they were pruned on purpose.",
        },
        find_dead_sides,
    ),
    Check(
        {
            "scale-zero": "The scale is 0, so the module adds nothing; α = 0 means 0 to some programs and r to others.",
            "scale-negative": "The scale is negative: the update is taken off instead of added.",
            "scale-large": "The scale is larger than training uses. α may have been set for another rank, applied "
            "twice, or taken as the scale itself.",
            "scale-small": "The scale is very small: the α of another rank, or kohya's default of 1 at a high rank.",
            "scale-is-alpha": "The configuration's scale is its α, not α/r: some MLX tools used α as the multiplier.",
        },
        find_wrong_scales,
    ),
    Check(
        {
            "svd-combined": "PEFT's add_weighted_adapter with combination_type='svd' (and with the ties and dare "
            "variants of it) applied α/r of the sources twice from 0.8 to at least 0.19.1; 0.21.2 does not. This is "
            "a suspicion, because one file cannot show the sources.",
            "rslora-combined": "PEFT's add_weighted_adapter sets α = r and keeps use_rslora, so the result is √r too "
            "strong, up to 0.21.2 at least.",
        },
        find_combining_bug,  # PEFT #1364 to 9a267b2, #3449
    ),
    Check(
        {
            "concat-alpha": "Adapters that were joined side by side (sd-scripts' --concat) keep the α of the first, "
            "while the rank becomes the sum of all ranks. Everything is then too weak by the ratio of the ranks.",
            "split-qkv-alpha": "A fused projection trained in parts (split_qkv) is stored as one pair with a "
            "block-diagonal B whose α is that of one part: every program then applies 1/3 or 1/4 of what was trained.",
        },
        find_joined_pairs,  # sd-scripts #839, #868
    ),
    Check(
        {
            "near-copy": "Two adapters have nearly the same update, up to its strength: checkpoints of one run, or "
            "one adapter that was saved twice with a change.",
            "combination": "The adapter is a weighted sum of others that were given.",
            "combination-scale": "The adapter is a weighted sum of others, with a factor that known bugs leave: α/r "
            "applied twice (PEFT svd, 0.8 to 0.19.1 at least), √r too strong (PEFT with rsLoRA), or the α of the "
            "first source at the summed rank (sd-scripts --concat).",
        },
        several=find_weighted_sums,
    ),
    Check(
        {
            "update-dominates": "‖ΔW‖ exceeds ‖W‖: the update replaces the weight rather than adapting it. Possible "
            "causes are a scale that is applied twice, the wrong base and a training run that diverged.",
        },
        find_dominating_updates,
    ),
    Check(
        {
            "random-spectrum": "The singular values are as flat as those of random factors of the same norm: nothing "
            "was learned, the factors were initialised at random and never trained, or noise was added.",
        },
        find_random_spectra,
    ),
    Check(
        {
            "below-rounding": "‖ΔW‖ is smaller than the error of rounding W to the dtype of the merge, in which the "
            "base may already be stored. The effect of the module is lost in that error.",
            "merge-lossy": "A merge into weights of this dtype rounds much of the update away, or hides it in the "
            "error of rounding W itself. The merged model is then not the base with the adapter.",
        },
        find_lossy_merges,
    ),
    Check(
        {
            "codes-merge": "What `loralens merge --bits keep` is expected to do: the strength that arrives in the "
            "codes of the base, the noise relative to the update, and the codes that change.",
            "codes-weak": "The update is weak compared with a step of the codes of the base: its noise in the merged "
            "model is more than 15 times the update.",
        },
        predict_merge_into_codes,
    ),
    Check(
        {
            "shared-initialisation": "Adapters that were trained from one seed share the initialisation of A. Overlaps "
            "of A, or of the in side of ΔW, then show the seed and not the tasks.",
        },
        several=find_shared_initialisations,
    ),
    Check(
        {
            "outlier": "‖ΔW‖ of the module is at least four times, or at most a quarter, of what the other modules "
            "of its kind and shape suggest for its depth: the run diverged there, or the module was scaled or "
            "damaged afterwards.",
        },
        report_outliers,
    ),
    Check(
        {
            "spike": "One direction holds nearly all of the energy of a module of rank 4 or more. Good runs end like "
            "this too, those at low learning rates most often.",
        },
        find_spikes,
    ),
    Check(
        {
            "rank-impossible": "The rank is larger than the number of rows or columns of the weight, so that some "
            "directions can never have an effect.",
            "rank-unused": "Nearly all of the energy lies in far fewer directions than the rank allows. A smaller "
            "file, and cheaper products, would have the same effect.",
        },
        find_unused_rank,
    ),
)

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
            readings = {}
            for name in select(adapter, modules):
                readings[name] = read_module(adapter[name])
                if step:
                    step(1)
        known = (named or {}).get(path) or BaseModel.of(adapter.base_model)
        exam = Examination(path=path, adapter=adapter, readings=readings, to=to, reading=reading, named=known)
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
