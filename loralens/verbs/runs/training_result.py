"""The results of ``train``: the plan of a dry run, and what a run has trained."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.core.adapter import Adapter
from loralens.tables.numbers import count, fixed, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table
from loralens.verbs.models.tokens import Cut

if TYPE_CHECKING:  # torch takes a second
    from loralens.training.injection import Injection

Evaluations = Sequence[tuple[int, Mapping[str, float | None]]]


@dataclass(frozen=True, slots=True)
class TrainedParts:
    """The parts of a model that are trained.

    Attributes
    ----------
    modules : tuple of str
        The modules with a LoRA layer, in natural order.
    heads : tuple of str
        The modules that are trained in full.
    ranks : tuple of int
        The different ranks of the modules, in order.
    trainable, frozen : int
        The number of parameters that are trained, and of those of the model that are not.
    """

    modules: tuple[str, ...]
    heads: tuple[str, ...]
    ranks: tuple[int, ...]
    trainable: int
    frozen: int

    @classmethod
    def of(cls, injection: "Injection") -> "TrainedParts":
        """The parts of an injection, whose layers must be in the model."""
        ranks = tuple(sorted({*injection.ranks.values()}))
        return cls(tuple(injection.layers), tuple(injection.heads), ranks, injection.trainable, injection.frozen)


@dataclass(frozen=True, slots=True, repr=False)
class TrainPlan(Tabular):
    """What a run would train: the result of a dry run.

    Attributes
    ----------
    parts : TrainedParts
        The modules and the heads, and the number of their parameters.
    run : mapping
        The identity of the run: every option and input that decides about a number of its result.
    cut, evaluation_cut : Cut
        What would be cut off the texts for training and for evaluation.
    main : bool
        Whether this process is the first of several, which alone reports.
    """

    output: Path | None
    parts: TrainedParts
    run: Mapping[str, Any]
    cut: Cut
    evaluation_cut: Cut | None
    main: bool = True

    def conclusion(self) -> list[str]:
        """What would be trained."""
        parts, run = self.parts, self.run
        written = f", and write {self.output}" if self.output else ""
        unit = "rows" if run.get("pack") else "texts"
        return [
            f"Would train {parts.trainable:,} numbers in {len(parts.modules)} modules{_and_heads(parts.heads)} "
            f"for {run['steps']} steps of {run['batch']} {unit}{written}; {parts.frozen:,} numbers stay frozen."
        ]

    def record(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        record = super(TrainPlan, self).record()
        cuts = {key: record.pop(key) for key in ("cut", "evaluation_cut")}
        return {**record, **self.run, **cuts}

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object, besides those of the run, which stand before the cuts."""
        target: Column[Any] = Column("target", lambda _: None, type=type(None))
        return (target, *PARTS, Column("frozen", "parts.frozen"), "cut", "evaluation_cut", "*")


@dataclass(frozen=True, slots=True, repr=False)
class TrainResult(Tabular):
    """The adapter that a run has trained, and its losses and evaluations.

    Attributes
    ----------
    output : Path
        The folder of the run, with the adapter, the log and the snapshots.
    parts : TrainedParts
        The modules and the heads, and the number of their parameters.
    steps : int
        The number of steps done.
    best_step : int or None
        The step whose adapter was written, if patience was given.
    losses : mapping of int to float or None
        The loss of each step before the update, by the number of the step. For a resumed run the steps before the
        interruption are included.
    evaluations : sequence of (int, mapping of str to float or None)
        Steps done, and the measures.
    cut, evaluation_cut : Cut
        What was cut off the texts for training and for evaluation.
    main : bool
        Whether this process is the first of several, which alone writes and reports.
    """

    adapter: Adapter
    output: Path
    parts: TrainedParts
    steps: int
    best_step: int | None
    losses: Mapping[int, float | None]
    evaluations: Evaluations
    cut: Cut
    evaluation_cut: Cut | None
    main: bool = True

    @property
    def written_step(self) -> int:
        """The step whose adapter was written."""
        return self.steps if self.best_step is None else self.best_step

    @property
    def loss(self) -> float | None:
        """The loss of the step whose adapter was written."""
        return self.losses.get(self.written_step)

    def listing(self) -> list[Table[Any]]:
        """The evaluations, as rows for a data frame; the losses of the steps where there was no evaluation."""
        step: Column[Any] = Column("step", "0", "step", priority=ALWAYS)
        if not self.evaluations:
            loss: Column[Any] = Column("loss", "1", "loss", number)
            return [Table("losses", (step, loss), list(self.losses.items()))]
        return [Table("evaluations", (step, *map(_measure_column, self.evaluations[0][1])), self.evaluations)]

    def conclusion(self) -> list[str]:
        """What was trained and written, and what it gained."""
        parts, modules = self.parts, count(len(self.parts.modules), "module")
        lines = [
            f"Wrote {self.output}: rank {_in_words(parts.ranks)} in {modules}{_and_heads(parts.heads)}, "
            f"{parts.trainable:,} numbers trained in {count(self.steps, 'step')}."
        ]
        # With patience the last evaluation is not that of the adapter that was written.
        last = (measures for step, measures in reversed(self.evaluations) if step == self.written_step)
        after = next(last, None)
        # One evaluation alone has nothing to be compared with.
        if after is not None and len(self.evaluations) > 1:
            # A resumed run without an earlier log has no evaluation of step 0.
            step, before = self.evaluations[0]
            text = fixed(".3f")
            gained = [f"{name} {text(before.get(name))} → {text(value)}" for name, value in after.items()]
            since = f"step {step}" if step else "before the training"
            lines.append(f"On the evaluation, from {since} to after it: {', '.join(gained)}.")
        return lines

    def sentences(self) -> list[str]:
        """The step that was written, if it is not the last."""
        if self.best_step is None:
            return []
        return [f"best of the evaluations: step {self.best_step}, which is what was written"]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("target", "output"),
            "steps",
            "best_step",
            "loss",
            Column(
                "evaluations",
                lambda result: [{"step": step, **measures} for step, measures in result.evaluations],
                type=list[dict[str, float]],
            ),
            *PARTS,
            "cut",
            "evaluation_cut",
        )


# The measures depend on the task, so their columns are made from the names.
def _measure_column(name: str) -> Column[Any]:
    return Column(name, lambda row: row[1].get(name), name, number)


PARTS: list[Column[Any]] = [Column(key, f"parts.{key}") for key in ("modules", "heads", "trainable")]


def _and_heads(heads: Collection[str]) -> str:
    return f" and {', '.join(heads)} in full" if heads else ""


def _in_words(ranks: Sequence[int]) -> str:
    """The ranks as one number, or as a range."""
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
