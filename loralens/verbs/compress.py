"""The verb ``compress``: truncates an adapter to fewer directions, and measures the error of the result."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Unpack, overload

from loralens.choices import FloatType, TargetFormat
from loralens.compression.directions import FactorSplits
from loralens.compression.loss import UpdateLoss, data_losses, losses
from loralens.compression.plan import TruncationPlan, is_fused_module, keeps_rank
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.moments import Moments
from loralens.core.names import is_expert_alone
from loralens.core.progress import progress
from loralens.core.structured import Structured
from loralens.core.threads import processor_count
from loralens.errors import place
from loralens.verbs.batches.batch import AdapterWork, in_batches, one_adapter
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.inputs.adapters import AdapterSource, Source, labels, read_adapter
from loralens.verbs.inputs.choices import Blocks, as_globs, numpy_dtype
from loralens.verbs.outputs.compress_result import CompressResult
from loralens.verbs.outputs.form import OutputFormat, source_bytes
from loralens.verbs.outputs.rules import (
    RulesAndReading,
    rank_notes,
    rank_rule,
    read_directions,
    read_moments,
    read_protection,
    split_rules,
)
from loralens.verbs.outputs.target import Target


class CompressOptions(RulesAndReading, total=False):
    """The options of `compress`, for its two signatures."""

    output: str | PathLike[str] | None
    uniform: bool
    weights: str | PathLike[str] | Mapping[str, float]
    activations: str | PathLike[str] | Moments | None
    base: str | PathLike[str] | None
    to: TargetFormat | None
    dtype: FloatType | None
    modules: Sequence[str]
    block: Blocks
    drop_dead: bool
    only_if_smaller: bool
    force: bool
    overwrite: bool
    dry_run: bool
    jobs: int | None


# For a type checker a string is a sequence of strings too, and the first of the two signatures wins. A path may name a
# folder with several adapters, which no type can tell. So the first signature returns what one adapter gives, or Any.
@overload
def compress(  # type: ignore[overload-overlap]
    source: AdapterSource, **options: Unpack[CompressOptions]
) -> CompressResult | Any: ...
@overload
def compress(source: Sequence[AdapterSource], **options: Unpack[CompressOptions]) -> BatchResult: ...
@in_batches(
    lambda verb: AdapterWork(
        verb,
        CompressResult.numbers,
        status=lambda result: "unchanged" if result.kept_whole else "written",
        answer=lambda result: not result.withheld,
        check=lambda options: rank_rule(**split_rules(options)[0]),
    )
)
def compress(
    source: Source,
    *,
    output: str | PathLike[str] | None = None,
    uniform: bool = False,
    weights: str | PathLike[str] | Mapping[str, float] = "absolute",
    activations: str | PathLike[str] | Moments | None = None,
    base: str | PathLike[str] | None = None,
    to: TargetFormat | None = None,
    dtype: FloatType | None = None,
    modules: Sequence[str] = (),
    block: Blocks = (),
    drop_dead: bool = False,
    only_if_smaller: bool = False,
    force: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    **options: Unpack[RulesAndReading],
) -> CompressResult | BatchResult:
    """Write an adapter with fewer directions: the best update of the smaller ranks, and the error that it has.

    One of the rules has to be given. ``rank``, ``energy``, ``error`` and ``sv_ratio`` look at each module alone.
    ``parameters`` and ``size`` are budgets for all modules together: they give directions to the modules where they
    reduce the error most. The scale of every module stays. Tensors that belong to no pair of factors are copied. The
    errors are those of the written file, read back. The source is never overwritten.

    If the file would not become smaller, the adapter is written as it was, unless ``to``, ``dtype`` or ``uniform`` asks
    for another form.

    For each module, the update of rank r' that is nearest to ΔW in the Frobenius and the spectral norm is the sum of
    its r' leading singular triplets (Eckart and Young 1936). They are computed from the factors: ΔW is never formed,
    and the cost is O((out + in)·r²) per module.

    Parameters
    ----------
    source : path or Adapter, or a list of them
        Several adapters, or a folder that has some in it, give a `BatchResult` with one row for each.
    output : path, optional
        The file or folder to write. Without it nothing is written, and the result holds the smaller adapter. For
        several adapters it is a folder, in which each has its own name.
    rank : int, optional
        Keep this many leading directions of every module.
    energy : float, optional
        Keep the fewest directions of a module that hold this share of its energy Σσ², in (0, 1].
    error : float, optional
        Keep the fewest directions of a module whose relative error ‖ΔW−ΔW'‖/‖ΔW‖ is at most this, in [0, 1).
    sv_ratio : float, optional
        Keep the directions of a module whose singular value is above σ₁/sv_ratio.
    parameters : float, optional
        One budget for the whole adapter: a share of its parameters, up to 1, or their number.
    size : int or str, optional
        The same budget in bytes of the file: ``20_000_000``, ``"20MB"``, ``"512KiB"``.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    weights : str, path or mapping of str to float
        The error that a budget minimises: ``absolute``, ``relative`` to each module, or weighted by a mapping of globs
        to weights, which may be in a JSON file.
    activations : path or Moments, optional
        The second moments of real inputs, as `loralens.calibrate` measures them. The error on those inputs is then
        minimised.
    base : path, optional
        The base model. With it DoRA's magnitudes are solved anew, and GGUF can be written.
    to : str, optional
        The dialect to write; the adapter's own by default.
    dtype : str, optional
        The dtype of all factors: ``f32``, ``bf16`` or ``f16``. By default every factor keeps its own.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns become smaller.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    drop_dead : bool
        Leave out modules whose update is zero, or that get no rank from the budget.
    only_if_smaller : bool
        Write nothing if the file would not become smaller; ``answer`` of the result is then False.
    force : bool
        If the file becomes larger, ``answer`` of the result stays True. It says nothing for several adapters.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Check everything, and write nothing.
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process; 1 by default.
    **options : RankRules and Reading
        The six rules above, and how the file is read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        No rule or several were given, the budget is too small for rank 1 everywhere, a glob pattern matches no module,
        or the target exists or overlaps with an input.
    FormatError
        The file is not an adapter, or a module holds NaN or Inf.
    MismatchError
        The activations are those of another adapter.
    """
    del jobs  # one adapter is one job
    source = one_adapter(source)
    modules = as_globs(modules, block)
    # Several rules or none are refused before anything is read.
    rules, reading = split_rules(options)
    rule = rank_rule(**rules)
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    (label,) = labels([source])
    before = read_adapter(source, reading, base=base, label=label)
    form = OutputFormat.of(before, to=to, base=base, dtype=dtype)
    # Moments in memory have no place that the target could overwrite.
    activations_file = None if isinstance(activations, Moments) else activations
    # The target is checked before any factor is read, so that a wrong one costs no work.
    form.check_target(target, source, other_inputs={"the moments": activations_file})
    protect, moments = read_protection(weights), read_moments(activations)
    with place(label):
        plan = read_directions(before, modules=modules, dtype=numpy_dtype(dtype), moments=moments)
        ranks = plan.ranks(rule, one_rank=uniform, protect=protect, drop_dead=drop_dead, size=form.size)
        splits = FactorSplits()
        new, notes = _solve_magnitudes(before, plan.at(ranks, splits=splits), base)
    bytes_before = source_bytes(source, before, form)
    gained = form.size(new) < bytes_before
    # If another form was requested by name, it is written even if the file becomes larger.
    unchanged = not gained and to in (None, before.format) and dtype is None and not uniform
    # The products of a LoHa, for example, cannot be written as they were.
    unchanged = unchanged and not any(m.origin and m.origin.format != before.format for m in before.modules.values())
    if unchanged:
        new, notes = before, []
    if only_if_smaller and not gained:
        target = replace(target, dry_run=True)
    # Errors are measured on what is read back, so that rounding and the writer are included.
    after, bytes_after = form.write(new, target)
    module_losses = _measure_losses(before, after, plan, splits)
    on_data = data_losses(before, after, moments) if moments else {}
    notes += _notes(before, ranks, after, rules.get("rank"), form.name)
    measured = module_losses, on_data, bytes_before, bytes_after, notes
    chosen = plan, form, unchanged, only_if_smaller, force
    return CompressResult(label, after, before, form.name, target, *measured, *chosen)


def _measure_losses(
    before: Adapter, after: Adapter, plan: TruncationPlan, splits: FactorSplits
) -> dict[str, UpdateLoss]:
    """The error of every module, from the splits of its factors if these were read back unchanged."""
    with progress("measuring", len(before)) as step:
        return losses(
            before,
            after,
            bases=plan.bases,
            known=lambda name, new: plan.loss(name, new, splits),
            threads=processor_count(),
            step=step,
        )


def _solve_magnitudes(before: Adapter, after: Adapter, base: str | PathLike[str] | None) -> tuple[Adapter, list[str]]:
    """The adapter with DoRA's magnitudes solved anew, m' = m·cos∠, if a base is given; and a note about them."""
    # The magnitude of a module that stayed as it was is still the best one.
    changed = {name: after[name] for name in magnitudes(after) if after[name] is not before[name]}
    if not changed:
        return after, []
    if base is None:
        return after, [f"magnitudes of {len(changed)} DoRA modules kept; with --base they are solved anew"]
    # Imported here, as reading a base takes 6 ms to import.
    from loralens.compression.plan import solve_magnitudes
    from loralens.verbs.inputs.bases import base_weights

    solved = solve_magnitudes(before, after, base_weights(base, changed).modules)
    return solved, [f"magnitudes of {len(changed)} DoRA modules solved anew"]


def _notes(adapter: Adapter, ranks: Mapping[str, int], after: Adapter, rank: float | None, dialect: str) -> list[str]:
    """Remarks about modules that are not plain pairs, have fewer directions than ``rank``, or are refused by PEFT."""
    uncompressed = [adapter[name] for name, each in ranks.items() if each == adapter[name].rank]
    counts = {
        "grouped convolutions kept as they are: smaller ones would not be grouped": map(
            keeps_rank, adapter.modules.values()
        ),
        "modules of fused projections kept whole, in blocks": map(is_fused_module, uncompressed),
        "modules that were not pairs (LoKr, LoHa, full) are pairs now": (
            isinstance(adapter[name], Structured) and not isinstance(after.modules.get(name), Structured)
            for name in ranks
        ),
    }
    notes = [f"{number} {text}" for text, matching in counts.items() if (number := sum(matching))]
    notes += rank_notes(rank, ranks)
    # transformers 5 joins such experts into one stack, for which PEFT has one rank and one α.
    if dialect == "peft" and any(map(is_expert_alone, after)):
        # Imported here, as the rules of all clients take long to import, and only notes on this dialect need one.
        from loralens.analysis.clients.rules import experts_differ

        notes += [f"{finding.text} ({finding.fix})" for finding in experts_differ(after)]
    return notes
