"""The verb ``trajectory``: follows one run through its checkpoints, and lists the losses that it logged."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from loralens.analysis.trajectory import SETTLED, Trajectory, TrajectoryPoint, measure_trajectory, trajectory_steps
from loralens.choices import Side
from loralens.core.adapter import Adapter
from loralens.core.messages import tell_findings, warn
from loralens.core.progress import progress
from loralens.core.threads import processor_count
from loralens.errors import OptionError
from loralens.formats import load
from loralens.formats.records.runs import STATE, LoggedLoss, Run, RunCheckpoint, nearest_loss, read_run
from loralens.tables.numbers import UNDEFINED, fixed, json_number, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.adapters import AdapterSource, Reading, Source, check_unread, labels, sources
from loralens.verbs.inputs.bases import warn_of_bases
from loralens.verbs.inputs.choices import Blocks, as_globs
from loralens.verbs.outputs.watched import WatchedResult, read_watched, watch_log_of

# Cosine of the first A with the last from which φ of the in side shows the common start. Unrelated random A have
# a cosine near 0, so only an A that training has hardly moved comes this close to 1.
STUCK = 0.9


class CheckpointRow(NamedTuple):
    """One row: a checkpoint, what was measured of it, and the losses logged nearest to its step."""

    name: str
    checkpoint: RunCheckpoint
    point: TrajectoryPoint
    loss: LoggedLoss | None
    eval_loss: LoggedLoss | None


@dataclass(frozen=True, slots=True)
class TrajectoryResult(Tabular):
    """The checkpoints of a run in the order of their steps, with the logged losses and the measured trajectory.

    ``len`` is the number of checkpoints, and iteration is over their measurements.
    """

    run: Run
    trajectory: Trajectory

    def __len__(self) -> int:
        return len(self.run.checkpoints)

    def __iter__(self) -> Iterator[TrajectoryPoint]:
        return iter(self.trajectory.points)

    def __repr__(self) -> str:
        return f"TrajectoryResult({len(self)} checkpoints)"

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
        return [Table("", COLUMNS, self.rows)]

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
        """When the direction settled, and whether the in side shows more than the common start."""
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
            near = f"A stays near its random beginning (cosine {start.initial:.2f} of A first to last)"
            sentences.append(f"φ in is high from the start because {near}: what was learnt is on the out side.")
        return sentences

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object; undefined numbers are null."""
        run, trajectory = self.run, self.trajectory
        paths = [str(checkpoint.path) for checkpoint in run.checkpoints]
        return {
            # The key names transformers' file; the log of `loralens train` is not such a file.
            "trainer_state": str(run.source) if run.source and run.source.name == STATE else None,
            "chance": {side: json_number(value) for side, value in trajectory.chance.items()},
            "ordered": run.ordered,
            "settled": str(self.settled.path) if self.settled else None,
            "settled_cosine": SETTLED,  # the limit that "settled" was found with
            "runs": [[paths[i] for i in group] for group in trajectory.runs],
            "checkpoints": Table("", COLUMNS, self.rows).records(),
            "history": {
                "loss": [[loss.step, loss.value] for loss in run.train],
                "eval_loss": [[loss.step, loss.value] for loss in run.evaluation],
            },
        }


def trajectory(
    *adapters: Source, modules: Sequence[str] = (), block: Blocks = (), **reading: Unpack[Reading]
) -> TrajectoryResult | WatchedResult:
    """Follow one run through its checkpoints: how far ΔW has moved, where it turned, and the loss.

    Parameters
    ----------
    *adapters : path or Adapter
        A folder with ``checkpoint-N`` folders in it (`loralens train`, transformers' Trainer) or with
        ``NNNNNNN_adapters.safetensors`` files (mlx-lm); or two or more adapters. Paths are put in order of steps: the
        ``global_step`` of the trainer_state.json beside them, else the number in the name. Adapters that have been
        read have no step, and nothing is concluded from their order. Or the log of a watched run
        (`loralens.watching`), which needs no checkpoints.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    **reading : Reading
        How files are read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        Fewer than two checkpoints, or two of one step; a glob that matches nothing.
    FormatError
        A file that is not an adapter, or a trainer_state.json that cannot be read; a module that holds NaN or Inf.
    MismatchError
        No two checkpoints have a module in common.
    """
    modules, chosen = as_globs(modules, block), sources(adapters)
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
    columns = [column for column in COLUMNS if not (column.title and column.key in absent)]
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
        adapters = [load(checkpoint.path, **reading) for checkpoint in run.checkpoints]
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
    strangers = [names[i] for group in runs if group is not largest for i in group]
    who = ", ".join(strangers) if len(largest) > 1 else ", ".join(names)
    verb = "is" if len(largest) > 1 and len(strangers) == 1 else "are"
    warn(
        f"{who} {verb} not of one run{' with the others' if len(largest) > 1 else ''}: "
        "cosines of A below 0.5 and of ΔW below 0.9, so training began from other random factors",
        "leave out checkpoints of other runs; comparisons with the last checkpoint are valid within one run only",
    )


