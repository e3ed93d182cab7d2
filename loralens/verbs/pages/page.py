"""The page of a report: reads the adapters, measures them, and assembles the document."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from pathlib import Path

from loralens.analysis.amplification import measure_amplification, weight_steps
from loralens.analysis.diagnosis import Examination
from loralens.analysis.doctor import run_checks
from loralens.analysis.intruders import Intruders, find_intruders
from loralens.analysis.merge_effect import Base, bf16_errors, find_weights
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.messages import note, progress, warn
from loralens.core.stored import Moments
from loralens.core.threads import Step, processor_count
from loralens.core.together import magnitudes
from loralens.core.weights import Weight
from loralens.errors import LoraLensError, MismatchError, place
from loralens.formats.records.results import load_moments, read_evaluation
from loralens.formats.records.training import read_run
from loralens.linalg.device import Device
from loralens.reporting.document import Report
from loralens.reporting.make import make_report
from loralens.reporting.subject import (
    BaseMeasurements,
    CheckpointRun,
    Dialect,
    Subject,
    measure_collection,
    measure_run,
    measure_subject,
)
from loralens.verbs.files.output import AdapterTarget, file_saving, source_bytes
from loralens.verbs.pages.page_tables import checkpoints_table, pairs_table, quality_table_of, subject_tables
from loralens.verbs.shared.adapters import AdapterSource, find_source, labels, load_source, short_labels
from loralens.verbs.shared.examination import examine_adapters, open_base
from loralens.verbs.shared.options import Reading, SvdCaching
from loralens.verbs.spectra.decompositions import decompositions, duration, svd_cache, svd_seconds

# Seconds that the SVDs of the base may take without --intruders. The documentation promises "about a minute".
PATIENCE = 60.0
MOMENTS = "moments"  # the name, in messages and JSON, of activations that were given as an object
THREADS = processor_count()  # modules are independent of each other, so all cores can share the work


def report_page(
    sources: Sequence[AdapterSource],
    *,
    base: str | PathLike[str] | None,
    activations: Sequence[str | PathLike[str] | Moments],
    evaluations: Sequence[str | PathLike[str]],
    modules: Sequence[str],
    intruders: bool | None,
    reading: Reading,
    command: str,
) -> Report:
    """The document about these adapters; parameters as in `loralens.report`, and ``command`` as the page shows it."""
    by_label = dict(zip(labels(sources), (find_source(each)[0] for each in sources), strict=True))
    # Wrong numbers are not an error here, because the doctor reports them as findings.
    adapters = {label: load_source(source, reading, base=base, strict=False) for label, source in by_label.items()}
    moments = _moments(activations, adapters)
    stored = [read_evaluation(Path(file)) for file in evaluations]
    model = None if base is None else open_base(base)
    # The doctor reads every module once, and its spectra are those of the page.
    examinations = examine_adapters(
        adapters, base=model, modules=modules, reading=reading, saving=file_saving(by_label, base)
    )
    diagnoses = run_checks(examinations)
    measured = [_compare_with_base(examination, model, intruders) if model else None for examination in examinations]
    del model  # its tensors have long names, and all that is needed of them is measured
    counts = [len(adapter) for adapter in adapters.values()]
    # A comparison visits every common module twice: once for the pairs, and once for the interference.
    steps = sum(counts) + (2 * max(counts) if len(adapters) > 1 else 0)
    with progress("measuring", steps) as step:
        subjects = _measure_subjects(
            examinations, by_label, short_labels(list(adapters)), measured, moments, base, step
        )
        together = measure_collection(subjects, threads=THREADS, step=step) if len(subjects) > 1 else None
        run = _checkpoint_run(subjects) if together else None
    names = [subject.label for subject in subjects]
    return make_report(
        subjects,
        diagnoses,
        collection=together and replace(together, table=pairs_table(names, together)),
        run=run and replace(run, table=checkpoints_table(names, run)),
        evaluations=[quality_table_of(evaluation, subjects) for evaluation in stored],
        base=None if base is None else str(base),
        command=command,
        choices={
            "activations": [_name_of(file) for file in activations],
            "chosen": list(modules),
            "evaluations": [str(file) for file in evaluations],
        },
    )


def _measure_subjects(
    examinations: Sequence[Examination],
    sources: Mapping[str, AdapterSource],
    page_labels: Sequence[str],
    measured: Sequence[BaseMeasurements | None],
    moments: Mapping[str, tuple[str, Moments]],
    base: str | PathLike[str] | None,
    step: Step | None,
) -> list[Subject]:
    """Every adapter with its measurements, those on the inputs of its activations where there are some."""
    subjects: list[Subject] = []
    for examination, label, against in zip(examinations, page_labels, measured, strict=True):
        file, own_moments = moments.get(examination.path, ("", None))
        form, source = AdapterTarget(base=base).form(examination.adapter), sources[examination.path]
        subject = measure_subject(
            examination,
            label,
            Dialect(form.name, form.encode, form.one_rank),
            file_bytes=None if isinstance(source, Adapter) else source_bytes(source, examination.adapter, form),
            moments=own_moments,
            activations=file,
            against_base=against or BaseMeasurements(),
            threads=THREADS,
            step=step,
        )
        subjects.append(replace(subject, tables=subject_tables(subject)))
        if file and not subjects[-1].on_data:
            warn(f"{examination.path}: activations are not used because some modules hold NaN or Inf")
    return subjects


def _name_of(activations: str | PathLike[str] | Moments) -> str:
    return MOMENTS if isinstance(activations, Moments) else str(activations)


def _moments(
    activations: Sequence[str | PathLike[str] | Moments], adapters: Mapping[str, Adapter]
) -> dict[str, tuple[str, Moments]]:
    """Label of an adapter → the name and the moments of the activations that belong to it.

    Adapters without activations are named in a warning.

    Raises
    ------
    MismatchError
        Activations that belong to none of the adapters.
    """
    # If no activations were given for any adapter, there is nothing to warn about.
    if not activations:
        return {}
    measured = [(_name_of(file), file if isinstance(file, Moments) else load_moments(file)) for file in activations]
    # Moments are matched by fingerprint and not by order: they belong to the factors of one adapter alone.
    prints = {label: fingerprint(adapter) for label, adapter in adapters.items()}
    for name, moments in measured:
        if moments.fingerprint not in prints.values():
            raise MismatchError(
                f"{name}: these activations belong to another adapter: names, shapes or factors differ",
                fix="measure them with one of these: loralens calibrate",
            )
    owned = {label: pair for pair in measured for label, mark in prints.items() if mark == pair[1].fingerprint}
    for label in adapters:
        if label not in owned:
            warn(f"{label}: none of the activations belong to this adapter; its errors are those of ΔW")
    return owned


def _compare_with_base(examination: Examination, base: Base, intruders: bool | None) -> BaseMeasurements:
    """Measure the modules that have a weight in the base against it."""
    spectra = examination.spectra
    modules = {name: reading.module for name, reading in examination.readings.items() if name in spectra}
    # The doctor has reported the modules without a weight, and why they have none.
    weights, _ = find_weights(modules, base)
    device = Device.of("cpu", threads=THREADS)
    # Without the leading directions of W (top=False), which take longer and which only `loralens amplify` draws.
    with place(base.name), progress("reading the base", weight_steps(weights.values(), top=False)) as step:
        adapter = examination.adapter.without([name for name in examination.adapter if name not in weights])
        amplified = measure_amplification(adapter, weights, top=False, device=device, step=step) if weights else {}
    detected, reason = _intruders(examination, weights, base.name, intruders)
    with place(base.name):
        # Many bases of float32 are served in bfloat16, so the page states the error in bfloat16 for every dtype of the
        # base.
        rounded = bf16_errors(modules, spectra, weights, examination.merge_effects)
    return BaseMeasurements(amplified=amplified, intruders=detected, no_intruders=reason, bf16_errors=rounded)


def _intruders(
    examination: Examination, weights: Mapping[str, Weight], base: str, search: bool | None
) -> tuple[dict[str, Intruders], str]:
    """The intruders of all modules, or the reason why they were not looked for."""
    if search is False:
        return {}, "--no-intruders was given"
    dora = magnitudes(examination.adapter)
    plain = {name: weight for name, weight in weights.items() if name not in dora}
    if not plain:
        # Without any weight the section itself says so.
        return {}, "its modules use DoRA, whose tuned weight is not W + ΔW" if weights else ""
    device = Device.of("cpu")
    if search is None:
        # An estimate from the size of the weights, and from how fast this machine multiplies.
        seconds = svd_seconds(plain.values(), device)
        if seconds > PATIENCE:
            reason = f"the SVD of {len(plain)} weights of the base would take about {duration(seconds)}"
            note(f"{examination.path}: intruders were not looked for, as {reason}; --intruders looks for them")
            return {}, f"{reason} (loralens report --intruders looks for them, and stores the SVDs)"
    new = {}
    # Closed so that its progress ends after an error too.
    with closing(decompositions(plain, svd_cache(SvdCaching()), base, device)) as bases:
        for name, W in bases:
            with place(examination.path), place(name):
                new[name] = find_intruders(examination.adapter[name], W).without_vectors()  # only counted here
    return new, ""


def _checkpoint_run(subjects: Sequence[Subject]) -> CheckpointRun | None:
    """The run of which the adapters are checkpoints, or None."""
    try:
        log = read_run([Path(subject.path) for subject in subjects])
    except LoraLensError:  # two checkpoints of one step, or a state that cannot be read
        return None
    return measure_run(subjects, log, threads=THREADS)
