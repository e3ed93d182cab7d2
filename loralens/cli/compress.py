"""``loralens compress``: the same adapter with fewer directions, and what that cost."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import compress_rule, options, target
from loralens.cli.compress_form import BITS, FEW, Form
from loralens.cli.convert import TARGETS
from loralens.cli.terminal import say
from loralens.verbs.outputs.rules import read_moments, read_protection
from loralens.verbs.outputs.target import Target

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.cli.compress_report import Report
    from loralens.compression.plan import Plan
    from loralens.core.adapter import Adapter
    from loralens.core.moments import Moments
    from loralens.core.ranks import Rule

    Decision = tuple[Plan, dict[str, int], Form]

BY_WEIGHTS = "ranks and bits chosen by the weights alone: so they lose less on the data too"


@click.command("compress")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="TARGET", help="File or folder to write.")
@compress_rule.rules
@click.option("--uniform", is_flag=True, help="One rank everywhere: what LoRAX and mlx-lm want.")
@compress_rule.PROTECT
@compress_rule.ACTIVATIONS
@click.option("--base", metavar="MODEL", help=f"{options.BASE_HELP} For DoRA's magnitudes, and for GGUF.")
@click.option("--to", type=click.Choice(TARGETS), help="The dialect to write. [default: the source's own]")
@click.option(
    "--dtype",
    type=click.Choice([*options.DTYPES, *BITS]),
    help=f"Round the factors to this; int8 and int4 are written as {FEW}. [default: as they are]",
)
@options.MODULES
@click.option("--drop-dead", is_flag=True, help="Leave out modules that do nothing, or that the budget cannot pay for.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Report, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@options.plot("Draw what every rank would cost.")
@options.reading
def command(
    source: str,
    output: Path | None,
    uniform: bool,
    weights: str,
    activations: str | None,
    base: str | None,
    to: str | None,
    dtype: str | None,
    modules: tuple[str, ...],
    drop_dead: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    plot: Path | None,
    **given: Any,
) -> None:
    """Write SOURCE with fewer directions: the best update of the smaller ranks, and what it lost.

    Give one of the rules. The first four look at each module alone, --parameters and --size at all of them together:
    directions go where they save most, and with --to loralens-q bits too. The scale of every module stays. What is not
    half of a pair rides along. The errors reported are those of the file, read back. SOURCE is never written over.
    """
    rule = compress_rule.rule_of(given)
    target.require(output, dry_run=dry_run)
    from loralens.errors import place

    reading = {k: v for k, v in given.items() if k not in compress_rule.NAMES}
    adapter = options.read_adapter(source, reading, base=base)
    form = Form.of(adapter, to=to, base=base, dtype=dtype)
    if output:
        form.check(source, output, overwrite=overwrite, others={"the moments": activations})
    moments = read_moments(activations)
    with place(source):
        plan = _plan(adapter, form, dtype, modules, moments)
        protect = read_protection(weights)
        if rule.name == "bytes" and form.bits is not None and dtype is None and not uniform:
            plans = [plan, *([_plan(adapter, form, dtype, modules)] if moments else [])]
            decisions = [_with_bits(one, rule, form, protect=protect, drop_dead=drop_dead) for one in plans]
            followed, chosen, form = _nearest(adapter, moments, decisions) if moments else decisions[0]
        else:
            followed, cost = plan, form.cost if form.bits else None
            chosen = plan.ranks(rule, one_rank=uniform, protect=protect, drop_dead=drop_dead, size=form.size, cost=cost)
        smaller, said = _magnitudes(adapter, followed.at(chosen), base)
    if output and not dry_run:
        after, size = form.write(smaller, Target(output, overwrite))
    else:
        after, size = form.rehearse(smaller)
    notes = [
        said,
        *_notes(plan, chosen, given["rank"]),
        *_split_experts(after, form),
        *([BY_WEIGHTS] if followed is not plan else []),
    ]
    report = _report(adapter, after, (_source_bytes(source), size), notes, moments)
    _say(report, source, output, form, dry_run=dry_run, as_json=as_json)
    if plot:
        _plot(plot, source, plan, form, report)


def _plan(
    adapter: "Adapter", form: Form, dtype: str | None, modules: tuple[str, ...], moments: "Moments | None" = None
) -> "Plan":
    """The plan; towards few bits in float32, so that nothing is rounded twice."""
    import numpy as np

    from loralens.cli.progress import progress
    from loralens.compression.plan import Plan

    narrow = np.dtype(np.float32) if form.bits and adapter.format != FEW else options.dtype_of(dtype)
    with progress("reading", len(adapter)) as step:
        return Plan.of(adapter, modules=modules, dtype=narrow, moments=moments, threads=os.cpu_count() or 1, step=step)


def _with_bits(plan: "Plan", rule: "Rule", form: Form, *, protect: Any, drop_dead: bool) -> "Decision":
    """Ranks and bits in one decision, by reverse water-filling over directions."""
    from loralens.compression.bits import allocate
    from loralens.compression.protection import protection
    from loralens.core.ranks import shared_ranks

    spectra = {name: one.s for name, one in plan.found.items()}
    others = {name: (8,) * min(m.rank, *m.shape) for name, m in plan.adapter.items() if name not in spectra}

    def size(bits: "Mapping[str, tuple[int, ...]]") -> int:
        """Of a file in which the chosen modules have these bits, and the others 8."""
        kept = {name: each for name, each in bits.items() if each}
        return form.with_bits({**others, **kept}).size(plan.at({name: len(each) for name, each in bits.items()}))

    found = allocate(
        spectra,
        {name: plan.adapter[name].shape for name in spectra},
        int(rule.value),
        weights=protection(spectra, protect),
        shared=shared_ranks(plan.adapter.modules),
        least=plan.least(drop_dead=drop_dead),
        size=size,
    )
    kept = {name: each for name, each in found.bits.items() if each}
    return plan, {name: len(each) for name, each in found.bits.items()}, form.with_bits({**others, **kept})


def _nearest(adapter: "Adapter", moments: "Moments", decisions: "Sequence[Decision]") -> "Decision":
    """The decision that loses least on the data: the first of equals.

    Data say which directions to keep. In a few bits most of the error is that of rounding, which lies beside them, and
    whether it pays to follow the data depends on the adapter.
    """
    from loralens.compression.informed import data_losses
    from loralens.compression.loss import total_error

    def error(decision: "Decision") -> float:
        plan, chosen, form = decision
        return total_error(data_losses(adapter, form.rehearse(plan.at(chosen))[0], moments))

    return min(decisions, key=error)


def _source_bytes(source: str) -> int:
    from loralens.formats.files.location import adapter_file

    return adapter_file(Path(source)).stat().st_size


def _magnitudes(before: "Adapter", after: "Adapter", base: str | None) -> "tuple[Adapter, str]":
    """DoRA's magnitudes, solved anew where the base is there; and which it was, in words."""
    from loralens.compression.magnitudes import resolved
    from loralens.core.carried import magnitudes

    found = {name: after[name] for name in magnitudes(after) if after[name] is not before[name]}
    if not found:
        return after, ""
    if base is None:
        return after, f"magnitudes of {len(found)} DoRA modules kept; with --base they are solved anew"
    weights = options.base_weights(base, found)
    return resolved(before, after, weights.modules), f"magnitudes of {len(found)} DoRA modules solved anew"


