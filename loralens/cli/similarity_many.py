"""``loralens similarity`` of three and more adapters: every pair, clustered, and where they meet."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.record import known, matrix
from loralens.cli.similarity import cell, module_records
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.compare.interference import Interference, Meeting
    from loralens.analysis.compare.pairwise import Of, Pairwise, Side
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter
    from loralens.linalg.factor import Floats

MATRIX = 12  # adapters whose matrices fit on a terminal
PAIRS = 12  # pairs that are listed
LINES = 8  # sentences about where two fight, and as many about where they agree


@dataclass(frozen=True, slots=True)
class _Collection:
    """What was measured, and how it is called."""

    paths: "Sequence[str]"
    labels: "Sequence[str]"
    pairs: "Pairwise"
    energy: "Interference"
    order: "Sequence[int]"
    tree: "Floats"
    fights: "Sequence[Meeting]"
    agreements: "Sequence[Meeting]"


def run(
    paths: Sequence[str],
    adapters: "Sequence[Adapter]",
    *,
    of: "Of",
    side: "Side | None",
    modules: Sequence[str],
    phi_rank: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare every adapter with every other: table, JSON or figure."""
    found = _measure(paths, adapters, of, modules, phi_rank)
    sides = [one for one in found.pairs.overlaps if side is None or of != "update" or one == side]
    if as_json:
        _write_json(found, adapters, of=of, side=side, phi_rank=phi_rank)
    else:
        _show(found, sides)
    if plot:
        from loralens.charts.pairwise import pairwise_figure

        options.draw(pairwise_figure(found.labels, found.pairs, found.energy, found.tree, sides), plot)


def _measure(
    paths: Sequence[str], adapters: "Sequence[Adapter]", of: "Of", modules: Sequence[str], phi_rank: int | None
) -> _Collection:
    from loralens.analysis.compare.interference import interference, meetings
    from loralens.analysis.compare.pairwise import leaves, pairwise
    from loralens.cli.progress import progress

    threads = os.cpu_count() or 1
    given: dict[str, Any] = {"of": of, "modules": modules, "phi_rank": phi_rank, "labels": paths}
    with progress("comparing", 2 * max(map(len, adapters))) as step:  # every module is read twice
        pairs = pairwise(adapters, **given, threads=threads, step=step)
        energy = interference(adapters, pairs.modules, threads=threads, step=step)
    tree, order = leaves(pairs.cosine)
    fights, agreements = meetings(pairs, fights=True), meetings(pairs, fights=False)
    return _Collection(paths, labels(paths), pairs, energy, order, tree, fights, agreements)


def labels(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share; each different."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(one) > shared + 1 for one in parts) and len({one[shared] for one in parts}) == 1:
        shared += 1
    short = [str(Path(*one[shared:])) for one in parts]
    return short if len(set(short)) == len(short) else [f"{name} ({i})" for i, name in enumerate(short, start=1)]


def _write_json(
    found: _Collection, adapters: "Sequence[Adapter]", *, of: "Of", side: "Side | None", phi_rank: int | None
) -> None:
    """One JSON object; its pairs are written one by one, as those of a hundred adapters take 200 MB."""
    from loralens.analysis.compare.similarity import side_of

    side = side_of(of, side)
    head = json.dumps({"loralens": __version__, "of": of, "side": side, **_record(found)})
    click.echo(f'{head[:-1]}, "pairs": [', nl=False)
    for i, record in enumerate(_pair_records(found, adapters, of=of, side=side, phi_rank=phi_rank)):
        click.echo((", " if i else "") + json.dumps(record), nl=False)
    click.echo("]}")


def _record(found: _Collection) -> dict[str, Any]:
    from loralens.analysis.compare.pairwise import groups

    pairs, energy = found.pairs, found.energy
    return {
        "adapters": list(found.paths),
        "cosine": matrix(pairs.cosine),
        "cosine_z": matrix(pairs.cosine_z),
        "phi": {one: matrix(pairs.phi(one)) for one in pairs.overlaps},
        "chance": {one: matrix(pairs.chance(one)) for one in pairs.overlaps},
        "shared_initialisation": matrix(pairs.shared_initialisation),
        "common_modules": pairs.common.tolist(),
        "order": list(found.order),
        "groups": groups(pairs.shared_initialisation),
        "interference": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "cosine": matrix(pairs.cosines[m]),
                "shared": [known(value) for value in energy.shared[m]],
                "private": [known(value) for value in energy.private[m]],
                "shared_chance": [known(value) for value in energy.shared_chance[m]],
                "private_chance": [known(value) for value in energy.private_chance[m]],
            }
            for m, module in enumerate(pairs.modules)
        ],
        "fights": [_meeting_record(one) for one in found.fights],
        "agreements": [_meeting_record(one) for one in found.agreements],
    }


