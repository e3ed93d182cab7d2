"""``loralens merge``: adapters into a base model, with proof of what arrived and a way back."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.merge_inputs import Inputs, inputs
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.lazy import LazyArray
    from loralens.formats.model_writer import Change
    from loralens.formats.undo import Spool
    from loralens.merge.plan import Plan
    from loralens.merge.record import TensorRecord

PATH = click.Path(path_type=Path)
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
CERTIFICATE = "merge_certificate.json"
NONE = Path("none")
SWALLOWED = 0.95  # gain below which a merge is said to lose too much
DAMAGED = 0.2  # and relative error above which


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("-o", "--output", type=PATH, metavar="OUT", help="Folder to write (a file where the base is one file).")
@click.option("--undo", type=PATH, metavar="FILE", help="Where the undo patch goes, or 'none'. [default: in OUT]")
@click.option(
    "--certificate", type=PATH, metavar="FILE", help="Where the certificate goes, or 'none'. [default: in OUT]"
)
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", show_default=True)
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@click.option("--dtype", type=click.Choice(["keep", *DTYPES]), default="keep", help="Dtype of the merged model.")
@click.option("--allow-missing", is_flag=True, help="Leave out modules that have no weight in the base.")
@click.option("--untie", is_flag=True, help="Give a head that shares the embedding's weight one of its own.")
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
    untie: bool,
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
    if output is None and not dry_run:
        raise click.UsageError("give -o OUT, or --dry-run")
    given = inputs(adapters, base, modules, reading, allow_missing=allow_missing, untie=untie, dtype=DTYPES.get(dtype))
    for note in given.plan.notes:
        click.echo(f"note: {note}", err=True)
    looks = certificate != NONE or dry_run or as_json
    run = _Run(given, rounding, seed, fidelity=looks, undo=undo != NONE and not dry_run)
    if dry_run:
        for key in given.plan.tensors:
            for _ in run.fill(key):
                pass
    else:
        assert output is not None
        _write(run, output, undo, certificate, overwrite=overwrite)
    content = run.certificate()
    if as_json:
        click.echo(json.dumps(content))
        return
    _show(content, f"would write {output or ''}".rstrip() if dry_run else f"wrote {output}")
    _advise(content["modules"])


class _Run:
    """One merge, and what was seen of every tensor while it ran."""

    def __init__(self, given: Inputs, rounding: str, seed: int, *, fidelity: bool, undo: bool) -> None:
        self.given, self.rounding, self.seed = given, rounding, seed
        self.fidelity, self.undo = fidelity, undo
        self.hashes = fidelity or undo
        self.records: dict[str, TensorRecord] = {}
        self.copies: dict[str, Any] = {}
        self.spool: Spool | None = None
        self.arrays: dict[str, LazyArray] = {}
        self.entries: dict[str, Any] = {}

    def fill(self, key: str) -> Any:
        """The merged rows of one tensor."""
        from loralens.errors import place
        from loralens.merge.apply import prepare
        from loralens.merge.record import Watch
        from loralens.merge.rounding import Rounding
        from loralens.merge.undo_layout import packed

        with place(key):
            merge = prepare(
                self.given.plan.tensors[key],
                dtype=self.given.dtypes[key],
                rounding=Rounding(self.rounding, self.seed, key),  # type: ignore[arg-type]
            )
            watch = Watch(merge, hashes=self.hashes, fidelity=self.fidelity, undo=self.undo)
            yield from watch.blocks()
            record = watch.record()
            if self.spool and record.patch:
                arrays, self.entries[key] = packed(record, self.spool.keep)
                self.arrays |= arrays
            self.records[key] = replace(record, patch=None)

    def copied(self, key: str, rows: Any) -> None:
        """Rows of a tensor that stays as it is."""
        import numpy as np

        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self.copies.setdefault(key, sha256()).update(data)

    def certificate(self) -> dict[str, Any]:
        """What was merged into what, and how much of it arrived."""
        from loralens.merge.summary import model_hash, module_entries, total_entry

        copies = {key: digest.hexdigest() for key, digest in self.copies.items()}
        records = [self.records[key] for key in self.given.plan.tensors if key in self.records]
        modules = module_entries(records)
        return {
            "loralens": __version__,
            "base": {"path": self.given.base, "sha256": model_hash(records, copies, side="base")},
            "result": {"sha256": model_hash(records, copies, side="merged")},
            "adapters": self.given.adapters,
            "names": [str(match) for match in self.given.plan.matches],
            "missing": list(self.given.plan.missing),
            "notes": list(self.given.plan.notes),
            "rounding": {"mode": self.rounding, **({"seed": self.seed} if self.rounding == "stochastic" else {})},
            "modules": modules,
            "total": total_entry(records),
        }


def _write(run: _Run, output: Path, undo: Path | None, certificate: Path | None, *, overwrite: bool) -> None:
    from loralens.formats.model_writer import write_model
    from loralens.formats.undo import NAME, Spool, write_undo
    from loralens.formats.writing import replacing
    from loralens.merge.undo_layout import VERSION

    folder = run.given.files.root.is_dir()
    spots = {"undo": undo, "certificate": certificate}
    for name, spot in spots.items():
        if spot is None and not folder:
            spots[name] = output.with_name(output.stem + (".undo.loralens" if name == "undo" else f".{CERTIFICATE}"))

    def beside(part: Path) -> None:
        if run.undo:
            arrays = {name: run.arrays[name] for name in sorted(run.arrays)}
            entries = {key: run.entries[key] for key in sorted(run.entries)}
            content = {"version": VERSION, "adapters": run.given.adapters, "tensors": entries, **run.given.originals()}
            write_undo(arrays, content, spots["undo"] or part / NAME)
        if run.fidelity and spots["certificate"] != NONE:
            text = json.dumps(run.certificate(), indent=2, ensure_ascii=False) + "\n"
            with replacing(spots["certificate"] or part / CERTIFICATE) as stream:
                stream.write(text.encode("utf-8"))

    run.spool = Spool(output.absolute().parent) if run.undo else None
    write_model(
        run.given.files,
        output,
        changes=_changes(run),
        fill=run.fill,
        watch=run.copied if run.hashes else None,
        texts=run.given.texts(),
        beside=beside,
        overwrite=overwrite,
        threads=os.cpu_count() or 1,
    )
    if run.given.files.left_out:
        names = ", ".join(run.given.files.left_out[:5])
        click.echo(f"note: left out, as they hold the unmerged weights: {names}", err=True)


def _changes(run: _Run) -> "dict[str, Change]":
    from loralens.formats.model_writer import Change

    plan: Plan = run.given.plan
    return {key: Change(run.given.dtypes[key], tensor.shape) for key, tensor in plan.tensors.items()}


def _show(content: dict[str, Any], what: str) -> None:
    from loralens.cli.table import Column, Table, number, show

    heads = ("gain", "error", "unmoved", "above noise")
    rows = [
        [
            module["name"],
            f"{module['gain']:.4f}",
            number(module["relative_error"]),
            f"{module['unmoved']:.1%}",
            f"{module['surviving']} of {module['directions']}",
        ]
        for module in content["modules"]
    ]
    total = content["total"]
    title = f"{what}: {len(rows)} modules, {total['tensors']} tensors changed, gain {total['gain']:.4f}, "
    columns = [Column("module", "left"), *map(Column, heads)]
    show(Table(title + f"error {number(total['relative_error'])}", columns, rows))
    if not rows:
        click.echo(f"{what}: {total['tensors']} tensors changed; without a certificate nothing was measured")


def _advise(modules: Sequence[dict[str, Any]]) -> None:
    """Say it where rounding swallows an update, and what to do."""
    bad = [m["name"] for m in modules if m["gain"] < SWALLOWED or m["relative_error"] > DAMAGED]
    if not bad:
        return
    click.echo(
        f"warning: rounding damages {len(bad)} of {len(modules)} updates (gain below {SWALLOWED} or error above "
        f"{DAMAGED}), {bad[0]} among them",
        err=True,
    )
    click.echo(
        "  fix: write --dtype f32 (or f16, where the model runs in it), serve the adapter unmerged, or take "
        "--rounding stochastic: no bias, at the price of noise",
        err=True,
    )