def _notes(plan: "Plan", chosen: Mapping[str, int], asked: float | None) -> list[str]:
    from loralens.compression.plan import fused, kept_whole
    from loralens.core.structured import Structured

    whole = sum(map(kept_whole, plan.adapter.modules.values()))
    blocks = sum(fused(plan.adapter[name]) and rank == plan.adapter[name].rank for name, rank in chosen.items())
    pairs = sum(isinstance(plan.adapter[name], Structured) for name in chosen)
    return [
        *([f"{whole} grouped convolutions kept as they are: smaller ones would not be grouped"] if whole else []),
        *([f"{blocks} modules of fused projections kept whole, in blocks"] if blocks else []),
        *([f"{pairs} modules that were no pair (LoKr, LoHa, full) are pairs now"] if pairs else []),
        *compress_rule.rank_notes(asked, chosen),
    ]


def _split_experts(after: "Adapter", form: Form) -> list[str]:
    """What PEFT would not load."""
    from loralens.analysis.clients.rules import experts_differ

    return [f"{one.text} ({one.fix})" for one in experts_differ(after)] if form.name == "peft" else []


def _report(
    before: "Adapter", after: "Adapter", sizes: tuple[int, int], notes: list[str], moments: "Moments | None"
) -> "Report":
    from loralens.cli.compress_report import Report
    from loralens.cli.progress import progress
    from loralens.compression.informed import data_losses
    from loralens.compression.loss import losses

    with progress("measuring", len(before)) as step:
        lost = losses(before, after, threads=os.cpu_count() or 1, step=step)
    on_data = data_losses(before, after, moments) if moments else {}
    return Report(before, after, lost, on_data, sizes, [note for note in notes if note])


def _say(report: "Report", source: str, output: Path | None, form: Form, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        written = None if dry_run or output is None else str(output)
        click.echo(json.dumps({"source": source, "target": written, "format": form.name, **report.record()}))
        return
    report.show(source)
    if dry_run:
        say(f"would write {form.name}" + (f" to {output}" if output else ""))
    else:
        say(f"wrote {output}: {form.name}; the errors are those of this file, read back")


def _plot(file: Path, source: str, plan: "Plan", form: Form, report: "Report") -> None:
    from loralens.charts.curve import curve_figure
    from loralens.cli.curve import trade_off
    from loralens.compression.loss import total_error

    chosen = report.sizes[1], total_error(report.on_data or report.losses)
    points = trade_off(plan, form, on_data=bool(report.on_data))
    options.draw(curve_figure(source, points, chosen=chosen, on_data=bool(report.on_data)), file)
