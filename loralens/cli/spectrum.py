"""``loralens spectrum``: singular values of every module, as a table, JSON, CSV or a figure."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.base.weight_norms import WeightNorms
    from loralens.analysis.groups import Group
    from loralens.analysis.spectrum import Spectrum
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter

Spectra = Mapping[str, "Spectrum"]
Norms = Mapping[str, "WeightNorms"]

FRACTIONS = (0.9, 0.95, 0.99)
MEASURES = (
    "frobenius",
    "spectral",
    "nuclear",
    "numerical_rank",
    "stable_rank",
    "effective_rank",
    "effective_rank_energy",
    "participation_ratio",
)
SORTS = ("name", "rank", *MEASURES)
RELATIVE = ("weight_frobenius", "weight_spectral", "weight_spectral_error", "relative_frobenius", "relative_spectral")
GROUPS_SHOWN = 40  # lines of "by block" that still fit a person's patience


@click.command("spectrum")
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER...")
@options.MODULES
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the first N modules in the order of --sort.")
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    help="Largest first; 'name' is natural order. [default: name; with --top: frobenius]",
)
@click.option("--base", metavar="MODEL", help="Also say how large ΔW is beside W. " + options.BASE_HELP)
@click.option("--device", metavar="NAME", help="Where to work on W: cpu, cuda or cuda:N. [default: cpu]")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, everything.")
@click.option("--csv", "as_csv", is_flag=True, help="One line a module.")
@options.plot("Draw the spectra: .png, .svg or .pdf.")
@options.reading
def command(
    paths: tuple[str, ...],
    modules: tuple[str, ...],
    top: int | None,
    sort: str | None,
    base: str | None,
    device: str | None,
    as_json: bool,
    as_csv: bool,
    plot: Path | None,
    **reading: Any,
) -> None:
    """Show the singular values of ΔW = scale·B·A for every module, and the ranks and norms they imply.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. ΔW is never formed.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    if device and not base:
        raise click.UsageError("--device is where the weights of --base are worked on")
    measured = [_measure(path, base, modules, reading) for path in paths]
    chosen = [(path, adapter, _order(spectra, sort, top)) for path, adapter, spectra in measured]
    norms = [_weight_norms(adapter, spectra, base, device) if base else {} for _, adapter, spectra in chosen]
    if as_json:
        adapters = [_record(*one, beside) for one, beside in zip(chosen, norms, strict=True)]
        click.echo(json.dumps({"loralens": __version__, **({"base": base} if base else {}), "adapters": adapters}))
    elif as_csv:
        _write_csv(chosen, norms)
    else:
        for (path, adapter, spectra), (_, _, rows), beside in zip(measured, chosen, norms, strict=True):
            _show(path, adapter, spectra, rows, beside)
    if plot:
        from loralens.charts.spectrum import spectrum_figure

        options.draw(spectrum_figure({path: spectra for path, _, spectra in measured}), plot)


def _measure(
    path: str, base: str | None, modules: Sequence[str], reading: Mapping[str, Any]
) -> "tuple[str, Adapter, Spectra]":
    from loralens.analysis.spectrum import measure_spectrum
    from loralens.cli.progress import progress
    from loralens.errors import place

    adapter = options.read_adapter(path, reading, base=base)
    with place(path), progress(f"reading {path}", len(adapter)) as step:
        return path, adapter, measure_spectrum(adapter, modules=modules, threads=os.cpu_count() or 1, step=step)


def _weight_norms(adapter: "Adapter", spectra: Spectra, base: str, device: str | None) -> Norms:
    """Norms of the base weights of the modules to be shown."""
    from loralens.analysis.base.weight_norms import weight_norms, work
    from loralens.cli.progress import progress
    from loralens.errors import place
    from loralens.linalg.device import Device

    where = Device.of(device or "cpu", threads=os.cpu_count() or 1)
    weights = options.base_weights(base, {name: adapter[name] for name in spectra}).modules
    with place(base), progress("reading the base", work(weights.values(), top=True)) as step:
        return weight_norms(weights, device=where, step=step)


def _beside(one: "Spectrum", norms: "WeightNorms | None") -> dict[str, float | None]:
    """ΔW beside W; what would be divided by 0 is None."""
    if norms is None:
        return {}
    shares = (
        one.frobenius / norms.frobenius if norms.frobenius else None,
        one.spectral / norms.spectral if norms.spectral else None,
    )
    return dict(zip(RELATIVE, (norms.frobenius, norms.spectral, norms.spectral_error, *shares), strict=True))


def _order(spectra: Spectra, sort: str | None, top: int | None) -> Spectra:
    """The modules to list: in natural order, or largest first; ``--top`` alone means the largest norms."""
    key = sort or ("frobenius" if top else "name")
    names = list(spectra)
    if key != "name":
        names.sort(key=lambda name: getattr(spectra[name], key), reverse=True)
    return {name: spectra[name] for name in names[:top]}


def _record(path: str, adapter: "Adapter", spectra: Spectra, norms: Norms) -> dict[str, Any]:
    from loralens.analysis.groups import total

    chosen = [adapter[name] for name in spectra]
    return {
        "path": path,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "modules": [
            {**_module_record(name, adapter, one), **_beside(one, norms.get(name))} for name, one in spectra.items()
        ],
        "total": {
            "modules": len(chosen),
            "parameters": sum(module.parameters for module in chosen),
            "bytes": sum(module.nbytes for module in chosen),
            "frobenius": total(spectra.values()),
        },
        "findings": [finding.record() for finding in adapter.findings],
    }


