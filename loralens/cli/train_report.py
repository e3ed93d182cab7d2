"""What ``loralens train`` says that it would do, and that it did: in words, and as JSON."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli.record import known

if TYPE_CHECKING:
    from loralens.train.fitting import Fitted
    from loralens.train.injection import Injection


def plan(injection: "Injection", run: Mapping[str, Any], *, output: Path, as_json: bool) -> None:
    """What a run would train; ``run`` says what it is."""
    if as_json:
        record = {"target": None, **_trained(injection), "frozen": injection.frozen, **run}
        click.echo(json.dumps(record))
        return
    click.echo(
        f"would train {injection.trainable:,} numbers in {len(injection.layers)} modules{_and(injection.heads)} "
        f"for {run['steps']} steps of {run['batch']} texts, and write {output}; "
        f"{injection.frozen:,} numbers stay frozen"
    )


def result(fitted: "Fitted", *, output: Path, as_json: bool) -> None:
    """What a run made, and how well it does."""
    if as_json:
        click.echo(json.dumps(_record(fitted, output)))
        return
    injection = fitted.injection
    click.echo(
        f"wrote {output}: rank {injection.rank} in {len(injection.layers)} modules{_and(injection.heads)}, "
        f"{injection.trainable:,} numbers trained in {fitted.steps} steps"
    )
    if len(fitted.evaluations) > 1:
        (step, before), (_, after) = fitted.evaluations[0], fitted.evaluations[-1]
        gained = [f"{name} {before[name]:.3f} → {after[name]:.3f}" for name in after]
        since = f"step {step}" if step else "before"  # what went on from a state has seen no evaluation before it
        click.echo(f"evaluation, {since} → after: {', '.join(gained)}")
    if fitted.best_step is not None:
        click.echo(f"best of the evaluations: step {fitted.best_step}, which is what was written")


def _record(fitted: "Fitted", output: Path) -> dict[str, Any]:
    return {
        "target": str(output),
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "loss": fitted.losses[-1] if fitted.losses else None,
        "evaluations": [
            {"step": step, **{name: known(value) for name, value in measures.items()}}
            for step, measures in fitted.evaluations
        ],
        **_trained(fitted.injection),
    }


def _trained(injection: "Injection") -> dict[str, Any]:
    return {
        "modules": list(injection.layers),
        "heads": list(injection.heads),
        "trainable": injection.trainable,
    }


def _and(heads: Collection[str]) -> str:
    return f" and {', '.join(heads)} in full" if heads else ""
