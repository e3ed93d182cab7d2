"""``loralens trajectory``: one run through its checkpoints."""

import json
import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.bases import warn_of_bases
from loralens.cli.record import known
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.trajectory import Point, Trajectory
    from loralens.cli.table import Table
    from loralens.formats.records.runs import Checkpoint, Loss, Run

STUCK = 0.9  # cosine of A with the last checkpoint, over all of the run, from which φ of the in side shows the start


@click.command("trajectory")
@click.argument("paths", nargs=-1, required=True, metavar="RUN|ADAPTER...")
@options.MODULES
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, everything.")
@options.plot("Draw it over the steps: .png, .svg, .pdf.")
@options.reading
def command(paths: tuple[str, ...], modules: tuple[str, ...], as_json: bool, plot: Path | None, **reading: Any) -> None:
    """Follow one run through its checkpoints: how far ΔW went, where it turned, beside the loss.

    RUN is a folder with checkpoint-N folders in it (loralens train, transformers' Trainer) or
    NNNNNNN_adapters.safetensors files (mlx-lm); or give the adapters themselves. They are put in order of steps:
    global_step of the trainer_state.json beside them, else the number in the name. Where one says no step, nothing is
    concluded from their order. The losses are those of the trainer_state.json of the latest step,
    or of the log that loralens train keeps.
    """
    from loralens.analysis.trajectory import measure_trajectory, work
    from loralens.cli.progress import progress
    from loralens.formats import load
    from loralens.formats.records.runs import run_of

    run = run_of([Path(path) for path in paths])
    adapters = [load(one.path, **reading) for one in run.checkpoints]
    for one, adapter in zip(run.checkpoints, adapters, strict=True):
        options.warn(str(one.path), adapter)
    labels = [str(one.path) for one in run.checkpoints]
    warn_of_bases(labels, adapters)
    with progress("comparing", work(adapters, modules)) as step:
        found = measure_trajectory(adapters, modules=modules, labels=labels, threads=os.cpu_count() or 1, step=step)
    _warn_of_other_runs(run, found)
    if as_json:
        click.echo(json.dumps(_record(run, found)))
    else:
        _show(run, found)
    if plot:
        from loralens.charts.trajectory import trajectory_figure

        steps = [one.step for one in run.checkpoints]
        losses = {"loss": run.train, "eval loss": run.evaluation}
        curves = {name: [(loss.step, loss.value) for loss in logged] for name, logged in losses.items() if logged}
        options.draw(trajectory_figure(found, steps, curves, names(run.checkpoints)), plot)


def names(checkpoints: "Sequence[Checkpoint]") -> list[str]:
    """Short names, each different: the last part of the path, or the whole where two are alike."""
    short = [one.path.name for one in checkpoints]
    return short if len(set(short)) == len(short) else [str(one.path) for one in checkpoints]


def _warn_of_other_runs(run: "Run", found: "Trajectory") -> None:
    """Name the checkpoints that did not begin from the same A as most of the others."""
    if len(found.runs) == 1:
        return
    label = names(run.checkpoints)
    largest = max(found.runs, key=len)
    strangers = [label[i] for group in found.runs if group is not largest for i in group]
    who = ", ".join(strangers) if len(largest) > 1 else ", ".join(label)
    verb = "is" if len(largest) > 1 and len(strangers) == 1 else "are"
    say(
        f"warning: {who} {verb} not of one run{' with the others' if len(largest) > 1 else ''}: "
        "cosines of A below 0.5 and of ΔW below 0.9, so training began from other random factors",
        err=True,
    )
    click.echo(
        "  fix: leave out what is of another run; what is said against the last checkpoint needs one run", err=True
    )


def _record(run: "Run", found: "Trajectory") -> dict[str, Any]:
    from loralens.analysis.trajectory import SETTLED
    from loralens.formats.records.runs import STATE

    paths = [str(one.path) for one in run.checkpoints]
    return {
        "loralens": __version__,
        "trainer_state": str(run.source) if run.source and run.source.name == STATE else None,
        "chance": {side: known(value) for side, value in found.chance.items()},
        "ordered": run.ordered,
        "settled": paths[found.settled] if run.ordered and found.settled is not None else None,
        "settled_cosine": SETTLED,
        "runs": [[paths[i] for i in group] for group in found.runs],
        "checkpoints": [_checkpoint(run, one, point) for one, point in zip(run.checkpoints, found.points, strict=True)],
        "history": {
            "loss": [[loss.step, loss.value] for loss in run.train],
            "eval_loss": [[loss.step, loss.value] for loss in run.evaluation],
        },
    }


