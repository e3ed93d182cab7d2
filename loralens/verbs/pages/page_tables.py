"""The tables of other results on the page of a report, with the columns and titles that the page has."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from loralens.analysis.merge_effect import MergeEffect
from loralens.analysis.spectrum import Group, by_block, by_kind
from loralens.charts.amplification_charts import full_rank_rows
from loralens.compression.plan import CurvePoint
from loralens.formats.records.results import StoredEvaluation
from loralens.formats.records.training import RunCheckpoint
from loralens.reporting.sentences import name_on_page
from loralens.reporting.subject import CheckpointRun, Collection, Subject
from loralens.tables.numbers import count, or_blank, percent
from loralens.tables.table import Column, Columns, Row, Table
from loralens.verbs.comparisons.collection_similarity import adapter_pairs_table, pairs_by_cosine
from loralens.verbs.comparisons.pair_similarity import Pair
from loralens.verbs.comparisons.trajectory import CheckpointRow, run_table
from loralens.verbs.shared.module_groups import OUTLIER_COLUMNS, group_by_kind, groups_table
from loralens.verbs.sizes.curve import point_columns
from loralens.verbs.spectra.amplify import COLUMNS as AMPLIFY_COLUMNS
from loralens.verbs.spectra.amplify import KeptDirections, medians_table
from loralens.verbs.spectra.intruders import kinds_table
from loralens.verbs.spectra.spectrum import COLUMNS as SPECTRUM_COLUMNS
from loralens.verbs.spectra.spectrum import ModuleSpectrum

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
