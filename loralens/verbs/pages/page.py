"""The page of a report: reads the adapters, measures them, and assembles the document."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import nan
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from loralens.analysis.amplification import measure_amplification
from loralens.analysis.diagnosis import Examination
from loralens.analysis.doctor import run_checks
from loralens.analysis.intruders import Intruders, find_intruders
from loralens.analysis.merge_effect import Base, MergeEffect, bf16_errors, find_weights
from loralens.analysis.spectrum import Group, by_block, by_kind
from loralens.charts.amplification_charts import full_rank_rows
from loralens.compression.truncation_plan import CurvePoint
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.messages import note, progress, warn
from loralens.core.model_in_memory import ModelPath
from loralens.core.stored import Moments
from loralens.core.threads import processor_count
from loralens.core.together import magnitudes
from loralens.core.weights import Weight
from loralens.errors import LoraLensError, MismatchError, place
from loralens.formats.records.results import StoredEvaluation, load_moments, read_evaluation
from loralens.formats.records.training import RunCheckpoint, read_run
from loralens.linalg.device import Device
from loralens.reporting.document import Report
from loralens.reporting.make import make_report
from loralens.reporting.sentences import name_on_page
from loralens.reporting.subject import (
    BaseMeasurements,
    CheckpointRun,
    Collection,
    Dialect,
    Subject,
    measure_collection,
    measure_run,
    measure_subject,
)
from loralens.tables.numbers import count, or_blank, percent
from loralens.tables.table import Column, Columns, Row, Table
from loralens.verbs.comparisons.pair_similarity import Pair
from loralens.verbs.comparisons.similarity import adapter_pairs_table, pairs_by_cosine
from loralens.verbs.comparisons.trajectory import CheckpointRow, run_table
from loralens.verbs.files.output import AdapterTarget, file_saving, source_bytes
from loralens.verbs.pages.learned import with_explanations
from loralens.verbs.shared.adapters import AdapterSource, find_source, labels, load_source, short_labels
from loralens.verbs.shared.examination import examine_adapters, open_base
from loralens.verbs.shared.module_groups import OUTLIER_COLUMNS, group_by_kind, groups_table
from loralens.verbs.shared.options import Reading, SvdCaching
from loralens.verbs.sizes.curve import point_columns
from loralens.verbs.spectra.amplify import COLUMNS as AMPLIFY_COLUMNS
from loralens.verbs.spectra.amplify import KeptDirections, medians_table
from loralens.verbs.spectra.decompositions import decompositions, duration, svd_cache, svd_seconds
from loralens.verbs.spectra.intruders import kinds_table
from loralens.verbs.spectra.spectrum import COLUMNS as SPECTRUM_COLUMNS
from loralens.verbs.spectra.spectrum import ModuleSpectrum

# Seconds that the SVDs of the base may take without --intruders. The documentation promises "about a minute".
PATIENCE = 60.0
MOMENTS = "moments"  # the name, in messages and JSON, of activations that were given as an object
THREADS = processor_count()  # modules are independent of each other, so all cores can share the work


def report_page(
    sources: Sequence[AdapterSource],
    *,
    base: ModelPath | None,
    activations: Sequence[str | PathLike[str] | Moments],
    evaluations: Sequence[str | PathLike[str]],
    modules: Sequence[str],
    intruders: bool | None,
    explain: bool | None,
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
    counts = [len(adapter) for adapter in adapters.values()]
    # A comparison visits every common module twice: once for the pairs, and once for the interference.
    steps = sum(counts) + (2 * max(counts) if len(adapters) > 1 else 0)
    with progress("measuring", steps) as step:
        subjects = []
        for examination, label, against in zip(examinations, short_labels(list(adapters)), measured, strict=True):
            path, adapter = examination.path, examination.adapter
            file, own_moments = moments.get(path, ("", None))
            form, source = AdapterTarget(base=base).form(adapter), by_label[path]
            subject = measure_subject(
                examination,
                label,
                Dialect(form.name, form.encode, form.one_rank),
                file_bytes=None if isinstance(source, Adapter) else source_bytes(source, adapter, form),
                moments=own_moments,
                activations=file,
                against_base=against or BaseMeasurements(),
                threads=THREADS,
                step=step,
            )
            subjects.append(replace(subject, tables=subject_tables(subject)))
            if file and not subject.on_data:
                warn(f"{path}: activations are not used because some modules hold NaN or Inf")
        together = measure_collection(subjects, threads=THREADS, step=step) if len(subjects) > 1 else None
        run = _checkpoint_run(subjects) if together else None
    if base is not None and model is not None:
        subjects = with_explanations(subjects, base, model, explain)
    del model  # its tensors have long names, and all that is needed of them is measured
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
    with place(base.name), progress("reading the base", len(weights)) as step:
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


OUTLIERS = 20  # outliers that are listed: the least likely ones, which come first


class KindMerges(NamedTuple):
    """One row: the predicted merges of all modules of a kind."""

    kind: str
    effects: Sequence[MergeEffect]


def subject_tables(subject: Subject) -> dict[str, Table[Any]]:
    """The tables of an adapter, as `loralens.reporting.subject.Subject` names them."""
    against, outliers = subject.against_base, subject.examination.outliers[:OUTLIERS]
    # Four digits, because the shares at ranks near the full rank all begin with 99 and differ in the digits after it.
    kept: Column[CurvePoint] = Column(
        "kept",
        lambda point: 1 - point.uniform.error**2,
        "output kept" if subject.on_data else "energy kept",
        partial(percent, digits=4),
        bar=True,
    )
    points = point_columns(subject.dialect.name, on_data=subject.on_data)
    return {
        "modules": _modules(subject),
        "kinds": _groups("kind", by_kind(subject.spectra)),
        "blocks": _groups("block", by_block(subject.spectra)),
        "outliers": Table("Outliers among modules of the same kind and shape", OUTLIER_COLUMNS, outliers),
        "ranks": Table("Every rank", _insert_after(points, ("uniform", "bytes"), kept), subject.points),
        "amplification": medians_table("Amplification by kind", full_rank_rows(against.amplified)),
        "intruders": kinds_table("Intruders by kind", against.intruders),
        "merges": Table(
            "Merge by kind",
            MERGE_COLUMNS,
            [KindMerges(*own) for own in group_by_kind(subject.merge_effects).items()],
        ),
    }


def _modules(subject: Subject) -> Table[str]:
    """The modules of an adapter: the table of ``spectrum``, with columns for the base where one was given."""
    against, effects = subject.against_base, subject.merge_effects
    amplified = {
        name: KeptDirections(name, against.amplified[name], row)
        for name, row in full_rank_rows(against.amplified).items()
    }
    rows = {name: ModuleSpectrum(subject.path, name, subject.adapter[name], x) for name, x in subject.spectra.items()}
    energy: Column[str] = Column(
        "energy_share", subject.shares.get, "energy", percent, about="share of the adapter's ‖ΔW‖²", bar=True
    )
    columns = _insert_after([column.of(rows.get) for column in SPECTRUM_COLUMNS], "frobenius", energy)
    # Without a base, or where they were not looked for, columns of dashes would only widen the table.
    if amplified:
        # The two that say most: how much more ΔW does than W along its directions, and whether that is chance.
        shown = [column for column in AMPLIFY_COLUMNS if column.title and column.key in ("amplification", "z")]
        columns += [column.of(amplified.get) for column in shown]
    # The JSON of a module has these measurements against the base as objects of their own, with more in them.
    if against.intruders:
        columns.append(
            Column("intruders", lambda x: (own := against.intruders.get(x)) and own.count, "intruders", json=False)
        )
    if effects:
        ratio: Column[MergeEffect] = Column("relative_norm", "ratio", "‖ΔW‖/‖W‖", percent, json=False)
        about = "predicted, as a share of ‖ΔW‖"
        error: Column[MergeEffect] = Column(
            "merge_error", "rounding.error", "merge error", percent, json=False, about=about
        )
        columns += [ratio.of(effects.get), error.of(effects.get)]
    return Table(subject.label, columns, list(rows))


def _insert_after(columns: Sequence[Column[Row]], key: str | tuple[str, ...], new: Column[Row]) -> list[Column[Row]]:
    """The columns with a new one behind that of a key."""
    place = [column.key for column in columns].index(key) + 1
    return [*columns[:place], new, *columns[place:]]


def _groups(what: str, groups: Sequence[Group]) -> Table[Group]:
    """Kinds or blocks as ``spectrum`` lists them, without the column of zeros where there are none."""
    table = groups_table(what, groups)
    # The column of bars made of letters is for terminals; the page draws its own behind the numbers.
    left_out = {"share"} if any(group.zero for group in groups) else {"share", "zero"}
    columns = [column for column in table.columns if column.key not in left_out]
    return replace(table, title=f"By {what}", columns=columns)


def pairs_table(labels: Sequence[str], collection: Collection) -> Table[Pair]:
    """Pairs as ``similarity`` lists them, on both sides, the largest |cosine| first."""
    pairs = collection.pairs
    return adapter_pairs_table("Pairs", pairs, labels, ("out", "in"), pairs_by_cosine(pairs))


def checkpoints_table(labels: Sequence[str], run: CheckpointRun) -> Table[CheckpointRow]:
    """Checkpoints as ``trajectory`` lists them, in the order of their steps."""
    names = [labels[i] for i in run.order]
    # The names are those of the other sections, which may be longer than those of `loralens trajectory`.
    checkpoints = tuple(RunCheckpoint(Path(name), step) for name, step in zip(names, run.steps, strict=True))
    return run_table("Checkpoints", replace(run.log, checkpoints=checkpoints), names, run.trajectory.points)


def quality_table_of(evaluation: StoredEvaluation, subjects: Sequence[Subject]) -> tuple[StoredEvaluation, Table[Any]]:
    """An evaluation under the names of the page, and its table as ``evaluate`` shows it, with parameters if known."""
    # With the code that reads texts and models, and few reports have evaluations.
    from loralens.verbs.runs.evaluate import Evaluation, quality_table

    evaluation = replace(evaluation, adapters=[name_on_page(row, subjects) for row in evaluation.adapters])
    # NaN is what the result itself holds where there was nothing to predict; every row has the measures of the first.
    names = evaluation.adapters[0].measures
    rows = [
        Evaluation(
            row.path, {name: nan if (x := row.measures.get(name)) is None else x for name in names}, row.parameters
        )
        for row in evaluation.adapters
    ]
    table = quality_table(f"{evaluation.model}, {count(evaluation.texts, 'text')} of {evaluation.data}", rows)
    known = any(row.parameters is not None for row in rows)
    columns = [
        replace(column, title="parameters", text=or_blank("{:,}".format))
        if known and column.key == "parameters"
        else column
        for column in table.columns
    ]
    return evaluation, replace(table, columns=columns)


# Columns for which one bad module spoils a merge show the worst module of a kind; the others show the median.
MERGE_COLUMNS: Columns[KindMerges] = (
    Column("kind", "kind", "kind", align="left"),
    Column("modules", "effects.len", "modules"),
    Column("relative_norm", lambda row: median(x.ratio for x in row.effects), "‖ΔW‖/‖W‖", percent, about="median"),
    Column(
        "gain",
        lambda row: min(x.rounding.gain for x in row.effects),
        "least strength",
        percent,
        about="⟨W'−W, ΔW⟩/‖ΔW‖² of the worst module",
    ),
    Column("error", lambda row: max(x.rounding.error for x in row.effects), "largest error", percent),
    Column(
        "unmoved",
        lambda row: median(x.rounding.unmoved for x in row.effects),
        "unmoved",
        percent,
        about="median share of weights that keep their value",
    ),
)
