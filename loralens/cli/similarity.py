"""``loralens similarity``: what adapters share, as a table, JSON or a figure."""

import json
import os
from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.bases import warn_of_bases
from loralens.cli.record import known
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.compare.initialisation import Initialisation
    from loralens.analysis.compare.pairwise import Of, Side
    from loralens.analysis.compare.similarity import Comparison, Similarity
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter

WHOSE = {"update": "ΔW", "A": "A", "B": "B"}
STRONG = 0.5  # φ(1, 1) from which the strongest directions are counted as shared


@click.command("similarity")
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--of",
    type=click.Choice(list(WHOSE)),
    default="update",
    show_default=True,
    help="Whose directions: of ΔW, or of A (the LoRA paper's own quantity) or B alone.",
)
@click.option(
    "--side", type=click.Choice(["in", "out"]), help="Directions of the inputs or the outputs. [default: in; of B: out]"
)
@options.MODULES
@click.option(
    "--phi-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Compare at most the N leading directions. [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with the whole φ(i, j) of every module.")
@options.plot("Draw φ(i, j): .png, .svg or .pdf.")
@options.reading
def command(
    paths: tuple[str, ...],
    of: "Of",
    side: "Side | None",
    modules: tuple[str, ...],
    phi_rank: int | None,
    as_json: bool,
    plot: Path | None,
    **reading: Any,
) -> None:
    """Compare the directions of adapters, beside what chance would give.

    One ADAPTER: its own modules of equal width against each other. Two: φ(i, j), cosine, principal angles and CKA of
    every module. More: every pair, clustered. --alpha and --scale go to those that do not say their own.
    """
    from loralens.analysis.compare.similarity import side_of

    chosen = side_of(of, side)
    adapters = [options.load_if_unknown(path, reading) for path in paths]
    for path, adapter in zip(paths, adapters, strict=True):
        options.warn(path, adapter)
    warn_of_bases(paths, adapters)
    given: dict[str, Any] = {"of": of, "modules": modules, "phi_rank": phi_rank, "plot": plot, "as_json": as_json}
    if len(paths) == 1:
        from loralens.cli.similarity_one import run as run_one

        run_one(paths[0], adapters[0], side=chosen, **given)
    elif len(paths) == 2:
        run(paths, adapters, side=chosen, **given)
    else:
        from loralens.cli.similarity_many import run as run_many

        run_many(paths, adapters, side=side, **given)