def _loss_columns(
    key: str, title: str, of: Callable[[CheckpointRow], LoggedLoss | None]
) -> tuple[Column[CheckpointRow], ...]:
    """The nearest loss that was logged: an object in JSON, two columns in CSV, one for people.

    People see the step of the loss only where it is not that of the checkpoint.
    """

    def text(row: CheckpointRow) -> str:
        loss = of(row)
        if loss is None:
            return UNDEFINED
        return number(loss.value) + (f" @{loss.step}" if loss.step != row.checkpoint.step else "")

    def record(row: CheckpointRow) -> dict[str, Any] | None:
        loss = of(row)
        return {"value": loss.value, "step": loss.step} if loss else None

    # One key for all three: JSON nests the step, CSV has no nesting, and people get one cell.
    return (
        Column(key, record, csv=False),
        Column(key, lambda row: loss.value if (loss := of(row)) else None, json=False),
        Column(f"{key}_step", lambda row: loss.step if (loss := of(row)) else None, json=False),
        Column(key, text, title, priority=6, json=False, csv=False),
    )


def _phi_column(side: Side) -> Column[CheckpointRow]:
    return Column(
        ("phi", side),
        lambda row: json_number(row.point.phi[side]),
        f"φ {side} last",
        fixed(".3f"),
        priority=5,
        about=f"part of the directions of the {side} side that lies in those of the last checkpoint, from 0 to 1",
    )


def _previous_phi_column(side: Side) -> Column[CheckpointRow]:
    def value(row: CheckpointRow) -> float | None:
        return json_number(row.point.previous_phi[side]) if row.point.previous_phi else None

    return Column(f"previous_phi_{side}", value, json=False)


def _previous_phi(row: CheckpointRow) -> dict[str, float | None] | None:
    """φ with the checkpoint before on both sides, for JSON; null at the first checkpoint."""
    phi = row.point.previous_phi
    return None if phi is None else {side: json_number(value) for side, value in phi.items()}


def _step_column(
    key: str,
    title: str,
    value: Callable[[CheckpointRow], float | None],
    text: Callable[[float | None], str],
    priority: int,
    about: str = "",
) -> Column[CheckpointRow]:
    """A quantity of the step from the checkpoint before, for people.

    The first checkpoint has no such step, so its cell is blank; a dash means that a quantity is not defined.
    """

    def shown(number: float | None) -> str:
        return "" if number is None else text(number)

    return Column(key, value, title, shown, priority=priority, json=False, csv=False, about=about)


# On a narrow terminal σ₁ and the effective rank are left out first, as they describe a single checkpoint. The norm and
# the cosine with the last checkpoint are never left out: they show how far ΔW has moved and in which direction.
COLUMNS: tuple[Column[CheckpointRow], ...] = (
    # Machines get the whole path, people the shortest name that tells the checkpoints apart.
    Column("path", lambda row: str(row.checkpoint.path)),
    Column("checkpoint", lambda row: row.name, "checkpoint", align="left", priority=ALWAYS, json=False, csv=False),
    Column("step", lambda row: row.checkpoint.step, "step", fixed("d"), priority=8),
    Column("frobenius", lambda row: row.point.frobenius, "‖ΔW‖F", number, priority=ALWAYS, about="length of ΔW"),
    Column("spectral", lambda row: row.point.spectral, "σ₁", number, priority=3, about="largest singular value"),
    Column(
        "effective_rank",
        lambda row: row.point.effective_rank,
        "effective",
        fixed(".2f"),
        priority=4,
        about="effective rank (exp of the entropy of σ/Σσ), mean over modules",
    ),
    # Machines get null both for a step that does not exist and for an undefined number. People get a blank for the
    # first and a dash for the second, so each quantity has two columns.
    Column("step_length", lambda row: json_number(row.point.length)),
    _step_column("moved", "moved", lambda row: row.point.length, number, 7, "‖ΔW − ΔW of the row above‖"),
    Column("previous_cosine", lambda row: json_number(row.point.previous_cosine)),
    _step_column(
        "turned", "cos previous", lambda row: row.point.previous_cosine, fixed(".3f"), 5, "cosine with the row above"
    ),
    Column(
        "cosine",
        lambda row: json_number(row.point.cosine),
        "cos last",
        fixed(".3f"),
        priority=ALWAYS,
        about="cosine with the last checkpoint",
    ),
    Column("cosine_z", lambda row: json_number(row.point.cosine_z)),
    _phi_column("out"),
    _phi_column("in"),
    Column("previous_phi", _previous_phi, csv=False),
    _previous_phi_column("in"),
    _previous_phi_column("out"),
    Column("initial_cosine", lambda row: json_number(row.point.initial)),
    *_loss_columns("loss", "loss", lambda row: row.loss),
    *_loss_columns("eval_loss", "eval loss", lambda row: row.eval_loss),
)
