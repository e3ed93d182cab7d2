"""``loralens unmerge``: the base back from a merged model."""

import json
import os
from pathlib import Path
from typing import Any

import click

from loralens.cli import options

PATH = click.Path(path_type=Path)


@click.command("unmerge")
@click.argument("merged", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="Where the base is written.")
@click.option("--undo", type=PATH, metavar="FILE", help="The undo file of the merge: bit for bit. [default: in MERGED]")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER[:W]", help="Subtract this instead. Repeatable.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@options.MODULES
@options.reading
def command(
    merged: Path,
    output: Path,
    undo: Path | None,
    adapters: tuple[str, ...],
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
    report = (
        _by_subtraction(merged, output, adapters, modules, reading, overwrite=overwrite)
        if adapters
        else _by_patch(merged, output, undo, overwrite=overwrite)
    )
    if as_json:
        click.echo(json.dumps({"merged": str(merged), "output": str(output), **report}))
        return
    if report["exact"]:
        click.echo(f"wrote {output}: {report['tensors']} tensors restored bit for bit, SHA-256 of each checked")
        return
    click.echo(
        f"wrote {output}: {report['tensors']} tensors subtracted; of {report['entries']:,} entries "
        f"{report['several']:,} could have been several weights, {report['none']:,} none"
    )
    if report["none"]:
        click.echo("warning: this model was not made by merging this adapter, or was changed since", err=True)


def _by_patch(merged: Path, output: Path, undo: Path | None, *, overwrite: bool) -> dict[str, Any]:
    from loralens.errors import MismatchError, place
    from loralens.formats.checkpoint import resolved
    from loralens.formats.model_files import model_files
    from loralens.formats.model_writer import Change, write_model
    from loralens.formats.undo import NAME, read_undo
    from loralens.merge.undo import restored
    from loralens.merge.undo_layout import unpacked

    root = resolved(merged)
    file = undo or (root / NAME if root.is_dir() else root.with_name(f"{root.stem}.{NAME}"))
    arrays, content = read_undo(file)
    files = model_files(root)
    known = files.tensors
    with place(file):
        undone = {key: unpacked(key, entry, arrays) for key, entry in content["tensors"].items()}
        missing = [key for key in (*undone, *content["added"]) if key not in known]
        if missing:
            raise MismatchError(
                f"{merged} has no {missing[0]}, which was merged", fix="give the model that it was written for"
            )
    texts = content["texts"] if root.is_dir() else {}
    write_model(
        files,
        output,
        changes={key: Change(one.dtype, one.shape) for key, one in undone.items()},
        fill=lambda key: restored(undone[key], known[key]),
        dropped=content["added"],
        headers={name: _header(text) for name, text in content["headers"].items() if root.is_dir()}
        or {files.shards[0].name: _header(next(iter(content["headers"].values())))},
        texts=texts,
        without=(NAME, "merge_certificate.json"),
        overwrite=overwrite,
        threads=os.cpu_count() or 1,
    )
    return {"exact": True, "tensors": len(undone)}


def _header(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def _by_subtraction(
    merged: Path,
    output: Path,
    adapters: tuple[str, ...],
    modules: tuple[str, ...],
    reading: dict[str, Any],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    from loralens.cli.merge_inputs import inputs
    from loralens.errors import MismatchError
    from loralens.formats.model_writer import Change, write_model
    from loralens.merge.apply import prepare
    from loralens.merge.subtract import Doubt, subtracted

    given = inputs(adapters, str(merged), modules, reading)
    plan = given.plan
    for tensor in plan.tensors.values():
        if tensor.replacement is not None or tensor.tokens or any(slab.magnitude for slab in tensor.slabs):
            raise MismatchError(
                f"{tensor.key} was replaced or scaled (DoRA) by the merge: subtracting does not give it back",
                fix="unmerge with --undo, or take the base from where it came",
            )
    doubts = {key: Doubt() for key in plan.tensors}
    write_model(
        given.files,
        output,
        changes={key: Change(tensor.source.dtype, tensor.shape) for key, tensor in plan.tensors.items()},
        fill=lambda key: (subtracted(block, doubts[key]) for block in prepare(plan.tensors[key]).blocks()),
        overwrite=overwrite,
        threads=os.cpu_count() or 1,
    )
    counts = {name: sum(getattr(d, name) for d in doubts.values()) for name in ("entries", "several", "none")}
    return {"exact": False, "tensors": len(plan.tensors), **counts}
