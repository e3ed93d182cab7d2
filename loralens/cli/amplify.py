"""``loralens amplify``: what ΔW amplifies of W, beside what chance and the best directions would give."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.record import known
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.base.amplification import Amplification, Kept
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter

Results = Mapping[str, "Amplification"]


@click.command("amplify")
@click.argument("path", metavar="ADAPTER")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option(
    "--rank", "ranks", type=click.IntRange(min=1), multiple=True, metavar="R", help="Leading directions of ΔW to keep. "
    "Repeatable. [default: all]",
)  # fmt: skip
@click.option("--no-top", is_flag=True, help="Leave out the leading directions of W: one pass over the base.")
@click.option(
    "--directions", type=click.IntRange(min=1), metavar="N", help="How many of W. [default: as many as of ΔW]"
)
@click.option("--exact", is_flag=True, help="Dense SVD of W: minutes and more memory for a big one.")
@click.option("--phi-rank", type=click.IntRange(min=1), default=16, show_default=True, help="Largest i, j of φ shown.")
@click.option("--device", default="cpu", show_default=True, help="Where to work on W: cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sketch and the start.")
@options.MODULES
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with curves, directions and φ.")
@options.plot("Draw it: .png, .svg or .pdf.")
@options.reading
def command(
    path: str,
    base: str,
    ranks: tuple[int, ...],
    no_top: bool,
    directions: int | None,
    exact: bool,
    phi_rank: int,
    device: str,
    seed: int,
    modules: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
    **reading: Any,
) -> None:
    """Show what ΔW amplifies of W: ‖ΔW‖/‖UᵀWV‖ with U, V the singular directions of ΔW (Table 7 of the LoRA paper).

    Beside it what uniform directions would catch of W, the excess over that with its z-score, and the most that any
    directions could. Weights of MODEL are read one at a time.
    """
    if no_top and directions:
        raise click.UsageError("--no-top and --directions exclude each other")
    how = {"ranks": ranks, "top": not no_top, "directions": directions or 0}
    found = _measure(path, base, modules, reading, {**how, "exact": exact, "device": device, "seed": seed})
    if as_json:
        record = {"loralens": __version__, "adapter": path, "base": base, "device": device, "exact": exact}
        rows = [_record(name, one, row, phi_rank) for name, one in found.items() for row in one.rows]
        click.echo(json.dumps({**record, "modules": rows}))
    else:
        _show(path, base, found)
    if plot:
        from loralens.charts.amplification import amplification_figure

        options.draw(amplification_figure(found, title=f"{path} on {base}", phi_rank=phi_rank), plot)


def _measure(
    path: str, base: str, modules: Sequence[str], reading: Mapping[str, Any], how: Mapping[str, Any]
) -> Results:
    from loralens.analysis.base.amplification import measure_amplification
    from loralens.analysis.base.weight_norms import work
    from loralens.cli.progress import progress
    from loralens.core.names import select
    from loralens.errors import place
    from loralens.linalg.device import Device

    threads = os.cpu_count() or 1
    device = Device.of(how["device"], threads=threads)  # what is wrong with it is said before the work
    adapter = options.read_adapter(path, reading, base=base)
    with place(path):
        names = select(adapter, modules)
    weights = options.base_weights(base, {name: adapter[name] for name in names})
    if weights.match.edit:
        say(f"note: {base}: {weights.match}", err=True)
    _say(path, adapter, names)
    chosen = weights.modules
    with place(path), progress("reading the base", work(chosen.values(), top=how["top"])) as step:
        found = measure_amplification(adapter, chosen, **{**how, "device": device}, modules=modules, step=step)
    zero = [name for name, one in found.items() if not one.s.size]
    if zero:
        from loralens.core.names import some

        say(f"note: {path}: {len(zero)} of {len(found)} modules do nothing (ΔW = 0): {some(zero)}", err=True)
    return found


def _say(path: str, adapter: "Adapter", names: Sequence[str]) -> None:
    """What of an adapter is not in its ΔW."""
    from loralens.core.carried import magnitudes

    bent = magnitudes(adapter).keys() & names
    if bent:
        text = f"{len(bent)} modules are DoRA: scale·B·A alone is measured, without their magnitudes"
        say(f"warning: {path}: {text}", err=True)


def _record(name: str, one: "Amplification", row: "Kept", phi_rank: int) -> dict[str, Any]:
    """One row of Table 7, and what lies behind it; what has no value is null."""
    record: dict[str, Any] = {
        "name": name,
        "shape": list(one.shape),
        "nominal_rank": one.rank,
        **_plain(row),
        "weight_norm": one.weight_norm,
        "relative_norm": known(row.delta_norm / one.weight_norm if one.weight_norm else float("nan")),
        "curve": [_plain(kept) for kept in one.curve[: row.rank]],
        "directions": [
            {"sigma": float(s), "projected": abs(float(p)), "amplification": known(float(factor))}
            for s, p, factor in zip(one.s, one.overlap.diagonal(), one.directions, strict=True)
        ][: row.rank],
        "phi": None,
    }
    if one.top:
        i, j = min(row.rank, phi_rank), phi_rank
        out, in_ = one.top.chance(one.shape)
        record["top"] = {"sigma": one.top.s.tolist(), "error": one.top.error.tolist(), "exact": one.top.exact}
        record["phi"] = {
            "out": one.top.out[:i, :j].tolist(),
            "in": one.top.in_[:i, :j].tolist(),
            "chance_out": out[:i, :j].tolist(),
            "chance_in": in_[:i, :j].tolist(),
        }
    return record


def _plain(row: "Kept") -> dict[str, Any]:
    return {key: value if isinstance(value, int) else known(value) for key, value in row._asdict().items()}


def _show(path: str, base: str, found: Results) -> None:
    from loralens.cli.table import show

    show(_modules_table(path, base, found), _kinds_table(found))
    for line in _reading(found):
        say(line)


def _modules_table(path: str, base: str, found: Results) -> "Table":
    from loralens.cli.table import Column, Table, number

    top = any(one.top for one in found.values())
    heads = ["r", "‖ΔW‖F", "‖W‖F", "UᵀWV: ΔW", *(["W"] if top else []), "random", "amplification", "excess", "z"]
    rows = []
    for name, one in found.items():
        for row in one.rows:
            best = [number(row.top_norm) if one.top else ""] if top else []
            shares = [number(row.projected_norm), *best, number(row.random_norm)]
            factors = [_cell(row.amplification), _cell(row.excess, ".3f"), _cell(row.z, "+.2f")]
            numbers = [*shares, *factors] if row.rank else [""] * (len(heads) - 3)
            rows.append([name, str(row.rank), number(row.delta_norm), number(one.weight_norm), *numbers])
    title = f"{path} on {base}: {len(found)} modules; ‖UᵀWV‖F with U, V of ΔW, {'of W, ' if top else ''}random"
    return Table(title, [Column("module", "left"), *map(Column, heads)], rows)


def _cell(value: float, form: str = ".4g") -> str:
    return "" if value != value else "∞" if value == float("inf") else format(value, form)


def _kinds_table(found: Results) -> "Table":
    """Medians of every kind, at the largest rank."""
    from loralens.analysis.base.amplification import FAR, count_far
    from loralens.cli.table import Column, Table, number
    from loralens.core.names import kind, natural_key

    members: dict[str, list[Kept]] = {}
    for name, one in found.items():
        if one.rows[-1].rank and one.weight_norm:
            members.setdefault(kind(name), []).append(one.rows[-1])
    rows = [
        [
            name,
            str(len(kept)),
            number(median(row.amplification for row in kept)),
            f"{median(row.excess for row in kept):.3f}",
            f"{median(row.z for row in kept):+.2f}",
            *_counts(*count_far(kept)),
        ]
        for name, kept in sorted(members.items(), key=lambda item: natural_key(item[0]))
    ]
    heads = ("modules", "amplification", "excess", "z", f"|z| > {FAR:g}", "by chance")
    return Table("medians by kind", [Column("kind", "left"), *map(Column, heads)], rows)


def _counts(far: int, expected: float) -> tuple[str, str]:
    """A count, and how many chance gives of it."""
    return str(far), f"{expected:.2g}"


def _reading(found: Results) -> list[str]:
    """What the table says, in words."""
    from loralens.analysis.base.amplification import FAR, count_far
    from loralens.cli.table import number

    alive = [one for one in found.values() if one.rows[-1].rank and one.weight_norm]
    if not alive:
        return ["no module has both a ΔW and a W that are not 0"]
    rows = [one.rows[-1] for one in alive]
    relative = [row.delta_norm / one.weight_norm for row, one in zip(rows, alive, strict=True)]
    (far, expected), count = count_far(rows), len(rows)
    spans = [
        f"{what} {number(low)}" + (f" to {number(high)}" if high > low else "")
        for what, low, high in (
            ("amplification", min(r.amplification for r in rows), max(r.amplification for r in rows)),
            ("‖ΔW‖/‖W‖", min(relative), max(relative)),
            ("excess over random", min(r.excess for r in rows), max(r.excess for r in rows)),
        )
    ]
    beyond = f"{far} of {count} modules are beyond {FAR:g} standard deviations of random directions"
    lines = ["; ".join(spans), f"{beyond}, where chance gives {expected:.2g}"]
    if 10 * far <= count:
        lines.append("the factor tells how long ΔW is beside W, not that it found particular directions of W")
    worst = max((r.top_error / r.top_norm for r in rows if r.top_norm > 0), default=0.0)
    if worst > 0:
        lines.append(f"the column of W is from a randomised SVD, its relative error at most {worst:.1g}")
    return lines
