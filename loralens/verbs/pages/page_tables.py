"""The tables of other results on the page of a report, with the columns and titles that the page has."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loralens.analysis.amplification import KeptRank
from loralens.analysis.every_pair import Pairwise
from loralens.analysis.intruders import Intruders
from loralens.analysis.merge_effect import MergeEffect
from loralens.analysis.spectrum import Group
from loralens.charts.amplification import full_rank_rows
from loralens.compression.plan import CurvePoint
from loralens.formats.records.results import StoredEvaluation
from loralens.formats.records.training import RunCheckpoint
from loralens.reporting.collection import CheckpointRun
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, percent
from loralens.tables.table import Column, Row, Table
from loralens.verbs.comparisons.collection_similarity import Pair, adapter_pairs_table, pairs_by_cosine
from loralens.verbs.comparisons.trajectory import CheckpointRow, run_table
from loralens.verbs.shared.module_groups import OUTLIER_COLUMNS, groups_table
from loralens.verbs.sizes.curve import point_columns
from loralens.verbs.spectra.amplify import COLUMNS as AMPLIFY_COLUMNS
from loralens.verbs.spectra.amplify import KIND_COLUMNS, KeptDirections, KindAmplification
from loralens.verbs.spectra.intruders import KIND_COLUMNS as INTRUDER_KIND_COLUMNS
from loralens.verbs.spectra.intruders import IntruderTotal, KindIntruders
from loralens.verbs.spectra.spectrum import COLUMNS as SPECTRUM_COLUMNS
from loralens.verbs.spectra.spectrum import ModuleSpectrum

if TYPE_CHECKING:
    from loralens.verbs.runs.evaluate import Evaluation


class MeasuredModule(NamedTuple):
    """One row: a module with all its measurements."""

    name: str
    spectrum: ModuleSpectrum
    share: float
    amplified: KeptDirections | None
    intruders: Intruders | None
    effect: MergeEffect | None


def page_modules_table(subject: Subject) -> Table[MeasuredModule]:
    """The modules of an adapter: the table of ``spectrum``, with columns for the base where one was given."""
    against = subject.against_base
    amplified = full_rank_rows(against.amplified)
    rows = [
        MeasuredModule(
            name,
            ModuleSpectrum(subject.path, name, subject.adapter, spectrum),
            subject.shares[name],
            KeptDirections(name, against.amplified[name], amplified[name]) if name in amplified else None,
            against.intruders.get(name),
            subject.merge_effects.get(name),
        )
        for name, spectrum in subject.spectra.items()
    ]
    columns = _insert_after([column.of(lambda row: row.spectrum) for column in SPECTRUM_COLUMNS], "frobenius", ENERGY)
    if amplified:
        # The two that say most: how much more ΔW does than W along its directions, and whether that is chance.
        columns += [
            column.of(lambda row: row.amplified)
            for column in AMPLIFY_COLUMNS
            if column.title and column.key in ("amplification", "z")
        ]
    # Without a base, or where they were not looked for, columns of dashes would only widen the table.
    columns += [INTRUDERS] if against.intruders else []
    columns += MERGE_COLUMNS if subject.merge_effects else []
    return Table(subject.label, columns, rows)


def _insert_after(columns: Sequence[Column[Row]], key: str | tuple[str, ...], new: Column[Row]) -> list[Column[Row]]:
    """The columns with a new one behind that of a key."""
    place = [column.key for column in columns].index(key) + 1
    return [*columns[:place], new, *columns[place:]]


def ranks_table(subject: Subject) -> Table[CurvePoint]:
    """The ranks as ``curve`` lists them, with a column for the share of energy or output that is kept."""
    columns = point_columns(subject.dialect.name, on_data=subject.on_data)
    share = OUTPUT_KEPT if subject.on_data else ENERGY_KEPT
    return Table("Every rank", _insert_after(columns, ("uniform", "bytes"), share), subject.points)


def page_groups_table(what: str, groups: Sequence[Group]) -> Table[Group]:
    """Kinds or blocks as ``spectrum`` lists them, without the column of zeros where there are none."""
    table = groups_table(what, groups)
    # The column of bars made of letters is for terminals; the page draws its own behind the numbers.
    left_out = {"share"} if any(group.zero for group in groups) else {"share", "zero"}
    columns = [column for column in table.columns if column.key not in left_out]
    return replace(table, title=f"By {what}", columns=columns)


def amplification_table(kinds: Mapping[str, Sequence[KeptRank]]) -> Table[KindAmplification]:
    """Kinds as ``amplify`` lists them."""
    rows = [KindAmplification(name, members) for name, members in kinds.items()]
    return Table("Amplification by kind", KIND_COLUMNS, rows)


def intruders_table(kinds: Mapping[str, Sequence[Intruders]]) -> Table[KindIntruders]:
    """Kinds as ``intruders`` lists them."""
    rows = [KindIntruders(name, len(members), IntruderTotal.of(members)) for name, members in kinds.items()]
    return Table("Intruders by kind", INTRUDER_KIND_COLUMNS, rows)


def pairs_table(labels: Sequence[str], pairs: Pairwise) -> Table[Pair]:
    """Pairs as ``similarity`` lists them, on both sides, the largest |cosine| first."""
    return adapter_pairs_table("Pairs", pairs, labels, ("out", "in"), pairs_by_cosine(pairs))


def checkpoints_table(labels: Sequence[str], run: CheckpointRun) -> Table[CheckpointRow]:
    """Checkpoints as ``trajectory`` lists them, in the order of their steps."""
    names = [labels[i] for i in run.order]
    # The names are those of the other sections, which may be longer than those of `loralens trajectory`.
    checkpoints = tuple(RunCheckpoint(Path(name), step) for name, step in zip(names, run.steps, strict=True))
    return run_table("Checkpoints", replace(run.log, checkpoints=checkpoints), names, run.trajectory.points)


def page_quality_table(evaluation: StoredEvaluation) -> "Table[Evaluation]":
    """Adapters as ``evaluate`` lists them, with the number of their parameters where it is known."""
    # With the code that reads texts and models, and few reports have evaluations.
    from loralens.verbs.runs.evaluate import Evaluation, quality_table

    # NaN is what the result itself holds where there was nothing to predict; every row has the measures of the first.
    names = evaluation.adapters[0].measures
    rows = [
        Evaluation(
            row.path, {name: nan if (x := row.measures.get(name)) is None else x for name in names}, row.parameters
        )
        for row in evaluation.adapters
    ]
    table = quality_table(f"{evaluation.model}, {count(evaluation.texts, 'text')} of {evaluation.data}", rows)
    if all(row.parameters is None for row in rows):
        return table
    columns = [replace(x, title="parameters", text=_with_commas) if x.key == "parameters" else x for x in table.columns]
    return replace(table, columns=columns)


def _with_commas(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters:,}"


ENERGY: Column[MeasuredModule] = Column(
    "energy_share", lambda row: row.share, "energy", percent, about="share of the adapter's ‖ΔW‖²", bar=True
)
# The JSON of a module has these measurements against the base as objects of their own, with more in them.
INTRUDERS: Column[MeasuredModule] = Column(
    "intruders", lambda row: row.intruders and row.intruders.count, "intruders", json=False
)
MERGE_COLUMNS: tuple[Column[MeasuredModule], ...] = (
    Column("relative_norm", lambda row: row.effect and row.effect.ratio, "‖ΔW‖/‖W‖", percent, json=False),
    Column(
        "merge_error",
        lambda row: row.effect and row.effect.rounding.error,
        "merge error",
        percent,
        json=False,
        about="predicted, as a share of ‖ΔW‖",
    ),
)

# Four digits, because the shares at ranks near the full rank all begin with 99 and differ only in the digits after it.
ENERGY_KEPT: Column[CurvePoint] = Column(
    "kept", lambda point: 1 - point.uniform.error**2, "energy kept", partial(percent, digits=4), bar=True
)
OUTPUT_KEPT = replace(ENERGY_KEPT, title="output kept")

RESULT_TABLES = ResultTables(
    modules=page_modules_table,
    ranks=ranks_table,
    groups=page_groups_table,
    outliers=lambda rows: Table("Outliers among modules of the same kind and shape", OUTLIER_COLUMNS, rows),
    amplification=amplification_table,
    intruders=intruders_table,
    pairs=pairs_table,
    checkpoints=checkpoints_table,
    quality=page_quality_table,
)
