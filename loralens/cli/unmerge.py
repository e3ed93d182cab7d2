"""``loralens unmerge``: the base back from a merged model."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.terminal import say

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.linalg.device import Device

PATH = click.Path(path_type=Path)


@click.command("unmerge")
@click.argument("merged", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="Where the base is written.")
@click.option("--undo", type=PATH, metavar="FILE", help="The undo file of the merge: bit for bit. [default: in MERGED]")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER[:W]", help="Subtract this instead. Repeatable.")
@options.DEVICE
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@options.MODULES
@options.reading
def command(
    merged: Path,
    output: Path,
    undo: Path | None,
    adapters: tuple[str, ...],
    device: str,
    overwrite: bool,
    as_json: bool,
    modules: tuple[str, ...],
    **reading: Any,
) -> None:
    """Restore the base that adapters were merged into.

    With the undo file every bit of the base comes back, and its SHA-256 proves it; the adapters are not needed. With
    --adapter the update is subtracted, and what rounding leaves open is counted. Several merges are undone in the
    reverse order.
    """
    if undo and adapters:
        raise click.UsageError("--undo and --adapter exclude each other")
    if modules and not adapters:
        raise click.UsageError("--modules goes with --adapter: an undo file restores everything")
    from loralens.linalg.device import Device

    where = Device.of(device)  # what is wrong with it is said before the work
    report = (
        _by_subtraction(merged, output, adapters, modules, reading, device=where, overwrite=overwrite)
        if adapters
        else _by_patch(merged, output, undo, device=where, overwrite=overwrite)
    )
    if as_json:
        click.echo(json.dumps({"merged": str(merged), "output": str(output), **report}))
        return
    if report["exact"]:
        say(f"wrote {output}: {report['tensors']} tensors restored bit for bit, SHA-256 of each checked")
        return
    say(
        f"wrote {output}: {report['tensors']} tensors subtracted; of {report['entries']:,} entries "
        f"{report['several']:,} could have been several weights, {report['none']:,} none"
    )
    if report["none"]:
        click.echo("warning: this model was not made by merging this adapter, or was changed since", err=True)


def _by_patch(merged: Path, output: Path, undo: Path | None, *, device: "Device", overwrite: bool) -> dict[str, Any]:
    from loralens.cli.unmerge_run import UnmergeRun

    run = UnmergeRun(merged, undo, device)
    run.write(output, overwrite=overwrite)
    return {"exact": True, "tensors": len(run.held.entries)}


def _by_subtraction(
    merged: Path,
    output: Path,
    adapters: tuple[str, ...],
    modules: tuple[str, ...],
    reading: dict[str, Any],
    *,
    device: "Device",
    overwrite: bool,
) -> dict[str, Any]:
    from loralens.cli.merge_inputs import inputs
    from loralens.cli.progress import progress
    from loralens.errors import MismatchError
    from loralens.formats.models.model_writer import Change, copy_bytes, write_model
    from loralens.merging.apply import prepare
    from loralens.merging.undo.subtract import Doubt, subtracted

    given = inputs(adapters, str(merged), modules, reading, untie=False)
    plan = given.plan
    for tensor in plan.tensors.values():
        if tensor.replacement is not None or tensor.tokens or any(slab.magnitude for slab in tensor.slabs):
            raise MismatchError(
                f"{tensor.key} was replaced or scaled (DoRA) by the merge: subtracting does not give it back",
                fix="unmerge with --undo, or take the base from where it came",
            )
    doubts = {key: Doubt() for key in plan.tensors}
    changes = {key: Change(tensor.source.dtype, tensor.shape) for key, tensor in plan.tensors.items()}
    with progress("subtracting", copy_bytes(given.files.tensors, changes)) as step:
        write_model(
            given.files,
            output,
            changes=changes,
            fill=lambda key: (
                subtracted(block, doubts[key]) for block in prepare(plan.tensors[key], device=device).blocks()
            ),
            inputs=given.places("the merged model"),
            overwrite=overwrite,
            threads=os.cpu_count() or 1,
            step=step,
        )
    counts = {name: sum(getattr(d, name) for d in doubts.values()) for name in ("entries", "several", "none")}
    return {"exact": False, "tensors": len(plan.tensors), **counts}
