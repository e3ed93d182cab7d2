"""``loralens drop``: an adapter without some of its modules."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loralens.cli import target
from loralens.cli.combine_recipe import writing
from loralens.cli.compress_form import Form
from loralens.cli.rounding import Rounding, quantised
from loralens.cli.terminal import say


@click.command("drop")
@click.argument("adapter")
@click.option("--modules", "-m", metavar="GLOB", multiple=True, required=True, help="These go. Repeatable.")
@writing
def command(adapter: str, modules: tuple[str, ...], **given: Any) -> None:
    """Write ADAPTER without the modules that match GLOB: what a block does is seen when it is gone.

    The others keep their stored bits. What hangs on a module (DoRA's magnitude, a bias on B) goes with it; heads and
    other tensors trained in full stay.
    """
    output: Path | None = given["output"]
    target.require(output, dry_run=given["dry_run"])
    from loralens.cli.combine_run import load
    from loralens.core.names import select
    from loralens.errors import OptionError, place
    from loralens.formats import save

    whole = load(adapter, given)
    form = Form.of(whole, to=given["to"], base=given["base"])
    if output:
        form.check(adapter, output, overwrite=given["overwrite"])
    with place(adapter):
        gone = set(select(whole, modules))
        if len(gone) == len(whole):
            raise OptionError("nothing would be left", fix="give a glob that some modules do not match")
    extra = {key: one for key, one in whole.extra.items() if one.module not in gone or one.role == "saved"}
    left = replace(whole.without(gone), extra=extra)
    rest = quantised(left, form.bits) if form.bits else target.narrowed(left, given["dtype"])
    allowed = given["allow_loss"] or form.bits is not None
    with place(adapter):
        cost = Rounding.between(left, rest.modules, allow_loss=allowed, dtype=given["dtype"])
    if output:
        save(rest, output, format=form.name, overwrite=given["overwrite"], dry_run=given["dry_run"], **form.given)
    written = None if given["dry_run"] else str(output)
    if given["as_json"]:
        record = {"source": adapter, "target": written, "format": form.name, "dropped": sorted(gone), "left": len(rest)}
        click.echo(json.dumps({**record, "rounding": cost.record()}))
        return
    if cost.worst:
        say(str(cost))
    what = f"{len(gone)} of {len(whole)} modules dropped, {len(rest)} left"
    say(f"{'would write' if written is None else 'wrote'} {output or form.name}: {what}")
