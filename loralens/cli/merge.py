"""``loralens merge``: adapters into a base model, with proof of what arrived and a way back."""

import json
from pathlib import Path
from typing import Any

import click

from loralens.cli import options
from loralens.cli.merge_inputs import inputs
from loralens.cli.terminal import say

PATH = click.Path(path_type=Path)
NONE = Path("none")


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("-o", "--output", type=PATH, metavar="OUT", help="Folder to write (a file where the base is one file).")
@click.option("--undo", type=PATH, metavar="FILE", help="Where the undo patch goes, or 'none'. [default: in OUT]")
@click.option(
    "--certificate", type=PATH, metavar="FILE", help="Where the certificate goes, or 'none'. [default: in OUT]"
)
@click.option("--rounding", type=click.Choice(options.ROUNDINGS), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@click.option(
    "--dtype", type=click.Choice(["keep", *options.DTYPES]), default="keep", help="Dtype of the merged model."
)
@click.option("--allow-missing", is_flag=True, help="Leave out modules that have no weight in the base.")
@options.untying(
    "Whether a head that shares the embedding's weight gets one of its own. [default: as the adapter needs]"
)
@options.DEVICE
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--dry-run", is_flag=True, help="Say what would arrive, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="The certificate on stdout.")
@options.MODULES
@options.reading
def command(
    adapters: tuple[str, ...],
    base: str,
    output: Path | None,
    undo: Path | None,
    certificate: Path | None,
    rounding: str,
    seed: int,
    dtype: str,
    allow_missing: bool,
    untie: bool | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    modules: tuple[str, ...],
    **reading: Any,
) -> None:
    """Merge adapters into a base model: W' = W + Σ w·ΔW, shard by shard, rounded once.

    ADAPTER:0.7 counts 0.7 times. Every other tensor is copied byte for byte, and the files beside the weights come
    along. Unless told otherwise OUT holds an undo patch, from which `loralens unmerge` restores the base bit for bit,
    and a certificate of how much of every update arrived.
    """
    from loralens.cli.merge_run import MergeRun
    from loralens.cli.merge_show import advise, show
    from loralens.linalg.device import Device

    if output is None and not dry_run:
        raise click.UsageError("give -o OUT, or --dry-run")
    where = Device.of(device)  # what is wrong with it is said before the work
    wanted = options.DTYPES.get(dtype)
    given = inputs(adapters, base, modules, reading, allow_missing=allow_missing, untie=untie, dtype=wanted)
    for note in (*(str(match) for match in given.plan.matches if match.edit), *given.plan.notes):
        say(f"note: {note}", err=True)
    if given.plan.missing:
        names = ", ".join(given.plan.missing[:3]) + (", …" if len(given.plan.missing) > 3 else "")
        say(f"note: left out, as the base has no place for them: {names}", err=True)
    looks = certificate != NONE or dry_run or as_json
    run = MergeRun(given, rounding, seed, fidelity=looks, undo=undo != NONE and not dry_run, device=where)
    if dry_run:
        run.rehearse()
    else:
        assert output is not None
        run.write(
            output,
            undo=None if undo == NONE else undo,
            certificate=None if certificate == NONE else certificate,
            certify=certificate != NONE,
            overwrite=overwrite,
        )
    content = run.certificate()
    if as_json:
        click.echo(json.dumps(content))
        return
    show(content, f"would write {output or ''}".rstrip() if dry_run else f"wrote {output}", measured=looks)
    if looks:
        advise(content, dtype=given.narrowest, rounding=rounding)
