"""``loralens verify``: whether a merged model holds an adapter, and how faithfully."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.linalg.device import Device
    from loralens.merging.verify import Verdict

OUTCOMES = ("exact", "rounded", "partial", "absent")  # best first


@click.command("verify")
@click.argument("merged")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="ADAPTER[:W]", help="Repeatable.")
@click.option("--rounding", type=click.Choice(options.ROUNDINGS), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@options.untying(
    "Whether the merge gave the head a weight of its own. [default: as in MERGED, or as the adapter needs]"
)
@options.DEVICE
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@options.MODULES
@options.reading
def command(
    merged: str,
    base: str,
    adapters: tuple[str, ...],
    rounding: str,
    seed: int,
    untie: bool | None,
    device: str,
    as_json: bool,
    modules: tuple[str, ...],
    **reading: Any,
) -> None:
    """Say of every module whether MERGED holds it: the merge is replayed and compared.

    exact: every bit is what loralens writes. rounded: it is there in full, rounded otherwise. partial: at another
    strength, below 0.9 or above 1.1 or not what the rounding predicts. absent: below 0.1, as in the base or another
    model. What rounding itself took counts like what is missing. Exit code 0 for exact and rounded, 1 for partial and
    absent; the whole is as good as its worst module.
    """
    from loralens.linalg.device import Device

    where = Device.of(device)  # what is wrong with it is said before the work
    found, foreign = _verdicts(merged, base, adapters, modules, reading, rounding, seed, untie=untie, device=where)
    worst = max((one.outcome for one in found), key=OUTCOMES.index, default="exact")
    if as_json:
        record = {
            "loralens": __version__,
            "merged": merged,
            "base": base,
            "modules": [
                {
                    "name": one.module,
                    "verdict": one.outcome,
                    "gain": one.gain,
                    "predicted_gain": one.predicted,
                    "relative_error": one.error,
                    "different": one.different,
                }
                for one in found
            ],
            "others_changed": foreign,
            "verdict": worst,
        }
        click.echo(json.dumps(record))
    else:
        _show(merged, found, foreign, worst, rounding)
    if OUTCOMES.index(worst) > 1:
        click.get_current_context().exit(1)


def _verdicts(
    merged: str,
    base: str,
    adapters: tuple[str, ...],
    modules: tuple[str, ...],
    reading: dict[str, Any],
    rounding: str,
    seed: int,
    *,
    untie: bool | None,
    device: "Device",
) -> "tuple[list[Verdict], list[str]]":
    from loralens.cli.merge_inputs import inputs
    from loralens.cli.progress import progress
    from loralens.core.threads import in_threads
    from loralens.errors import MismatchError, place
    from loralens.formats.models.checkpoint import model_config, resolved, weights
    from loralens.formats.models.model_files import model_files
    from loralens.merging.apply import prepare
    from loralens.merging.rounding import Rounding
    from loralens.merging.tying import Tied
    from loralens.merging.verify import same, verdicts

    merged_tie = Tied.of(weights(Path(merged)), model_config(Path(merged)) or {})
    tensors, files = merged_tie.shown(weights(Path(merged))), model_files(resolved(Path(merged)))
    stored = merged_tie.shown(files.tensors)
    base_tensors = weights(Path(base))
    copies = Tied.of(base_tensors, model_config(Path(base)) or {}).missing
    if untie is None and any(key in stored and key not in merged_tie.missing for key in copies):
        untie = True  # as the merge did it, whether the adapter needs that or not
    given = inputs(adapters, base, modules, reading, untie=untie)
    planned = given.plan.tensors
    for key in planned:
        if key not in tensors:
            raise MismatchError(f"{merged} has no {key}", fix="give a merged model of this base")

    def replayed(key: str) -> "list[Verdict]":
        with place(key):
            how = Rounding(rounding, seed, key)  # type: ignore[arg-type]
            merge = prepare(planned[key], dtype=stored[key].dtype, rounding=how, device=device)
            found = verdicts(merge, tensors[key] if merge.requantised else stored[key])
        if step:
            step(planned[key].source.size)
        return found

    def changed(key: str) -> bool:
        found = key not in tensors or not same(base_tensors[key], tensors[key])
        if step:
            step(base_tensors[key].size)
        return found

    others, threads = [key for key in base_tensors if key not in planned], os.cpu_count() or 1
    sizes = [planned[key].source.size for key in planned] + [base_tensors[key].size for key in others]
    with progress("replaying the merge", sum(sizes)) as step:
        found = in_threads(replayed, list(planned), threads)
        foreign = in_threads(changed, others, threads)
    for model in (files, given.files):
        model.check_unchanged()
    return [one for some in found.values() for one in some], [key for key in others if foreign[key]]


def _show(merged: str, found: "list[Verdict]", foreign: list[str], worst: str, rounding: str) -> None:
    from loralens.cli.table import Column, Table, number, show
    from loralens.core.names import some

    rows = [
        [one.module, one.outcome, f"{one.gain:.4f}", number(one.error), f"{one.different:,}"]
        for one in sorted(found, key=lambda one: -OUTCOMES.index(one.outcome))
    ]
    columns = [Column("module", "left"), Column("verdict", "left"), *map(Column, ("gain", "error", "entries differ"))]
    show(Table(_headline(merged, found, worst), columns, rows))
    _explain([one for one in found if OUTCOMES.index(one.outcome) > 1], rounding)
    if foreign:
        what = (
            "1 tensor that the adapter does not touch is not that of the base"
            if len(foreign) == 1
            else f"{len(foreign)} tensors that the adapter does not touch are not those of the base"
        )
        say(f"note: {what}: {some(foreign)}")


def _headline(merged: str, found: "list[Verdict]", worst: str) -> str:
    """The worst verdict, and where it is not good the modules that have it."""
    from loralens.core.names import some

    if OUTCOMES.index(worst) < 2:
        return f"{merged}: {worst}"
    names = [one.module for one in found if one.outcome == worst]
    if len(names) == len(found) > 1:
        return f"{merged}: {worst}: all {len(names)} modules"
    count = f"{len(names)} of {len(found)} modules" if len(found) > 1 else "1 module"
    return f"{merged}: {worst}: {count}: {some(names)}"


def _explain(bad: "list[Verdict]", rounding: str) -> None:
    """Why modules do not hold, where their numbers tell."""
    from loralens.core.names import some

    rounded = [one.module for one in bad if one.by_rounding]
    other = [one for one in bad if not one.by_rounding and one.outcome == "partial"]
    if rounded:
        say(
            f"note: in {len(rounded)} of them every bit is what this merge writes, and rounding takes the rest: merge "
            f"with --dtype f32, or serve the adapter unmerged: {some(rounded)}"
        )
    if other:
        say(
            f"note: {other[0].module} has a gain of {other[0].gain:.4f}, where {rounding} rounding predicts "
            f"{other[0].predicted:.4f}: it was merged at another strength, rounded otherwise, or changed since"
        )
