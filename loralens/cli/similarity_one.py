"""``loralens similarity`` of one adapter: which of its modules nest in which."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.record import matrix
from loralens.cli.similarity import WHOSE, cell
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.compare.nested import Nesting
    from loralens.analysis.compare.pairwise import Of, Side
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter


def run(
    path: str,
    adapter: "Adapter",
    *,
    of: "Of",
    side: "Side",
    modules: Sequence[str],
    phi_rank: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare the modules of one adapter with each other: table, JSON or figure."""
    from loralens.analysis.compare.nested import nesting
    from loralens.cli.progress import progress

    threads = os.cpu_count() or 1
    given: dict[str, Any] = {"of": of, "side": side, "modules": modules, "phi_rank": phi_rank}
    with progress("comparing", 2 * len(adapter)) as step:
        found = nesting(adapter, **given, threads=threads, step=step)
    if as_json:
        click.echo(json.dumps(_record(path, found, of, side)))
    else:
        _show(path, found, of, side)
    if plot:
        from loralens.charts.similarity_nested import nesting_figure

        options.draw(nesting_figure(found, label=path, of=of, side=side), plot)


def _record(path: str, found: "Sequence[Nesting]", of: "Of", side: "Side") -> dict[str, Any]:
    return {
        "loralens": __version__,
        "of": of,
        "side": side,
        "adapters": [path],
        "groups": [
            {
                "width": one.width,
                "modules": list(one.names),
                "directions": one.directions.tolist(),
                "first": matrix(one.first),
                "phi": matrix(one.full),
                "chance": matrix(one.chance),
                "z": matrix(one.z),
            }
            for one in found
        ],
        "cosine": [[1.0]],
        "shared_initialisation": [[1.0]],
    }


def _show(path: str, found: "Sequence[Nesting]", of: "Of", side: "Side") -> None:
    from loralens.cli.table import show
    from loralens.core.names import some

    several = [one for one in found if len(one.names) > 1]
    for one in several:
        title = f"{path}: {len(one.names)} modules of width {one.width}, {side} side of {WHOSE[of]}"
        show(_relations_table(title, one), _closest_table(one))
    alone = [name for one in found if len(one.names) == 1 for name in one.names]
    if alone:
        say(f"no other module is as wide as {some(alone)}")
    zero = [name for one in found for name, k in zip(one.names, one.directions, strict=True) if not k]
    if zero:
        say(f"not compared, as {WHOSE[of]} is 0: {some(zero)}")


def _relations_table(title: str, one: "Nesting") -> "Table":
    from loralens.analysis.compare.nested import relations
    from loralens.cli.table import Column, Table

    rows = [
        [
            *pair.kinds,
            str(pair.pairs),
            cell(pair.first),
            cell(pair.same, ".4f"),
            cell(pair.next, ".4f"),
            cell(pair.apart, ".4f"),
            cell(pair.chance, ".2g"),
        ]
        for pair in relations(one)
    ]
    heads = ("pairs", "φ(1,1) nearest", "φ(all) same block", "next block", "farther", "chance")
    return Table(title, [Column("kind", "left"), Column("and", "left"), *map(Column, heads)], rows)


def _closest_table(one: "Nesting") -> "Table":
    from loralens.analysis.compare.nested import closest
    from loralens.cli.table import Column, Table

    chance, z = one.chance, one.z
    rows = [
        [
            one.names[i],
            one.names[j],
            cell(float(one.first[i, j])),
            cell(float(one.full[i, j]), ".4f"),
            cell(float(chance[i, j]), ".2g"),
            cell(float(z[i, j]), "+.1f"),
        ]
        for i, j in closest(one)
    ]
    heads = ("φ(1,1)", "φ(all)", "chance", "z")
    title = "share most, beside chance"
    return Table(title, [Column("module", "left"), Column("and", "left"), *map(Column, heads)], rows)
