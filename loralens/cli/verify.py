"""``loralens verify``: whether a merged model holds an adapter, and how faithfully."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.merge.verify import Verdict

OUTCOMES = ("exact", "rounded", "partial", "absent")  # best first


@click.command("verify")
@click.argument("merged")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="ADAPTER[:W]", help="Repeatable.")
@click.option("--rounding", type=click.Choice(options.ROUNDINGS), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@click.option("--untie", is_flag=True, help="The merge gave the head a weight of its own.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@options.MODULES
@options.reading
def command(
    merged: str,
    base: str,
    adapters: tuple[str, ...],
    rounding: str,
    seed: int,
    untie: bool,
    as_json: bool,
    modules: tuple[str, ...],
    **reading: Any,
) -> None:
    """Say of every module whether MERGED holds it: the merge is replayed and compared.

    exact: every bit is what loralens writes. rounded: it is there in full, rounded otherwise. partial: some of it.
    absent: the base, or another model. Exit code 0 for exact and rounded, 1 for partial and absent.
    """
    found, foreign = _verdicts(merged, base, adapters, modules, reading, rounding, seed, untie=untie)
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
        _show(merged, found, foreign, worst)
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
    untie: bool,
) -> "tuple[list[Verdict], list[str]]":
    from loralens.cli.merge_inputs import inputs
    from loralens.errors import MismatchError, place
    from loralens.formats.checkpoint import resolved, weights
    from loralens.formats.model_files import model_files
    from loralens.merge.apply import prepare
    from loralens.merge.rounding import Rounding
    from loralens.merge.verify import same, verdicts

    given = inputs(adapters, base, modules, reading, untie=untie)
    tensors, stored = weights(Path(merged)), model_files(resolved(Path(merged))).tensors
    found = []
    for key, tensor in given.plan.tensors.items():
        if key not in tensors:
            raise MismatchError(f"{merged} has no {key}", fix="give a merged model of this base")
        with place(key):
            merge = prepare(tensor, dtype=stored[key].dtype, rounding=Rounding(rounding, seed, key))  # type: ignore[arg-type]
            found += verdicts(merge, tensors[key] if merge.requantised else stored[key])
    base_tensors = weights(Path(base))
    others = [key for key in base_tensors if key not in given.plan.tensors]
    return found, [key for key in others if key not in tensors or not same(base_tensors[key], tensors[key])]


def _show(merged: str, found: "list[Verdict]", foreign: list[str], worst: str) -> None:
    from loralens.cli.table import Column, Table, number, show

    rows = [
        [one.module, one.outcome, f"{one.gain:.4f}", number(one.error), f"{one.different:,}"]
        for one in sorted(found, key=lambda one: -OUTCOMES.index(one.outcome))
    ]
    columns = [Column("module", "left"), Column("verdict", "left"), *map(Column, ("gain", "error", "entries differ"))]
    show(Table(f"{merged}: {worst}", columns, rows))
    if foreign:
        names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        what = (
            "1 tensor that the adapter does not touch is not that of the base"
            if len(foreign) == 1
            else f"{len(foreign)} tensors that the adapter does not touch are not those of the base"
        )
        click.echo(f"note: {what}: {names}")
