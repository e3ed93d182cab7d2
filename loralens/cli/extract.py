"""``loralens extract``: an adapter from two checkpoints."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import compress_rule, options, target
from loralens.cli.convert import TARGETS
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.adapter import Adapter
    from loralens.core.ranks import Rule
    from loralens.formats.models.checkpoint import Checkpoint
    from loralens.merging.extraction.extraction import Extraction
    from loralens.merging.extraction.triplets import NoiseEdge

FORMATS = tuple(name for name in TARGETS if name != "loralens-q")
FULL = 2.0  # times the rounding noise, from which what is left over is said to be more than that
SHOWN = 5  # tensors that are named on a terminal before the rest is counted


@click.command("extract")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@click.option("--tuned", required=True, metavar="MODEL", help="The tuned or merged model, in the same forms.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="TARGET", help="File or folder to write.")
@compress_rule.rules
@click.option(
    "--noise-edge",
    type=click.Choice(["rounding", "median"]),
    is_flag=False,
    flag_value="rounding",
    help="Keep what stands above the noise: that of rounding to the dtype of --tuned, or where it is unknown and the "
    "difference full-rank, as the median of all singular values tells it.  [alone: rounding]",
)
@click.option("--uniform", is_flag=True, help="One rank everywhere: what LoRAX and mlx-lm want.")
@click.option("--exact", is_flag=True, help="Dense SVDs in float64, for big matrices too: slow.")
@click.option("--to", type=click.Choice(FORMATS), default="peft", show_default=True, help="The dialect to write.")
@click.option("--dtype", type=click.Choice(list(options.DTYPES)), default="f32", show_default=True)
@options.MODULES
@click.option("--drop-extra", is_flag=True, help="Leave out what is no matrix: norms, biases, new heads.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Report, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
def command(
    base: str,
    tuned: str,
    output: Path | None,
    noise_edge: str | None,
    uniform: bool,
    exact: bool,
    to: str,
    dtype: str,
    modules: tuple[str, ...],
    drop_extra: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Make an adapter from what --tuned has and --base has not: of a full fine-tune, or a merge by another tool.

    Give one rule of ranks, as to compress, or --noise-edge. Every weight matrix that differs becomes a pair, embeddings
    only where --modules asks for them ('*' for all). Norms, biases and new heads ride along in full. Whatever differs
    and is not in the adapter is named. Names are those of --tuned; for PEFT those that transformers 5 has in memory.
    """
    rule = _rule(noise_edge, given)
    target.require(output, dry_run=dry_run)
    if output:
        target.refuse_inputs(output, {"the base": base, "the tuned model": tuned})
        target.check_writable(output, to, overwrite=overwrite)
    form = target.of_format(to, Path(base))
    asked = {"modules": modules, "one_rank": uniform, "exact": exact, "drop_extra": drop_extra}
    found = _extract(base, tuned, rule, to=to, dtype=dtype, form=form, **asked)
    if output and not dry_run:
        from loralens.formats import load, save

        save(found.adapter, output, format=to, overwrite=overwrite, **form)
        options.warn(str(output), load(output, format=to, base=base, allow_pickle=True))
    if as_json:
        click.echo(json.dumps(_record(found, base, tuned, None if dry_run else output, to)))
        return
    _show(found, tuned, base)
    what = "would write" if dry_run else "wrote"
    say(f"{what} {output or ''}".rstrip() + f": {to}, {len(found.modules)} modules")


def _rule(noise_edge: str | None, given: Mapping[str, Any]) -> "Rule | NoiseEdge":
    """The one rule of ranks."""
    said = list(compress_rule.rules_given(given))
    if noise_edge is None and not said:
        raise click.UsageError("say how many directions to keep: --rank, --energy, --error, --size … or --noise-edge")
    if noise_edge is None:
        return compress_rule.rule_of(given)
    if said:
        raise click.UsageError(f"--noise-edge and {compress_rule.spoken(said[0])} exclude each other")
    from loralens.merging.extraction.triplets import NoiseEdge

    return NoiseEdge(noise_edge)  # type: ignore[arg-type]


