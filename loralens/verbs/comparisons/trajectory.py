"""The verb ``trajectory``: follows one run through its checkpoints, and lists the losses that it logged."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

from loralens.analysis.spectrum import Spectrum, mean_effective_rank, total_norm
from loralens.analysis.trajectory import SETTLED, Trajectory, TrajectoryPoint, measure_trajectory, trajectory_steps
from loralens.choices import Side
from loralens.core.adapter import Adapter
from loralens.core.messages import progress, tell_findings, warn
from loralens.core.selection import select
from loralens.core.threads import processor_count
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.formats import load
from loralens.formats.files.json_text import finite_number
from loralens.formats.records.training import (
    TRAINER_STATE,
    LoggedLoss,
    LoggedSnapshot,
    Run,
    RunCheckpoint,
    is_watch_log,
    nearest_loss,
    read_run,
    read_watch_log,
)
from loralens.tables.numbers import SIDES, UNDEFINED, JsonMatrix, count, fixed, number, or_blank
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.shared.adapters import AdapterSource, Source, check_unread, labels, sources, warn_of_bases
from loralens.verbs.shared.options import ModuleChoice, Reading
from loralens.watching.snapshots import defined_mean


class WatchedSnapshot(NamedTuple):
    """One row: a snapshot, and the measures of the chosen modules together; NaN for a measure that is not defined.

    ``drift``, φ, its chance level and the effective rank are means over modules, the cosine is that of the whole
    update with the snapshot before.
    """

    step: int
    frobenius: float
    spectral: float
    effective_rank: float
    drift: float
    step_length: float
    cosine: float
    phi_out: float
    phi_in: float
    chance_out: float
    chance_in: float
    gradient_b: float
    gradient_a: float
    warnings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, repr=False)
class WatchedResult(ResultSequence[WatchedSnapshot]):
    """A watched run: its snapshots in order of steps. ``len`` is their number, and iteration is over them."""

    contents = "rows"

    path: Path
    rows: tuple[WatchedSnapshot, ...]
    modules: int

    @property
    def warnings(self) -> list[Mapping[str, Any]]:
        """All warnings in the order of steps, each with its ``step``."""
        return [{**warning, "step": row.step} for row in self.rows for warning in row.warnings]

    def tables(self) -> list[Table[WatchedSnapshot]]:
        """The snapshots, one a row; the columns of gradients are left out if none were watched."""
        title = f"{count(len(self), 'snapshot')} at {count(self.modules, 'module')}, in order of steps"
        watched = any(isfinite(row.gradient_b) for row in self.rows)
        columns = [column for column in COLUMNS if watched or not str(column.key).startswith("gradient")]
        return [Table(title, columns, self.rows)]

    def listing(self) -> list[Table[WatchedSnapshot]]:
        """The same table with all columns, so that every run has the same CSV columns."""
        return [Table("", COLUMNS, self.rows)]

    def conclusion(self) -> list[str]:
        """How far the update has come, whether it still turns, and the warnings."""
        lines = list(self.on_run)
        for warning in self.warnings:
            lines += [
                f"Step {warning['step']}: {warning['text']} ({warning['code']}).",
                f"  fix: {warning['fix']}",
            ]
        return lines if self.warnings else [*lines, "No snapshot gave a warning."]

    @property
    def on_run(self) -> list[str]:
        """How far the update has come, and whether it still turns."""
        last = self.rows[-1]
        if not last.frobenius:
            return [f"ΔW is still 0 after step {last.step}."]
        text = f"At step {last.step} ‖ΔW‖ is {number(last.frobenius)} and the effective rank "
        lines = [f"{text}{fixed('.2f')(last.effective_rank)} on average."]
        if isfinite(last.cosine):
            lines.append(f"The cosine with the snapshot before is {fixed('.3f')(last.cosine)}.")
        return lines

    @property
    def warned(self) -> list[str]:
        """The code of every warning with its step."""
        return [f"{warning['code']} at step {warning['step']}" for warning in self.warnings]

    def sentences(self) -> list[str]:
        """How to read the columns."""
        compared = [row for row in self.rows if isfinite(row.chance_out)]
        if not compared:
            return []
        out, in_ = compared[-1].chance_out, compared[-1].chance_in
        return [f"φ: with the snapshot before; chance level out {number(out)}, in {number(in_)}"]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("log", "path"),
            "modules",
            rows_key("snapshots", COLUMNS, source="rows"),
            Column("warnings", type=({"code": str, "step": int, "modules": list[str], "text": str, "fix": str},)),
        )


def watch_log_of(adapters: Sequence[AdapterSource]) -> Path | None:
    """The log of a watched run, if the only adapter that a verb was given is the path of one."""
    source = adapters[0]
    path = None if len(adapters) > 1 or isinstance(source, Adapter) else Path(source)
    return path if path is not None and is_watch_log(path) else None


def read_watched(path: Path, modules: Sequence[str]) -> WatchedResult:
    """Read the log of a watched run, and add up the chosen modules.

    Raises
    ------
    FormatError
        The file is not such a log.
    OptionError
        A glob matches nothing, or the log has no snapshots.
    """
    snapshots = read_watch_log(path)
    with place(path):
        if not snapshots:
            raise OptionError("holds no snapshots yet", fix="wait for the first snapshot of the run")
        names = set(select(dict.fromkeys(name for each in snapshots for name in each.modules), modules))
    return WatchedResult(path, tuple(_row(snapshot, names) for snapshot in snapshots), len(names))


def _row(snapshot: LoggedSnapshot, names: Collection[str]) -> WatchedSnapshot:
    modules = [module for name, module in snapshot.modules.items() if name in names]
    spectra = [Spectrum(module.s, module.shape, module.rank) for module in modules]
    norm = total_norm(spectra)

    def measured(*keys: str) -> list[float]:
        """The numbers at nested keys of the modules; NaN where there is none."""
        found = [finite_number(reduce(_item, keys, module.measures)) for module in modules]
        return [nan if value is None else value for value in found]

    before = measured("previous", "norm")
    inner = zip(measured("previous", "cosine"), before, (spectrum.frobenius for spectrum in spectra), strict=True)
    length_before = _length(before)
    # The cosine of the whole update with that of the snapshot before, from those of the modules.
    products = [cosine * length * own for cosine, length, own in inner if not isnan(length)]
    cosine = sum(products) / (norm * length_before) if norm and length_before > 0 else nan
    return WatchedSnapshot(
        step=snapshot.step,
        frobenius=norm,
        spectral=max((spectrum.spectral for spectrum in spectra), default=0.0),
        effective_rank=mean_effective_rank(spectra),
        drift=defined_mean(measured("drift")),
        step_length=_length(measured("previous", "length")),
        cosine=cosine,
        phi_out=defined_mean(measured("previous", "phi", "out")),
        phi_in=defined_mean(measured("previous", "phi", "in")),
        chance_out=defined_mean(measured("previous", "chance", "out")),
        chance_in=defined_mean(measured("previous", "chance", "in")),
        gradient_b=_length(measured("gradients", "B", "norm")),
        gradient_a=_length(measured("gradients", "A", "norm")),
        warnings=snapshot.warnings,
    )


def _item(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _length(values: Iterable[float]) -> float:
    """√Σx² of the numbers that are defined; NaN if none is."""
    squares = [value**2 for value in values if not isnan(value)]
    return sum(squares) ** 0.5 if squares else nan


COLUMNS: Columns[WatchedSnapshot] = (
    Column("step", "step", "step", fixed("d"), priority=ALWAYS),
    *(
        Column(key, key, title, or_blank(text), priority=priority, about=about)
        for key, title, text, priority, about in (
            ("frobenius", "‖ΔW‖F", number, ALWAYS, "length of ΔW"),
            ("spectral", "σ₁", number, 3, "largest singular value"),
            ("effective_rank", "effective", fixed(".2f"), 7, "effective rank, mean over modules"),
            ("step_length", "moved", number, 4, "‖ΔW − ΔW of the row above‖"),
            ("cosine", "cos previous", fixed(".3f"), 6, "cosine with the row above"),
            ("phi_out", "φ out", fixed(".3f"), 5, "share of the out side's directions that the row above has too"),
            ("phi_in", "φ in", fixed(".3f"), 4, "the same for the in side"),
            ("drift", "drift of A", fixed(".2%"), 5, "‖A − A₀‖/‖A₀‖, mean over modules"),
            ("chance_out", "", number, 1, ""),
            ("chance_in", "", number, 1, ""),
            ("gradient_b", "‖∂B‖", number, 2, "norm of the gradient of B"),
            ("gradient_a", "‖∂A‖", number, 2, "norm of the gradient of A"),
        )
    ),
    Column(
        "warnings",
        lambda row: " ".join(warning["code"] for warning in row.warnings),
        "warnings",
        align="left",
        priority=8,
    ),
)


# Cosine of the first A with the last from which φ of the in side shows the common initialisation. Unrelated random A
# have a cosine near 0, so only an A that training has hardly moved comes this close to 1.
STUCK = 0.9


class CheckpointRow(NamedTuple):
    """One row: a checkpoint, what was measured of it, and the losses logged nearest to its step."""

    name: str
    checkpoint: RunCheckpoint
    point: TrajectoryPoint
    loss: LoggedLoss | None
    eval_loss: LoggedLoss | None


@dataclass(frozen=True, slots=True, repr=False)
class TrajectoryResult(ResultSequence[TrajectoryPoint]):
    """The checkpoints of a run in the order of their steps, with the logged losses and the measured trajectory.

    ``len`` is the number of checkpoints, and iteration is over their measurements.
    """

    contents = "trajectory.points"

    run: Run
    trajectory: Trajectory

    @property
    def names(self) -> list[str]:
        """Short, different names of the checkpoints: the last parts of their paths, or whole paths if two agree."""
        short = [checkpoint.path.name for checkpoint in self.run.checkpoints]
        return short if len(set(short)) == len(short) else [str(checkpoint.path) for checkpoint in self.run.checkpoints]

    @property
    def settled(self) -> RunCheckpoint | None:
        """The first checkpoint after which the direction no longer changes; None if there is none, or no order."""
        place = self.trajectory.settled
        return self.run.checkpoints[place] if self.run.ordered and place is not None else None

    @property
    def rows(self) -> list[CheckpointRow]:
        """The checkpoints, each with its measurements and the nearest losses."""
        return _checkpoint_rows(self.run, self.names, self.trajectory.points)

    def tables(self) -> list[Table[CheckpointRow]]:
        """The checkpoints, one checkpoint a row; the columns of losses that the run did not log are left out."""
        unknown = sum(checkpoint.step is None for checkpoint in self.run.checkpoints)
        # Checkpoints without a step come last in the order in which they were given.
        order = f"{unknown} of them without a step and last, as given" if unknown else "in order of steps"
        order = "as given: their steps are unknown" if unknown == len(self) else order
        return [run_table(f"{len(self)} checkpoints, {order}", self.run, self.names, self.trajectory.points)]

    def listing(self) -> list[Table[CheckpointRow]]:
        """The same table with all columns, so that every run has the same CSV columns."""
        return [Table("", TRAJECTORY_COLUMNS, self.rows)]

    def conclusion(self) -> list[str]:
        """The step from which the direction is settled, or the reason why it is unknown."""
        # Checkpoints of several runs have no common direction to follow; a warning has named them.
        if len(self.trajectory.runs) > 1:
            return [
                f"These {len(self)} checkpoints are not of one run, so nothing is said about when a direction settled."
            ]
        if not self.run.ordered:
            return ["Without steps there is no order, so nothing is said about when the direction settled."]
        # Its cosines are then undefined, and a column of dashes needs a reason.
        if not self.rows[-1].point.frobenius:
            return ["The last checkpoint is 0, so there is no direction to compare the others with."]
        return self._on_direction()

    def sentences(self) -> list[str]:
        """How to read the columns."""
        trajectory, rows = self.trajectory, self.rows
        chance = ", ".join(f"{side} {number(value)}" for side, value in trajectory.chance.items() if isfinite(value))
        # What a heading has no room for is said below the table.
        sentences = [(f"chance level of φ: {chance}; " if chance else "") + "moved: ‖ΔW − ΔW of the row above‖F"]
        shown = [(row, loss) for row in rows for loss in (row.loss, row.eval_loss) if loss]
        if any(loss.step != row.checkpoint.step for row, loss in shown):
            sentences.append("@N: a loss of step N, the nearest that was logged")
        return sentences

    def _on_direction(self) -> list[str]:
        """When the direction settled, and whether the in side shows more than the common initialisation."""
        first, before, last = (self.rows[i] for i in (0, -2, -1))
        sentences = []
        if self.settled:
            since = f"from step {self.settled.step} of {last.checkpoint.step} on"
            every = f"from there every cosine with the last checkpoint is at least {SETTLED}"
            sentences.append(f"The direction is settled {since}: {every}.")
        elif isfinite(before.point.cosine):  # NaN if one of the last two checkpoints is 0
            cosine = f"cosine {fixed('.3f')(before.point.cosine)} between the last two checkpoints"
            sentences.append(f"The direction was still turning: {cosine}.")
        start = first.point
        # B begins at 0 and has to move; where A hardly does, all learning is on the out side.
        if start.initial >= STUCK and start.phi["in"] > start.phi["out"]:
            near = f"A stays near its initialisation (cosine {start.initial:.2f} of A first to last)"
            sentences.append(
                f"φ in is high from the first checkpoint on because {near}: what was learnt is on the out side."
            )
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            # the file of transformers
            Column(
                "trainer_state",
                lambda result: (
                    result.run.source if result.run.source and result.run.source.name == TRAINER_STATE else None
                ),
                type=str | None,
            ),
            Column("chance", "trajectory.chance", type=SIDES),
            Column("ordered", "run.ordered"),
            Column("settled", "settled.path"),
            # the limit that "settled" was found with
            Column("settled_cosine", lambda _: SETTLED, type=float),
            Column(
                "runs",
                lambda result: [[result.run.checkpoints[i].path for i in group] for group in result.trajectory.runs],
                type=list[list[str]],
            ),
            rows_key("checkpoints", TRAJECTORY_COLUMNS, source="rows"),
            Column(("history", "loss"), lambda result: _pairs(result.run.train), type=JsonMatrix),
            Column(("history", "eval_loss"), lambda result: _pairs(result.run.evaluation), type=JsonMatrix),
        )


@takes_options
def trajectory(
    *adapters: Source,
    selection: ModuleChoice,
    reading: Reading,
) -> TrajectoryResult | WatchedResult:
    """Follow one run through its checkpoints: how far ΔW has moved, where it turned, and the loss.

    RUN is a folder with checkpoint-N folders (loralens train, the Trainer of transformers) or with
    NNNNNNN_adapters.safetensors files (mlx-lm); the adapters can also be named one by one. They are ordered by step:
    the global_step in the trainer_state.json beside them, else the number in the name. If one of them states no step,
    nothing is concluded from their order. Losses are read from the trainer_state.json of the latest step, or from the
    log of loralens train.

    LOG is the .jsonl file that a Watcher or a callback of loralens.watching wrote while another program trained; it
    needs no checkpoints.

    Parameters
    ----------
    *adapters : path, Adapter or model
        A folder with ``checkpoint-N`` folders in it (`loralens train`, transformers' Trainer) or with
        ``NNNNNNN_adapters.safetensors`` files (mlx-lm); or two or more adapters. Paths are put in order of steps: the
        ``global_step`` of the trainer_state.json beside them, else the number in the name. Adapters that have been read
        have no step, and nothing is concluded from their order. Or the log of a watched run (`loralens.watching`),
        which needs no checkpoints.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        Fewer than two checkpoints, or two of one step; a glob that matches nothing.
    FormatError
        A file that is not an adapter, or a trainer_state.json that cannot be read; a module that holds NaN or Inf.
    MismatchError
        No two checkpoints have a module in common.

    Examples
    --------
    $ loralens trajectory run
    """
    modules, chosen = selection.globs, sources(adapters)
    if (log := watch_log_of(chosen)) is not None:
        check_unread(reading)
        return read_watched(log, modules)
    run, loaded = _read_checkpoints(chosen, reading)
    names = [str(checkpoint.path) for checkpoint in run.checkpoints]
    warn_of_bases(names, loaded)  # checkpoints of one run have one base
    with progress("comparing", trajectory_steps(loaded, modules)) as step:
        measured = measure_trajectory(loaded, modules=modules, labels=names, threads=processor_count(), step=step)
    result = TrajectoryResult(run, measured)
    _warn_of_other_runs(result)
    return result


def run_table(title: str, run: Run, names: Sequence[str], points: Sequence[TrajectoryPoint]) -> Table[CheckpointRow]:
    """The checkpoints of a run under these names, without the columns for people of losses that it did not log."""
    absent = {key for key, logged in (("loss", run.train), ("eval_loss", run.evaluation)) if not logged}
    columns = [column for column in TRAJECTORY_COLUMNS if not (column.title and column.key in absent)]
    return Table(title, columns, _checkpoint_rows(run, names, points))


def _checkpoint_rows(run: Run, names: Sequence[str], points: Sequence[TrajectoryPoint]) -> list[CheckpointRow]:
    # Trainers log losses at other steps than those at which they save, so the nearest ones are taken.
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    train, evaluation = ([nearest_loss(losses, step) for step in steps] for losses in (run.train, run.evaluation))
    return [CheckpointRow(*row) for row in zip(names, run.checkpoints, points, train, evaluation, strict=True)]


def _read_checkpoints(chosen: Sequence[AdapterSource], reading: Reading) -> tuple[Run, list[Adapter]]:
    """The run and its adapters in the order of its steps; messages tell what the reader noticed."""
    loaded = [source for source in chosen if isinstance(source, Adapter)]
    # Paths are read by the reader of runs, which knows their steps; objects have none.
    if not loaded:
        run = read_run([Path(source) for source in chosen if not isinstance(source, Adapter)])
        adapters = [load(checkpoint.path, **reading.stated) for checkpoint in run.checkpoints]
        for checkpoint, adapter in zip(run.checkpoints, adapters, strict=True):
            tell_findings(str(checkpoint.path), adapter.findings)
        return run, adapters
    check_unread(reading)
    if len(loaded) < len(chosen):
        raise OptionError(
            "some checkpoints are paths, and some have been read, so that they have no common order",
            fix="give all of them as paths, or all as adapters",
        )
    # A single path may be the folder of a run, but a single object is one checkpoint.
    if len(loaded) < 2:
        raise OptionError("one adapter is not a training run", fix="give two or more, or the path of a run")
    return Run(tuple(RunCheckpoint(Path(label), None) for label in labels(loaded))), loaded


def _warn_of_other_runs(result: TrajectoryResult) -> None:
    """Name the checkpoints that did not begin from the same A as most of the others."""
    names, runs = result.names, result.trajectory.runs
    if len(runs) == 1:
        return
    # The largest group is taken for the run; where no two belong together, there is none, and all are named.
    largest = max(runs, key=len)
    strangers = [names[i] for group in runs if group is not largest or len(group) == 1 for i in group]
    others = " with the others" if len(largest) > 1 else ""
    warn(
        f"{', '.join(strangers)} {'is' if len(strangers) == 1 else 'are'} not of one run{others}: "
        "cosines of A below 0.5 and of ΔW below 0.9, so training began from other random factors",
        "leave out checkpoints of other runs; comparisons with the last checkpoint are valid within one run only",
    )


def _pairs(losses: Iterable[LoggedLoss]) -> list[tuple[int, float]]:
    return [(loss.step, loss.value) for loss in losses]


def _loss_columns(key: str, title: str) -> Columns[CheckpointRow]:
    """The nearest loss that was logged: an object in JSON, two columns in CSV, one for people.

    People see the step of the loss only where it is not that of the checkpoint.
    """

    def text(row: CheckpointRow) -> str:
        loss = getattr(row, key)
        if loss is None:
            return UNDEFINED
        return number(loss.value) + (f" @{loss.step}" if loss.step != row.checkpoint.step else "")

    def record(row: CheckpointRow) -> dict[str, Any] | None:
        loss = getattr(row, key)
        return {"value": loss.value, "step": loss.step} if loss else None

    # One key for all three: JSON nests the step, CSV has no nesting, and people get one cell.
    return (
        Column(key, record, type=[{"value": float, "step": int}, None], csv=False),
        Column(key, f"{key}.value", json=False),
        Column(f"{key}_step", f"{key}.step", json=False),
        Column(key, text, title, priority=6, json=False, csv=False),
    )


def _phi_column(side: Side) -> Column[CheckpointRow]:
    about = f"part of the directions of the {side} side that lies in those of the last checkpoint, from 0 to 1"
    return Column(("phi", side), f"point.phi.{side}", f"φ {side} last", fixed(".3f"), priority=5, about=about)


# On a narrow terminal σ₁ and the effective rank are left out first, as they describe a single checkpoint. The norm and
# the cosine with the last checkpoint are never left out: they show how far ΔW has moved and in which direction.
TRAJECTORY_COLUMNS: Columns[CheckpointRow] = (
    # Machines get the whole path, people the shortest name that tells the checkpoints apart.
    Column("path", "checkpoint.path"),
    label_column("checkpoint", "checkpoint", "name", json=False, csv=False),
    Column("step", "checkpoint.step", "step", fixed("d"), priority=8),
    Column("frobenius", "point.frobenius", "‖ΔW‖F", number, priority=ALWAYS, about="length of ΔW"),
    Column("spectral", "point.spectral", "σ₁", number, priority=3, about="largest singular value"),
    Column(
        "effective_rank",
        "point.effective_rank",
        "effective",
        fixed(".2f"),
        priority=4,
        about="effective rank (exp of the entropy of σ/Σσ), mean over modules",
    ),
    # Machines get null both for a step that does not exist and for an undefined number. People get a blank for the
    # first and a dash for the second, so each quantity has two columns.
    Column("step_length", "point.length"),
    Column(
        "moved",
        "point.length",
        "moved",
        or_blank(number),
        priority=7,
        json=False,
        csv=False,
        about="‖ΔW − ΔW of the row above‖",
    ),
    Column("previous_cosine", "point.previous_cosine"),
    Column(
        "turned",
        "point.previous_cosine",
        "cos previous",
        or_blank(fixed(".3f")),
        priority=5,
        json=False,
        csv=False,
        about="cosine with the row above",
    ),
    Column(
        "cosine", "point.cosine", "cos last", fixed(".3f"), priority=ALWAYS, about="cosine with the last checkpoint"
    ),
    Column("cosine_z", "point.cosine_z"),
    _phi_column("out"),
    _phi_column("in"),
    Column("previous_phi", "point.previous_phi", type=[SIDES, None], csv=False),
    Column("previous_phi_in", "point.previous_phi.in", json=False),
    Column("previous_phi_out", "point.previous_phi.out", json=False),
    Column("initial_cosine", "point.initial"),
    *_loss_columns("loss", "loss"),
    *_loss_columns("eval_loss", "eval loss"),
)