def _pair_records(found: _Collection, adapters: "Sequence[Adapter]", **chosen: Any) -> Iterator[dict[str, Any]]:
    """φ maps, cosines and angles of every pair, as for two adapters alone."""
    from loralens.analysis.compare.similarity import compare_subspaces

    for s, t in combinations(range(len(adapters)), 2):
        held = [(one.holders[s], one.holders[t]) for one in found.pairs.modules]
        names = [first for first, second in held if first is not None and second is not None]
        compared = compare_subspaces(adapters[s], adapters[t], modules=names, **chosen) if names else None
        yield {"first": s, "second": t, "modules": module_records(compared) if compared else []}


def _meeting_record(one: "Meeting") -> dict[str, Any]:
    return {
        "first": one.first,
        "second": one.second,
        "stack": one.stack,
        "blocks": list(one.blocks),
        "kinds": list(one.kinds),
        "modules": one.modules,
        "cosine": one.cosine,
        "weight": one.weight,
    }


def _show(found: _Collection, sides: "Sequence[Side]") -> None:
    from loralens.analysis.compare.interference import LARGE, far
    from loralens.cli.table import count, show

    pairs = found.pairs
    tables = [_adapters_table(found)]
    if pairs.count <= MATRIX:
        tables.append(_matrix_table("cosine of the updates", pairs.cosine, found))
        for side in sides:
            title = f"φ, {side} side, mean over modules (chance {_chance(pairs, side)})"
            tables.append(_matrix_table(title, pairs.phi(side), found))
        tables.append(_matrix_table("shared initialisation: cosine of A", pairs.shared_initialisation, found))
    show(*tables, _pairs_table(found, sides))
    _say_common(found)
    _say_groups(found)
    rule = f"every module with |cosine| ≥ {LARGE} and {far(pairs):.1f} standard deviations from chance"
    for verb, met in (("fight", found.fights), ("agree", found.agreements)):
        if not met:
            say(f"no two {verb} anywhere ({rule})")
            continue
        say(f"where two {verb} ({rule}), most weight first")
        for one in met[:LINES]:
            names = f"{found.labels[one.first]} and {found.labels[one.second]}"
            say(f"  {names} {verb} in {one.where}: cosine {one.cosine:+.3f} over {count(one.modules, 'module')}")
        if len(met) > LINES:
            say(f"  … and {len(met) - LINES} more: --json lists them")


def _say_common(found: _Collection) -> None:
    """Who cannot be compared with whom, where not every pair has every module."""
    pairs = found.pairs
    alone = [found.labels[t] for t in range(pairs.count) if not pairs.ranks[:, t].any()]
    for label in alone:
        say(f"not compared: {label} has no module of the others' names and shapes")
    counts = pairs.common[~_diagonal(pairs.count)]
    if counts.min() < counts.max() or counts.min() < len(pairs.modules):
        say(f"pairs have {counts.min()} to {counts.max()} modules in common: each is compared on those", "")


def _diagonal(count: int) -> Any:
    import numpy as np

    return np.eye(count, dtype=bool)


def _chance(pairs: "Pairwise", side: "Side") -> str:
    """The chance level, or its range where ranks differ."""
    from loralens.cli.table import number

    levels = pairs.chance(side)[~_diagonal(pairs.count)]
    levels = levels[levels == levels]
    if not levels.size:
        return "–"
    low, high = number(levels.min()), number(levels.max())
    return low if low == high else f"{low} to {high}"