def _checkpoint(run: "Run", one: "Checkpoint", point: "Point") -> dict[str, Any]:
    from loralens.formats.records.runs import nearest

    def logged(losses: "Sequence[Loss]") -> dict[str, Any] | None:
        loss = nearest(losses, one.step)
        return {"value": loss.value, "step": loss.step} if loss else None

    return {
        "path": str(one.path),
        "step": one.step,
        "frobenius": point.frobenius,
        "spectral": point.spectral,
        "effective_rank": point.effective_rank,
        "step_length": known(point.length),
        "cosine": known(point.cosine),
        "cosine_z": known(point.cosine_z),
        "previous_cosine": known(point.previous_cosine),
        "phi": {side: known(value) for side, value in point.phi.items()},
        "previous_phi": point.previous_phi and {side: known(value) for side, value in point.previous_phi.items()},
        "initial_cosine": known(point.initial),
        "loss": logged(run.train),
        "eval_loss": logged(run.evaluation),
    }


def _show(run: "Run", found: "Trajectory") -> None:
    from loralens.cli.table import show

    show(_table(run, found))
    for sentence in _sentences(run, found):
        say(sentence)


def _table(run: "Run", found: "Trajectory") -> "Table":
    from loralens.cli.table import Column, Table, number

    losses = [(title, logged) for title, logged in (("loss", run.train), ("eval loss", run.evaluation)) if logged]

    def cell(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None or not isfinite(value) else format(value, form)

    rows = [
        [
            name,
            "–" if one.step is None else str(one.step),
            number(point.frobenius),
            number(point.spectral),
            f"{point.effective_rank:.2f}",
            "" if point.length is None else number(point.length),
            "" if point.previous_cosine is None else cell(point.previous_cosine),
            cell(point.cosine),
            cell(point.phi["out"]),
            cell(point.phi["in"]),
            *(_logged(logged, one.step) for _, logged in losses),
        ]
        for name, one, point in zip(names(run.checkpoints), run.checkpoints, found.points, strict=True)
    ]
    heads = ("step", "‖ΔW‖F", "σ₁", "effective", "moved", "cos previous", "cos last", "φ out last", "φ in last")
    columns = [Column("checkpoint", "left"), *map(Column, heads), *(Column(title) for title, _ in losses)]
    unknown = sum(one.step is None for one in run.checkpoints)
    order = f"{unknown} of them without a step and last, as given" if unknown else "in order of steps"
    order = "as given: nothing says their steps" if unknown == len(rows) else order
    return Table(f"{len(rows)} checkpoints, {order}", columns, rows)


def _losses_of(run: "Run", one: "Checkpoint") -> "list[Loss | None]":
    """The losses that are shown with a checkpoint."""
    from loralens.formats.records.runs import nearest

    return [nearest(logged, one.step) for logged in (run.train, run.evaluation)]


def _logged(losses: "Sequence[Loss]", step: int | None) -> str:
    """The loss of a step; of the nearest where there was none, with the step that it is of."""
    from loralens.formats.records.runs import nearest

    loss = nearest(losses, step)
    return "–" if loss is None else f"{loss.value:.4g}" + (f" @{loss.step}" if loss.step != step else "")


def _sentences(run: "Run", found: "Trajectory") -> list[str]:
    """What the numbers say, each only where it is true."""
    from loralens.analysis.trajectory import SETTLED
    from loralens.cli.table import number

    chance = ", ".join(f"{side} {number(value)}" for side, value in found.chance.items() if isfinite(value))
    said = [(f"chance level of φ: {chance}; " if chance else "") + "moved: ‖ΔW − ΔW of the row above‖F"]
    if any(loss and loss.step != one.step for one in run.checkpoints for loss in _losses_of(run, one)):
        said.append("@N: a loss of step N, the nearest that was logged")
    if not found.points[-1].frobenius:
        said.append("the last checkpoint is 0, so there is no direction to compare the others with")
    if len(found.runs) > 1:
        return said
    if not run.ordered:
        return [*said, "without steps there is no order, so nothing is said of when the direction settled"]
    label = [f"step {one.step}" if one.step is not None else one.path.name for one in run.checkpoints]
    before = found.points[-2].cosine
    if found.settled is not None:
        said.append(
            f"the direction is settled from {label[found.settled]} on (of {label[-1]}): "
            f"from there every cosine with the last is at least {SETTLED}"
        )
    elif isfinite(before):
        said.append(f"the direction was still turning: cosine {before:.3f} between the last two checkpoints")
    first = found.points[0]
    if first.initial >= STUCK and first.phi["in"] > first.phi["out"]:
        said.append(
            f"φ in is high from the start because A stays near its random beginning (cosine {first.initial:.2f} of A "
            "first to last): what was learnt is on the out side"
        )
    return said