def _module_record(name: str, adapter: "Adapter", one: "Spectrum") -> dict[str, Any]:
    module = adapter[name]
    return {
        "name": name,
        "shape": list(one.shape),
        "rank": one.rank,
        "scale": module.scale,
        "scale_source": str(module.scaling),
        "dtype": str(module.dtype),
        "singular_values": one.s.tolist(),
        **{measure: getattr(one, measure) for measure in MEASURES},
        "energy_rank": {str(fraction): one.energy_rank(fraction) for fraction in FRACTIONS},
    }


def _write_csv(chosen: "Sequence[tuple[str, Adapter, Spectra]]", norms: Sequence[Norms]) -> None:
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    energies = [f"energy_rank_{fraction:g}" for fraction in FRACTIONS]
    more = RELATIVE if any(norms) else ()
    heads = ["path", "name", "out", "in", "rank", "scale", "dtype", *MEASURES, *energies, "singular_values", *more]
    writer.writerow(heads)
    for (path, adapter, spectra), beside in zip(chosen, norms, strict=True):
        for name, one in spectra.items():
            record = _module_record(name, adapter, one)
            writer.writerow(
                [path, name, *record["shape"], record["rank"], record["scale"], record["dtype"]]
                + [record[measure] for measure in MEASURES]
                + list(record["energy_rank"].values())
                + [" ".join(map(repr, record["singular_values"]))]
                + list(_beside(one, beside.get(name)).values())
            )


def _show(path: str, adapter: "Adapter", spectra: Spectra, rows: Spectra, norms: Norms) -> None:
    from loralens.analysis.groups import by_block, by_kind
    from loralens.cli.table import show

    show(
        _modules_table(path, adapter, spectra, rows, norms),
        _groups_table("by kind", by_kind(spectra)),
        _groups_table("by block", by_block(spectra)[:GROUPS_SHOWN]),
        _outliers_table(spectra),
    )


def _modules_table(path: str, adapter: "Adapter", spectra: Spectra, rows: Spectra, norms: Norms) -> "Table":
    from loralens.analysis.groups import total
    from loralens.cli.table import Column, Table, number, spark

    heads = ("out × in", "r", "scale", "‖ΔW‖F", "σ₁", "stable", "effective", "E90", "E99")
    more = ("‖ΔW‖/‖W‖", "σ₁/σ₁(W)") if norms else ()
    columns = [Column("module", "left"), *map(Column, (*heads, *more)), Column("spectrum", "left")]
    lines = [
        [
            name,
            f"{one.shape[0]} × {one.shape[1]}",
            str(one.rank),
            number(adapter[name].scale),
            number(one.frobenius),
            number(one.spectral),
            f"{one.stable_rank:.2f}",
            f"{one.effective_rank:.2f}",
            str(one.energy_rank(0.9)),
            str(one.energy_rank(0.99)),
            *("" if share is None else number(share) for share in [*_beside(one, norms.get(name)).values()][-2:]),
            spark(one.s.tolist()),
        ]
        for name, one in rows.items()
    ]
    count = f"{len(rows)} of {len(spectra)}" if len(rows) < len(spectra) else f"{len(spectra)}"
    title = f"{path}: {count} modules, ‖ΔW‖F = {number(total(spectra.values()))} in all"
    worst = max((n.spectral_error / n.spectral for n in norms.values() if n.spectral), default=0.0)
    title += f"; σ₁(W) by randomised SVD, error at most {worst:.1%}" if worst else ""
    return Table(title, columns, lines)


def _groups_table(title: str, groups: "Sequence[Group]") -> "Table":
    from loralens.cli.table import Column, Table, number

    heads = ("modules", "‖ΔW‖F", "energy", "effective", "zero")
    stacks = {group.name.rpartition(".")[0] for group in groups if group.name != "outside"}
    shorten = title == "by block" and len(stacks) == 1
    rows = [
        [
            group.name.rpartition(".")[2] if shorten else group.name,
            str(group.modules),
            number(group.frobenius),
            f"{group.share:.1%}",
            f"{group.effective_rank:.2f}",
            str(group.zero) if group.zero else "",
            _bar(group.share, max(g.share for g in groups)),
        ]
        for group in groups
    ]
    columns = [Column(title.removeprefix("by "), "left"), *map(Column, heads), Column("share of energy", "left")]
    return Table(title, columns, rows)


def _bar(share: float, largest: float) -> str:
    return "█" * round(20 * share / largest) if largest else ""


def _outliers_table(spectra: Spectra) -> "Table":
    from loralens.analysis.outliers import QUANTITIES, outliers
    from loralens.cli.table import Column, Table, number

    rows = [
        [
            o.name, QUANTITIES[o.quantity], number(o.value), number(o.typical),
            f"{o.value / o.typical:.2f} ×" if o.typical > 0 else "", f"{o.chance:.1g}",
        ]
        for o in outliers(spectra)[:10]
    ]  # fmt: skip
    heads = (Column("module", "left"), Column("quantity", "left"), *map(Column, ("value", "median", "ratio", "chance")))
    return Table("stand apart from their kind and shape (chance: of such a gap where nothing is odd)", heads, rows)