def run(
    paths: Sequence[str],
    adapters: "Sequence[Adapter]",
    *,
    of: "Of",
    side: "Side",
    modules: Sequence[str],
    phi_rank: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare two adapters: table, JSON or figure."""
    from loralens.analysis.compare.initialisation import initialisation
    from loralens.analysis.compare.similarity import compare_subspaces
    from loralens.cli.progress import progress
    from loralens.core.training import same_start

    threads = os.cpu_count() or 1
    first, second = paths
    given: dict[str, Any] = {"of": of, "side": side, "modules": modules, "phi_rank": phi_rank}
    with progress("comparing", min(map(len, adapters))) as step:
        found = compare_subspaces(*adapters, **given, labels=(first, second), threads=threads, step=step)
    start = initialisation(found, recorded=same_start(*adapters))
    if start.text:
        say(f"warning: {start.text}", f"  fix: {start.advice}", err=True)
    if as_json:
        click.echo(json.dumps(_record(paths, found, start, of, side)))
    else:
        _show(paths, found, of, side)
    if plot:
        from loralens.charts.similarity import similarity_figure

        options.draw(similarity_figure(found, labels=(first, second), of=of), plot)


def _record(
    paths: Sequence[str], found: "Comparison", start: "Initialisation", of: "Of", side: "Side"
) -> dict[str, Any]:
    cosine = None if found.zero else found.cosine
    return {
        "loralens": __version__,
        "of": of,
        "side": side,
        "adapters": list(paths),
        "modules": module_records(found),
        "cosine": [[1.0, cosine], [cosine, 1.0]],
        "cosine_z": None if found.zero else found.cosine_z,
        "shared_initialisation": [[1.0, known(start.cosine)], [known(start.cosine), 1.0]],
        "initialisation": {
            "verdict": start.verdict,
            "text": start.text,
            "advice": start.advice,
            "alike": start.alike,
            "compared": start.compared,
            "phi": {end: known(value) for end, value in start.spans.items()},
            "chance": {end: known(value) for end, value in start.chance.items()},
        },
        "only_first": list(found.alone[0]),
        "only_second": list(found.alone[1]),
        "misfits": list(found.misfits),
    }


def module_records(found: "Comparison") -> list[dict[str, Any]]:
    """The modules of two adapters, for JSON; what is not defined is null."""
    return [_module_record(name, one) for name, one in found.items()]


def _module_record(name: str, one: "Similarity") -> dict[str, Any]:
    shown = one.overlap
    distances = ("projection_distance", "geodesic_distance", "gap")
    return {
        "name": name,
        "second_name": one.other,
        "shape": list(one.shape),
        "ranks": list(one.ranks),
        "directions": list(one.directions),
        "norms": list(one.norms),
        "cosine": None if one.zero else one.cosine,
        "cosine_z": None if one.zero else one.cosine_z,
        "phi": shown.phi.tolist(),
        "chance": shown.chance.tolist(),
        "phi_z": known(shown.z),
        "principal_angles": shown.angles.tolist(),
        **{name: getattr(shown, name) if shown.angles.size else None for name in distances},
        "sides": {
            end: {
                "first": known(two.first),
                "full": known(two.full),
                "chance": known(two.full_chance),
                "z": known(two.z),
            }
            for end, two in one.overlaps.items()
        },
        "cka": {end: known(value) for end, value in one.cka.items()},
        "cka_chance": {end: known(value) for end, value in one.cka_chance.items()},
        "shared_initialisation": known(one.initial),
        "zero": one.zero,
    }


def cell(value: float, form: str = ".3f") -> str:
    """A number in a table; a dash where there is none."""
    return "–" if isnan(value) else f"{value:{form}}"


def _show(paths: Sequence[str], found: "Comparison", of: "Of", side: "Side") -> None:
    from loralens.cli.table import show
    from loralens.core.names import some

    show(_modules_table(paths, found, of, side), _kinds_table(found))
    zero = {name: one.zero for name, one in found.items() if one.zero}
    notes = {
        "not compared, as ΔW is 0": [f"{name} ({which})" for name, which in zero.items()],
        "not compared, as the shapes differ": found.misfits,
        f"only in {paths[0]}": found.alone[0],
        f"only in {paths[1]}": found.alone[1],
    }
    for text, names in notes.items():
        if names:
            say(f"{text}: {some(names)}")


def _modules_table(paths: Sequence[str], found: "Comparison", of: "Of", side: "Side") -> "Table":
    from math import degrees

    from loralens.cli.table import Column, Table, count

    rows = []
    for name, one in found.items():
        shown = one.overlap
        angles = [degrees(angle) for angle in shown.angles]
        middle = (angles[(len(angles) - 1) // 2] + angles[len(angles) // 2]) / 2 if angles else float("nan")
        ends = (angles[0], middle, angles[-1]) if angles else (middle,) * 3
        rows.append(
            [
                name,
                f"{one.ranks[0]}" if one.ranks[0] == one.ranks[1] else f"{one.ranks[0]} | {one.ranks[1]}",
                cell(one.cosine if not one.zero else float("nan"), "+.3f"),
                cell(one.cosine_z if not one.zero else float("nan"), "+.1f"),
                cell(shown.first),
                cell(shown.full),
                cell(shown.full_chance, ".2g"),
                cell(shown.z, "+.1f"),
                *(cell(angle, ".1f") for angle in ends),
                cell(shown.projection_distance if angles else float("nan")),
                cell(one.cka[side]),
            ]
        )
    heads = ("r", "cosine", "z", "φ(1,1)", "φ(all)", "chance", "z", "θ min", "median", "max °", "distance", "CKA")
    whole = "" if found.zero else f", cosine {found.cosine:+.3f} in all (z {found.cosine_z:+.1f})"
    title = f"{paths[0]} and {paths[1]}: {count(len(found), 'module')}, {side} side of {WHOSE[of]}{whole}"
    return Table(title, [Column("module", "left"), *map(Column, heads)], rows)


def _kinds_table(found: "Comparison") -> "Table":
    """Means over the modules of each kind, on every side that was measured."""
    from loralens.cli.table import Column, Table
    from loralens.core.names import kind, natural_key

    kinds: dict[str, list[Similarity]] = {}
    for name, one in found.items():
        if not one.zero:
            kinds.setdefault(kind(name), []).append(one)
    rows = [
        _kind_row(label, side, kinds[label])
        for label in sorted(kinds, key=natural_key)
        for side in kinds[label][0].overlaps
    ]
    heads = ("modules", "cosine", "φ(1,1)", "chance", f"> {STRONG}", "φ(all)", "chance", "z", "CKA")
    return Table("mean by kind", [Column("kind", "left"), Column("side", "left"), *map(Column, heads)], rows)


def _kind_row(label: str, side: "Side", members: "Sequence[Similarity]") -> list[str]:
    shown = [one.overlaps[side] for one in members]
    return [
        label,
        side,
        str(len(members)),
        cell(_mean(members, lambda one: one.cosine), "+.3f"),
        cell(_mean(shown, lambda one: one.first), ".4f"),
        cell(_mean(shown, lambda one: 1 / one.n), ".2g"),
        str(sum(one.first > STRONG for one in shown)),
        cell(_mean(shown, lambda one: one.full), ".4f"),
        cell(_mean(shown, lambda one: one.full_chance), ".2g"),
        cell(_mean(shown, lambda one: one.z), "+.1f"),
        cell(_mean(members, lambda one: one.cka[side])),
    ]


def _mean(members: Sequence[Any], value: Callable[[Any], float]) -> float:
    """Mean of what is defined; NaN where nothing is."""
    values = [x for x in map(value, members) if not isnan(x)]
    return sum(values) / len(values) if values else float("nan")