def _extract(
    base: str,
    tuned: str,
    rule: "Rule | NoiseEdge",
    *,
    to: str,
    dtype: str,
    form: dict[str, Any],
    **asked: Any,
) -> "Extraction":
    """The two checkpoints read, and the adapter between them."""
    from loralens.cli.progress import progress
    from loralens.errors import place
    from loralens.formats.dialects.sizes import file_size
    from loralens.formats.models.checkpoint import model_config, stores_conv1d
    from loralens.formats.models.transformers_names import in_memory
    from loralens.merging.extraction.extract import extract_adapter

    before, after = options.opened(base), options.opened(tuned)
    tuned_config = model_config(Path(tuned))

    def named(adapter: "Adapter") -> "Adapter":
        """PEFT looks for modules in memory."""
        return in_memory(adapter, tuned_config) if to == "peft" else adapter

    _check_noise(rule, after, tuned)
    total = sum(tensor.size for tensor in after.tensors.values() if tensor.ndim > 1)
    with place(tuned), progress("extracting", total) as step:
        found = extract_adapter(
            before.tensors,
            after.tensors,
            rule,
            base_config=model_config(Path(base)),
            tuned_config=tuned_config,
            base_model=base,
            conv1d=stores_conv1d(Path(tuned)) or stores_conv1d(Path(base)),
            dtype=options.dtype_of(dtype),
            size=lambda adapter: file_size(named(adapter), to, **form),
            threads=os.cpu_count() or 1,
            step=step,
            **asked,
        )
    adapter = named(found.adapter)
    if list(adapter) == list(found.adapter):
        return found
    note = "modules are called in the adapter as transformers 5 calls them in memory, where PEFT looks for them"
    return replace(found, adapter=adapter, notes=(*found.notes, note))


def _check_noise(rule: "Rule | NoiseEdge", tuned: "Checkpoint", path: str) -> None:
    """Refuse to know the rounding of weights that were multiplied since."""
    from loralens.core.ranks import Rule
    from loralens.errors import OptionError

    if not isinstance(rule, Rule) and rule.noise == "rounding" and any(note.code == "float8" for note in tuned.notes):
        raise OptionError(
            f"{path}: of float8 weights with scales the rounding noise is not known here",
            fix="give --noise-edge median, or one of the other rules",
        )


def _record(found: "Extraction", base: str, tuned: str, output: Path | None, to: str) -> dict[str, Any]:
    from math import isfinite

    return {
        "loralens": __version__,
        "base": base,
        "tuned": tuned,
        "target": str(output) if output else None,
        "format": to,
        "modules": [
            {
                "name": name,
                "shape": list(one.shape),
                "rank": one.rank,
                "frobenius": one.frobenius,
                "relative_error": one.relative_error,
                "energy_kept": one.energy_kept,
                "svd_error": one.svd_error,
                "noise": one.noise,
                "residue": one.residue if isfinite(one.residue) else None,
                "noise_edge": one.edge,
            }
            for name, one in found.modules.items()
        ],
        "total": {
            "relative_error": found.relative_error,
            "share": found.share,
            "parameters": found.adapter.parameters,
            "unchanged": found.unchanged,
        },
        "extra": list(found.adapter.extra),
        "left_out": [{"key": one.key, "why": one.why, "frobenius": one.norm} for one in found.left_out],
        "notes": list(found.notes),
    }


def _show(found: "Extraction", tuned: str, base: str) -> None:
    from loralens.cli.compress_report import percent
    from loralens.cli.table import Column, Table, number, show

    edges = any(one.edge is not None for one in found.modules.values())
    heads = ("out × in", "r", "‖ΔW‖", "error", "energy kept", "left / noise", *(["edge"] if edges else []))
    rows = [
        [
            name,
            " × ".join(map(str, one.shape)),
            str(one.rank),
            number(one.frobenius),
            percent(one.relative_error),
            f"{one.energy_kept:.2%}",
            number(one.residue),
            *([number(one.edge or 0.0)] if edges else []),
        ]
        for name, one in found.modules.items()
    ]
    title = f"{tuned} − {base}: {len(rows)} modules differ, {found.unchanged} do not"
    show(Table(title, [Column("module", "left"), *map(Column, heads)], rows))
    say(f"error       ‖D−BA‖/‖D‖ = {percent(found.relative_error)} over all modules, measured on every entry")
    randomised = max(one.svd_error for one in found.modules.values())
    if randomised:
        say(f"svd         randomised: √Σσ² known within {percent(randomised)}; --exact takes dense ones")
    say(f"parameters  {found.adapter.parameters:,}")
    if found.adapter.extra:
        roles = sorted({extra.role for extra in found.adapter.extra.values()})
        say(f"extra       {len(found.adapter.extra)} tensors kept in full ({', '.join(roles)})")
    _tell(found)


def _tell(found: "Extraction") -> None:
    """Notes, what is missing, and what rounding does not explain, on stderr."""
    from loralens.core.names import some

    for note in found.notes:
        say(f"note: {note}", err=True)
    for why in dict.fromkeys(one.why for one in found.left_out):
        keys = [one.key for one in found.left_out if one.why == why]
        say(f"warning: {len(keys)} left out, {why}: {some(keys, SHOWN)}", err=True)
    if found.share < 1:
        say(f"  the adapter's modules hold {found.share:.2%} of the energy of all differences", err=True)
    full = [name for name, one in found.modules.items() if one.residue > FULL]
    if full:
        say(
            f"note: of {len(full)} modules more is left over than rounding explains (left / noise), {full[0]} among "
            "them: the difference has more directions than were kept",
            err=True,
        )
