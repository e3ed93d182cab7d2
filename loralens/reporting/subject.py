"""What was measured for a report: one adapter, and several adapters together, as pairs or as checkpoints of one run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import hypot, isfinite
from pathlib import Path
from typing import Any, final

from loralens.analysis.amplification import Amplification
from loralens.analysis.diagnosis import Examination
from loralens.analysis.every_pair import Pairwise, cluster_order, connected_groups, pairwise
from loralens.analysis.interacting_pairs import Interaction, Interference, find_interactions, interference
from loralens.analysis.intruders import Intruders
from loralens.analysis.merge_effect import MergeEffect
from loralens.analysis.spectrum import Spectrum, total_norm
from loralens.analysis.trajectory import Trajectory, measure_trajectory
from loralens.analysis.two_adapters import Comparison, compare_subspaces
from loralens.charts.spec import LineChart
from loralens.compression.loss import losses, total_error
from loralens.compression.truncation_plan import CurvePoint, TruncationPlan, rank_curve, recommended_point
from loralens.core.adapter import Adapter
from loralens.core.ranks import Rule
from loralens.core.stored import Moments
from loralens.core.threads import Step
from loralens.errors import LoraLensError, MismatchError, place
from loralens.formats import stored_size
from loralens.formats.files.container import Files, Stored
from loralens.formats.records.training import Run
from loralens.reporting.document import PageTable
from loralens.tables.table import Column, Table

# Pairs whose φ(i, j) is drawn: those of largest |cosine|. Each takes two rows of heat maps on the page.
PAIRS = 6
# Tables that need a click to be seen where they have more rows than these.
OPEN = {"blocks": 0, "outliers": 0, "ranks": 16, "modules": 60}


@final
@dataclass(frozen=True, slots=True)
class Dialect:
    """The dialect in which a smaller adapter would be written.

    ``write`` gives the tensors and the header of the file of an adapter; no number of a tensor is computed until it is
    read. ``one_rank`` says whether a file can only have one rank for all modules.
    """

    name: str
    write: Callable[[Adapter], tuple[Stored, Files]]
    one_rank: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BaseMeasurements:
    """An adapter measured against the weights of its base.

    Attributes
    ----------
    intruders : mapping of str to Intruders
        Empty where they were not looked for; ``no_intruders`` is the reason.
    bf16_errors : mapping of str to float
        Module name → the error that a merge into bfloat16 would have, as a share of ‖ΔW‖.
    """

    amplified: Mapping[str, Amplification] = field(default_factory=dict)
    intruders: Mapping[str, Intruders] = field(default_factory=dict)
    no_intruders: str = ""
    bf16_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def intruder_counts(self) -> tuple[int, int]:
        """The number of leading directions of W + ΔW that were tested, and of intruders among them."""
        return sum(x.s.size for x in self.intruders.values()), sum(x.count for x in self.intruders.values())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What an adapter learned, as `loralens explain` says it.

    Attributes
    ----------
    paragraphs : sequence of str
        The strength and the lists of words; or the reason why they are missing.
    chart : LineChart or None
        The words by their change.
    table : Table or None
        All words.
    record : mapping
        The explanation in JSON; empty if there is none.
    """

    paragraphs: Sequence[str]
    chart: LineChart | None = None
    table: Table[Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


# Without slots: the cached properties keep their values in the dictionary of the object.
@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """One adapter with its measurements.

    Attributes
    ----------
    path : str
        As the user gave it.
    label : str
        Its name on the page.
    examination : Examination
        The adapter as the doctor read it, with the predicted merge of each module where a base was given.
    adapter : Adapter
        The chosen modules that hold finite numbers: only these are measured.
    non_finite : sequence of str
        Modules that are left out because they hold NaN or Inf.
    dialect : Dialect
        How a smaller adapter would be written.
    points : sequence of CurvePoint
        Size and error at every rank, from the highest down to 1; empty where there is nothing to choose, for the
        reason ``no_plan``.
    on_data : bool
        Whether errors are measured on real inputs.
    activations : str
        The file of these inputs' second moments; empty without one.
    positions : int
        The largest number of inputs that any module saw; 0 without ``activations``.
    update_error : float or None
        ‖ΔW−ΔW'‖/‖ΔW‖ at the recommended rank, where the other errors are those on inputs (``on_data``).
    file_bytes : int or None
        The size of the file that was read; None for an adapter in memory.
    tables : mapping of str to Table
        Its tables as other verbs show them: ``modules``, ``kinds``, ``blocks``, ``outliers``, ``ranks``, and against a
        base ``amplification``, ``intruders`` and ``merges``.
    learned : Learned or None
        None if nobody expects the base to be run.
    """

    path: str
    label: str
    examination: Examination
    adapter: Adapter
    non_finite: Sequence[str]
    spectra: Mapping[str, Spectrum]
    no_plan: str
    dialect: Dialect
    points: Sequence[CurvePoint]
    on_data: bool
    activations: str = ""
    positions: int = 0
    update_error: float | None = None
    against_base: BaseMeasurements = field(default_factory=BaseMeasurements)
    file_bytes: int | None = None
    tables: Mapping[str, Table[Any]] = field(default_factory=dict)
    learned: Learned | None = None

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return total_norm(self.spectra.values())

    @cached_property
    def shares(self) -> dict[str, float]:
        """Module name → its share of the energy, in [0, 1]."""
        return {
            # Divided first: the square of a large norm may not be a float.
            name: (spectrum.frobenius / self.norm) ** 2 if self.norm else 0.0
            for name, spectrum in self.spectra.items()
        }

    @property
    def merge_effects(self) -> Mapping[str, MergeEffect]:
        """Module name → the predicted effect of a merge into the weight of the base."""
        return self.examination.merge_effects

    @property
    def worst_merge(self) -> str:
        """The module whose merge has the largest predicted error; there must be one."""
        return max(self.merge_effects, key=lambda name: self.merge_effects[name].rounding.error)

    @property
    def strength(self) -> float | None:
        """‖ΔW‖/‖W‖ of all modules that have a weight in the base, as one number; None without such a weight."""
        amplified = self.against_base.amplified
        weight = hypot(*(amplified[name].weight_norm for name in amplified))
        return hypot(*(self.spectra[name].frobenius for name in amplified)) / weight if weight else None

    @property
    def bf16_loss(self) -> float | None:
        """‖W'−W−ΔW‖/‖ΔW‖ of all modules together, where W' is W + ΔW rounded to bfloat16; None without a base."""
        errors = self.against_base.bf16_errors
        norms = {name: self.spectra[name].frobenius for name in errors}
        total = hypot(*norms.values())
        return hypot(*(errors[name] * norms[name] for name in errors)) / total if total else None

    @property
    def recommended(self) -> CurvePoint | None:
        """The rank for all modules that is recommended, see `recommended_point`; None where there is no plan."""
        return recommended_point(self.points)

    @property
    def bytes_before(self) -> int:
        """The size of the file that was read, or of a file of the highest rank; there must be a point."""
        return self.points[0].uniform.bytes if self.file_bytes is None else self.file_bytes

    @property
    def highest(self) -> CurvePoint | None:
        """The point of the highest rank, at which nothing is lost."""
        return self.points[0] if self.points else None


def measure_subject(
    examination: Examination,
    label: str,
    dialect: Dialect,
    *,
    moments: Moments | None = None,
    activations: str = "",
    threads: int = 1,
    step: Step | None = None,
    **known: Any,
) -> Subject:
    """Measure one adapter: spectra, and the size and error of every rank.

    With second moments of real inputs, which come from the file ``activations``, ranks are chosen by the error on these
    inputs. ``step`` is called with 1 after every module. ``known`` are other attributes of the subject.

    Raises
    ------
    MismatchError
        The moments belong to another adapter.
    """
    non_finite = [name for name, reading in examination.readings.items() if reading.spectrum is None]
    spectra = examination.spectra
    # Checked even where they are not used below: activations of another adapter are a mistake in any case.
    if moments is not None:
        moments.check(examination.adapter)
    # Errors on inputs are those of the whole adapter, and modules with NaN or Inf have none.
    used = None if non_finite else moments
    adapter = examination.adapter.without([name for name in examination.adapter if name not in spectra])
    # The plan has the modules that were not chosen too: they stay in the file, so they count in its size.
    finite, points, update_error = examination.adapter.without(non_finite), list[CurvePoint](), None
    no_plan = "every ΔW is 0" if spectra else "no module is left to choose ranks for"
    try:
        with place(examination.path):
            if spectra:
                # The doctor has computed the singular values already.
                plan = (
                    TruncationPlan.of_values(finite, {k: x.s for k, x in spectra.items()}, threads=threads, step=step)
                    if used is None
                    else TruncationPlan.of(finite, modules=list(spectra), moments=used, threads=threads, step=step)
                )
                points = rank_curve(plan, size=lambda x: stored_size(*dialect.write(x)), one_rank=dialect.one_rank)
                if used is not None and (best := recommended_point(points)):
                    ranks = plan.ranks(Rule("rank", best.rank), one_rank=dialect.one_rank)
                    update_error = total_error(losses(adapter, plan.at(ranks)))
    except LoraLensError as error:  # a dialect that cannot hold a smaller adapter
        points, no_plan = [], error.what
    return Subject(
        path=examination.path,
        label=label,
        examination=examination,
        adapter=adapter,
        non_finite=non_finite,
        spectra=spectra,
        no_plan=no_plan,
        dialect=dialect,
        points=points,
        on_data=used is not None,
        activations=activations if used is not None else "",
        positions=max((x.count for _, x in used.items()), default=0) if used is not None else 0,
        update_error=update_error,
        **known,
    )


def joined_tables(subjects: Sequence[Subject], key: str) -> list[PageTable]:
    """The tables of one kind of several adapters as one, whose first column names the adapter.

    Side by side the tables of three adapters would be cut on a page of 1280 pixels. Tables whose headings differ, as
    those of files in two dialects do, are not joined. Each of them then has the name of its adapter in its title.
    """
    filled = {subject.label: table for subject in subjects if (table := subject.tables.get(key)) and table.rows}
    tables = list(filled.values())
    if len({tuple(column.title for column in table.shown) for table in tables}) > 1:
        tables = [replace(table, title=f"{table.title}: {label}") for label, table in filled.items()]
    elif len(subjects) > 1 and tables:
        columns: list[Column[Any]] = [Column("adapter", "0", "adapter", align="left")]
        columns += [column.of(lambda row: row[1]) for column in tables[0].columns]
        rows = [(label, row) for label, table in filled.items() for row in table.rows]
        tables = [replace(tables[0], columns=columns, rows=rows)]
    longest = max((len(table.rows) for table in filled.values()), default=0)
    return [PageTable(table, folded=key in OPEN and longest > OPEN[key]) for table in tables]


@final
@dataclass(frozen=True, slots=True)
class Collection:
    """The comparison of every pair of several adapters.

    Attributes
    ----------
    order : sequence of int
        The adapters in the order of the clustering, in which similar ones stand side by side.
    conflicts, agreements : sequence of Interaction
        Where two adapters work against each other, and where in the same direction.
    compared : mapping of pair of int to Comparison
        The pairs whose φ(i, j) is drawn.
    families : sequence of sequence of int
        Groups of two or more adapters that were initialised with the same random A.
    table : Table or None
        The pairs as `loralens similarity` lists them.
    """

    pairs: Pairwise
    energy: Interference
    order: Sequence[int]
    conflicts: Sequence[Interaction]
    agreements: Sequence[Interaction]
    compared: Mapping[tuple[int, int], Comparison]
    families: Sequence[Sequence[int]]
    table: Table[Any] | None = None

    @property
    def cosines(self) -> dict[tuple[int, int], float]:
        """Every pair of adapters → the cosine of their updates, where neither of them is 0."""
        every = {(s, t): float(self.pairs.cosine[s, t]) for s, t in combinations(range(self.pairs.count), 2)}
        return {pair: cosine for pair, cosine in every.items() if isfinite(cosine)}

    @property
    def closest(self) -> tuple[int, int] | None:
        """The pair of largest |cosine|; None if all updates but one are 0."""
        return max(self.cosines, key=lambda pair: abs(self.cosines[pair]), default=None)


@final
@dataclass(frozen=True, slots=True)
class CheckpointRun:
    """The adapters as checkpoints of one training run.

    ``order`` has the adapters in the order of their steps, ``log`` the losses that the run has logged, and ``table``
    the checkpoints as `loralens trajectory` lists them.
    """

    trajectory: Trajectory
    order: Sequence[int]
    steps: Sequence[int]
    log: Run
    table: Table[Any] | None = None

    @property
    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """Name of each logged loss → its steps and values."""
        logs = (("loss", self.log.train), ("eval loss", self.log.evaluation))
        return {name: [(loss.step, loss.value) for loss in logged] for name, logged in logs if logged}


def measure_collection(subjects: Sequence[Subject], *, threads: int = 1, step: Step | None = None) -> Collection | None:
    """Compare every pair of two or more adapters; None where no two have a module in common.

    ``step`` is called with 1 after every module.
    """
    # Adapters of different models are not an error here, because the rest of the page describes each of them.
    adapters, paths = [subject.adapter for subject in subjects], [subject.path for subject in subjects]
    try:
        pairs = pairwise(adapters, labels=paths, threads=threads, step=step)
    except MismatchError:
        return None
    collection = Collection(
        pairs,
        interference(adapters, pairs.modules, threads=threads, step=step),
        cluster_order(pairs.cosine)[1],
        find_interactions(pairs, opposing=True),
        find_interactions(pairs, opposing=False),
        {},
        [group for group in connected_groups(pairs.shared_initialisation) if len(group) > 1],
    )
    # Of equal cosines the first pair is taken, so that the same report comes out every time. The pairs are then put
    # back in the order in which the adapters were given.
    cosines, compared = collection.cosines, {}
    for s, t in sorted(sorted(cosines, key=lambda pair: -abs(cosines[pair]))[:PAIRS]):
        holders = [module.holders[s] for module in pairs.modules if module.holders[t] is not None]
        names = [name for name in holders if name is not None]
        both = paths[s], paths[t]
        compared[s, t] = compare_subspaces(adapters[s], adapters[t], modules=names, labels=both, threads=threads)
    return replace(collection, compared=compared)


def measure_run(subjects: Sequence[Subject], log: Run, *, threads: int = 1) -> CheckpointRun | None:
    """The run of which these adapters are checkpoints; None where a step is unknown or there are several runs."""
    steps = {checkpoint.path: checkpoint.step for checkpoint in log.checkpoints}
    adapter_steps = [steps.get(Path(subject.path)) for subject in subjects]
    dated = sorted((step, i) for i, step in enumerate(adapter_steps) if step is not None)
    # If one step is unknown, the order of the checkpoints is unknown.
    if len(dated) < len(subjects) or len(subjects) < 2:
        return None
    order = [i for _, i in dated]
    adapters, labels = [subjects[i].adapter for i in order], [subjects[i].path for i in order]
    try:
        trajectory = measure_trajectory(adapters, labels=labels, threads=threads)
    except MismatchError:  # no two have a module in common
        return None
    # Checkpoints that began from different random factors belong to several runs. Their directions cannot be compared
    # with one last checkpoint.
    if len(trajectory.runs) > 1:
        return None
    return CheckpointRun(trajectory, order, [step for step, _ in dated], log)
