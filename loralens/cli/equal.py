"""``loralens equal``: is it the same update?"""

import json
from typing import Any

import click

from loralens.cli import options
from loralens.cli.bases import warn_of_bases
from loralens.cli.record import known
from loralens.cli.terminal import say


@click.command("equal")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    callback=options.finite,
    default=1e-6,
    show_default=True,
    help="Largest ‖ΔW₁−ΔW₂‖/‖ΔW‖.",
)
@click.option("--base", metavar="MODEL", help=f"{options.BASE_HELP} For GGUF: its head counts.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, every module.")
@options.reading
def command(first: str, second: str, tolerance: float, as_json: bool, **reading: Any) -> None:
    """Say whether A and B are the same update, whatever their dialects, ranks or gauge. Exit 0 if so, else 1.

    Modules are matched by name, else with dots and underscores taken as the same. --alpha and --scale go to whichever
    of the two does not say its own. Of two GGUF files one may say the head counts for both; else --base does.
    """
    from loralens.analysis.compare.equality import differences
    from loralens.cli.progress import progress
    from loralens.cli.table import Column, Table, show
    from loralens.errors import MismatchError
    from loralens.formats.dialects.gguf.reader import in_order_of, turned

    one, two = options.load_if_unknown(first, reading), options.load_if_unknown(second, reading)
    one, two = in_order_of(one, two), in_order_of(two, one)
    if turned(one) != turned(two):
        raise MismatchError(
            f"{first if turned(one) else second}: rows of q and k stand in llama.cpp's order, and nothing says the "
            "head counts by which to compare them with the other's",
            fix="give the base that it was trained on: --base DIR",
        )
    for path, adapter in ((first, one), (second, two)):
        options.warn(path, adapter)
    warn_of_bases((first, second), (one, two))
    with progress("comparing", max(len(one), len(two))) as step:
        found = differences(one, two, step=step)
    extra = len(one.extra) + len(two.extra)
    far = [d for d in found if not d.relative <= tolerance]
    worst = max((d.relative for d in found), default=0.0)
    if as_json:
        modules = [{"name": d.name, "relative": known(d.relative), "note": d.note} for d in found]
        click.echo(json.dumps({"equal": not far, "tolerance": tolerance, "not_compared": extra, "modules": modules}))
    else:
        rows = [[d.name, f"{d.relative:.3g}", d.note] for d in sorted(far, key=lambda d: -d.relative)[:20]]
        columns = (Column("module", "left"), Column("difference"), Column("", "left"))
        show(Table(f"{len(far)} of {len(found)} modules differ", columns, rows))
        say(f"{'different' if far else 'equal'}: largest difference {worst:.3g}, tolerance {tolerance:g}")
        if extra:
            say(f"not compared: {extra} tensors that are half of no pair (heads, biases, magnitudes …)")
    if far:
        click.get_current_context().exit(1)
