"""``loralens curve``: what every rank would take and lose, before anything is written."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import compress_rule, options
from loralens.cli.compress_form import FEW, Form
from loralens.cli.convert import TARGETS
from loralens.verbs.outputs.rules import read_moments, read_protection
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.compression.curve import Choice, Point
    from loralens.compression.plan import Plan
    from loralens.compression.protection import Protection
    from loralens.core.adapter import Adapter


@click.command("curve")
@click.argument("source")
@click.option("--to", type=click.Choice(TARGETS), help="The dialect of the file. [default: the source's own]")
@click.option("--dtype", type=click.Choice(list(options.DTYPES)), help="The dtype of the file. [default: as it is]")
@compress_rule.PROTECT
@compress_rule.ACTIVATIONS
@click.option("--base", metavar="MODEL", help=f"{options.BASE_HELP} For GGUF.")
@options.MODULES
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@options.plot("Draw it: .png, .svg or .pdf.")
@options.reading
def command(
    source: str,
    to: str | None,
    dtype: str | None,
    weights: str,
    activations: str | None,
    base: str | None,
    modules: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
    **reading: Any,
) -> None:
    """Show rank against size against error: for one rank everywhere, and for ranks where they save most.

    Every line is a file that `loralens compress` would write: with --rank R, with a --size of the same bytes, and with
    that size and --to loralens-q (expected, not measured). Errors are those of truncation; rounding to bfloat16 adds
    about 0.2 % of ‖ΔW‖ in quadrature, float16 0.03 %. With --activations they are those on the data, and nothing is
    said of few bits.
    """
    from loralens.cli.progress import progress
    from loralens.compression.plan import Plan
    from loralens.errors import place

    adapter = options.read_adapter(source, reading, base=base)
    form = Form.of(adapter, to=to or (None if adapter.format in TARGETS else "peft"), base=base)
    moments = read_moments(activations)
    with place(source):
        narrow, threads = options.dtype_of(dtype), os.cpu_count() or 1
        with progress("reading", len(adapter)) as step:
            plan = Plan.of(adapter, modules=modules, dtype=narrow, moments=moments, threads=threads, step=step)
        points = trade_off(plan, form, protect=read_protection(weights), on_data=moments is not None)
    if as_json:
        click.echo(json.dumps(_record(source, form, adapter, points, activations)))
    else:
        _show(source, form, adapter, points, on_data=moments is not None)
    if plot:
        from loralens.charts.curve import curve_figure

        options.draw(curve_figure(source, points, on_data=moments is not None), plot)


def trade_off(plan: "Plan", form: Form, *, protect: "Protection" = "absolute", on_data: bool = False) -> "list[Point]":
    """The points of the curve for a dialect; in few bits too, where all modules are pairs and errors those of ΔW."""
    from loralens.cli.progress import progress
    from loralens.compression.curve import curve, ranks_shown
    from loralens.core.structured import Structured

    pairs = not any(isinstance(module, Structured) for module in plan.adapter.modules.values())
    size = replace(form, bits=8 if form.name == FEW else None).size
    header = _header(plan.adapter) if pairs and not on_data else None
    most = max((plan.adapter[name].rank for name in plan.found), default=0)
    with progress("choosing ranks", len(ranks_shown(most))) as step:
        return curve(plan, size=size, one_rank=form.one_rank, protect=protect, header=header, step=step)


def _header(adapter: "Adapter") -> int:
    """Bytes of a file in few bits beside its directions."""
    from loralens.core.quantised import direction_bytes

    ranks = {name: min(module.rank, *module.shape) for name, module in adapter.items()}
    whole = Form(FEW, {}, bits=8).size(adapter)
    return whole - sum(rank * direction_bytes(adapter[name].shape, 8) for name, rank in ranks.items())


def _record(
    source: str, form: Form, adapter: "Adapter", points: "Sequence[Point]", activations: str | None
) -> dict[str, Any]:
    error = "relative_error" if activations is None else "data_error"
    return {
        "loralens": __version__,
        "source": source,
        "format": form.name,
        "activations": activations,
        "modules": len(adapter),
        "points": [
            {
                "rank": point.rank,
                "uniform": _choice(point.uniform, error),
                "budget": _choice(point.budget, error),
                "few_bits": {"bytes": point.uniform.bytes, "expected_error": point.few_bits},
            }
            for point in points
        ],
    }


def _choice(one: "Choice", error: str) -> dict[str, Any]:
    return {
        "ranks": list(one.ranks),
        "parameters": one.parameters,
        "bytes": one.bytes,
        error: one.error,
    }


def _show(source: str, form: Form, adapter: "Adapter", points: "Sequence[Point]", *, on_data: bool) -> None:
    from loralens.cli.compress_report import percent
    from loralens.cli.table import Column, Table, show, size

    few = [] if on_data else ["in few bits"]
    heads = ("rank", "parameters", f"{form.name} file", "error", "by budget", "its ranks", *few)
    rows = [
        [
            str(point.rank),
            f"{point.uniform.parameters:,}",
            size(point.uniform.bytes),
            percent(point.uniform.error),
            percent(point.budget.error),
            "–".join(map(str, dict.fromkeys(point.budget.ranks))),
            *(percent(point.few_bits) for _ in few),
        ]
        for point in points
    ]
    error = "√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) on the data" if on_data else "‖ΔW−ΔW'‖/‖ΔW‖"
    title = f"{source}: {len(adapter)} modules; {error} over all of them"
    show(Table(title, [Column(head) for head in heads], rows))
