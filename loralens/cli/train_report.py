"""What ``loralens train`` says that it would do, and that it did: in words, and as JSON."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli.terminal import say

if TYPE_CHECKING:
    from loralens.formats.records.training_log import History
    from loralens.training.fitting import Fitted
    from loralens.training.injection import Injection


def plan(injection: "Injection", run: Mapping[str, Any], *, output: Path, as_json: bool) -> None:
    """What a run would train; ``run`` says what it is."""
    if as_json:
        record = {"target": None, **_trained(injection), "frozen": injection.frozen, **run}
        click.echo(json.dumps(record))
        return
    say(
        f"would train {injection.trainable:,} numbers in {len(injection.layers)} modules{_and(injection.heads)} "
        f"for {run['steps']} steps of {run['batch']} texts, and write {output}; "
        f"{injection.frozen:,} numbers stay frozen"
    )


def result(fitted: "Fitted", seen: "History", cut: Mapping[str, Any], *, output: Path, as_json: bool) -> None:
    """What a run made, and how well it does.

    ``seen`` is all that was logged of it, before it was stopped as well; ``cut`` what was left out of its texts.
    """
    if as_json:
        click.echo(json.dumps({**_record(fitted, seen, output), **cut}))
        return
    injection = fitted.injection
    say(
        f"wrote {output}: rank {injection.rank} in {len(injection.layers)} modules{_and(injection.heads)}, "
        f"{injection.trainable:,} numbers trained in {fitted.steps} steps"
    )
    written = _written(fitted)
    after = next((measures for step, measures in reversed(seen.evaluations) if step == written), None)
    if after is not None and len(seen.evaluations) > 1:
        step, before = seen.evaluations[0]
        gained = [f"{name} {_told(before.get(name))} → {_told(value)}" for name, value in after.items()]
        since = f"step {step}" if step else "before"
        say(f"evaluation, {since} → after: {', '.join(gained)}")
    if fitted.best_step is not None:
        say(f"best of the evaluations: step {fitted.best_step}, which is what was written")


def _written(fitted: "Fitted") -> int:
    """The step that the adapter is of."""
    return fitted.steps if fitted.best_step is None else fitted.best_step


def _told(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3f}"


def _record(fitted: "Fitted", seen: "History", output: Path) -> dict[str, Any]:
    """As JSON: ``loss`` is that of the step whose adapter was written."""
    return {
        "target": str(output),
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "loss": seen.losses.get(_written(fitted)),
        "evaluations": [{"step": step, **measures} for step, measures in seen.evaluations],
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