def _adapters_table(found: _Collection) -> "Table":
    from loralens.analysis.compare.pairwise import groups, mean
    from loralens.cli.table import Column, Table, number

    pairs, energy = found.pairs, found.energy
    family = {t: i for i, group in enumerate(groups(pairs.shared_initialisation), start=1) for t in group}
    energies = (energy.shared, energy.shared_chance, energy.private, energy.private_chance)
    parts = [mean(values) for values in energies]
    rows = []
    for place, t in enumerate(found.order, start=1):
        ranks = sorted({int(rank) for rank in pairs.ranks[:, t] if rank})
        rows.append(
            [
                str(place),
                found.labels[t],
                str(int((pairs.ranks[:, t] > 0).sum())),
                "–" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
                number(float((pairs.norms[:, t] ** 2).sum() ** 0.5)) if ranks else "–",
                *(cell(values[t], ".2%") for values in parts),
                str(family[t]),
            ]
        )
    heads = ("modules", "r", "‖ΔW‖F", "shared", "by chance", "private", "by chance", "start")
    title = f"{pairs.count} adapters, near ones side by side; energy inside and outside the others' directions"
    return Table(title, [Column("#"), Column("adapter", "left"), *map(Column, heads)], rows)


def _matrix_table(title: str, values: "Floats", found: _Collection) -> "Table":
    from loralens.cli.table import Column, Table

    heads = [Column(str(place)) for place in range(1, len(found.order) + 1)]
    rows = [
        [str(place), found.labels[s], *(cell(_steady(values[s, t])) for t in found.order)]
        for place, s in enumerate(found.order, start=1)
    ]
    return Table(title, [Column("#"), Column("", "left"), *heads], rows)


def _steady(value: float, places: int = 3) -> float:
    """Rounded as it is shown, so that what is 0 to rounding has no sign."""
    return round(float(value), places) + 0.0


def _pairs_table(found: _Collection, sides: "Sequence[Side]") -> "Table":
    """The pairs whose updates are most alike, or most opposed."""
    from loralens.cli.table import Column, Table

    pairs = found.pairs
    cosine, z, initial = pairs.cosine, pairs.cosine_z, pairs.shared_initialisation
    defined = [(s, t) for s, t in combinations(range(pairs.count), 2) if not isnan(cosine[s, t])]
    nearest = sorted(defined, key=lambda pair: -abs(cosine[pair]))[:PAIRS]
    phis = {side: (pairs.phi(side), pairs.chance(side)) for side in sides}

    rows = [
        [
            found.labels[s],
            found.labels[t],
            str(pairs.common[s, t]),
            f"{_steady(cosine[s, t]):+.3f}",
            f"{_steady(z[s, t], 1):+.1f}",
            *(cell(values[s, t]) for both in phis.values() for values in both),
            cell(initial[s, t]),
        ]
        for s, t in nearest
    ]
    heads = ["modules", "cosine", "z", *(head for side in sides for head in (f"φ {side}", "by chance")), "cosine of A"]
    shown = f"the {len(rows)} of {pairs.count * (pairs.count - 1) // 2} pairs" if len(defined) > PAIRS else "pairs"
    columns = [Column("adapter", "left"), Column("and", "left"), *map(Column, heads)]
    return Table(f"{shown} with the largest |cosine|", columns, rows)


def _say_groups(found: _Collection) -> None:
    """Who began from the same A, and what that does to φ."""
    from loralens.analysis.compare.pairwise import SHARED, groups

    pairs = found.pairs
    families = [group for group in groups(pairs.shared_initialisation) if len(group) > 1]
    for group in families:
        say(f"began from one A (cosine of A ≥ {SHARED}): {', '.join(found.labels[t] for t in group)}")
    if families and "in" in pairs.overlaps:
        click.echo("  between these, φ of the in side shows the common start, not a common task: read the out side\n")
