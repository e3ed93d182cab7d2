"""The verb ``compress``: truncates an adapter to fewer directions, and measures the error of that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, cpu_count
from typing import Any, Unpack

import numpy as np

from loralens.analysis.clients.rules import experts_differ
from loralens.compression.bits import allocate_bits
from loralens.compression.curve import CurvePoint
from loralens.compression.informed import data_losses
from loralens.compression.loss import UpdateLoss, losses, total_error
from loralens.compression.magnitudes import solve_magnitudes
from loralens.compression.plan import TruncationPlan, is_fused_module, keeps_rank
from loralens.compression.protection import Protection, protection
from loralens.core.adapter import Adapter
from loralens.core.carried import magnitudes
from loralens.core.moments import Moments
from loralens.core.progress import progress
from loralens.core.ranks import Rule, shared_ranks
from loralens.core.structured import Structured
from loralens.errors import place
from loralens.formats.dialects.table import QUANTISED
from loralens.tables.numbers import change, exact_size, fixed, percent, shape
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.curve import trade_off
from loralens.verbs.inputs.adapters import AdapterSource, Reading, labels, read_adapter
from loralens.verbs.inputs.bases import base_weights
from loralens.verbs.inputs.choices import FloatType, IntegerType, TargetFormat, numpy_dtype
from loralens.verbs.outputs.form import PLAIN_BITS, OutputFormat, source_bytes
from loralens.verbs.outputs.rules import rank_notes, rank_rule, read_moments, read_protection
from loralens.verbs.outputs.target import Target

BY_WEIGHTS = "ranks and bits chosen by the weights alone: so they lose less on the data too"


@dataclass(frozen=True, slots=True)
class ModuleLoss:
    """One row: what became of a module."""

    name: str
    shape: tuple[int, int]
    loss: UpdateLoss
    data_error: float | None = None


@dataclass(frozen=True, slots=True)
class CompressResult(Tabular):
    """A smaller adapter, and what each of its modules lost.

    Attributes
    ----------
    source : str
        What the adapter is called: its path, if it was read.
    adapter : Adapter
        The smaller one: as it was written and read back; where nothing was written, as it would be written, under the
        names of the source.
    format : str
        The dialect that was written, or would be.
    losses : mapping of str to Loss
        Of every module of ``before``, rounding included.
    data_losses : mapping of str to Loss
        The same on the data of the moments, of the modules that were measured; empty without moments.
    bytes_before, bytes_after : int
        Of the file of weights. Before, of an adapter that was not read from a file by this call, of the one that it
        would be written to.
    notes : list of str
        What else there is to say.
    plan : Plan
        The directions of the modules, from which `trade_off` follows.
    """

    source: str
    adapter: Adapter
    before: Adapter
    format: str
    target: Target
    losses: Mapping[str, UpdateLoss]
    data_losses: Mapping[str, UpdateLoss]
    bytes_before: int
    bytes_after: int
    notes: list[str]
    plan: TruncationPlan = field(repr=False)
    form: OutputFormat = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"CompressResult({self.before.parameters:,} → {self.adapter.parameters:,} parameters, "
            f"error {percent(self.relative_error)})"
        )

    @property
    def relative_error(self) -> float:
        """‖ΔW−ΔW'‖/‖ΔW‖ over all modules."""
        return total_error(self.losses)

    @property
    def data_error(self) -> float | None:
        """√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) over the modules measured; None without activations."""
        return total_error(self.data_losses) if self.data_losses else None

    def trade_off(self) -> list[CurvePoint]:
        """What every rank would have taken and lost, as `curve` says it."""
        return trade_off(self.plan, self.form, on_data=bool(self.data_losses))

    def tables(self) -> list[Table[ModuleLoss]]:
        """One module a row."""
        rows = [
            ModuleLoss(
                name,
                self.before[name].shape,
                loss,
                self.data_losses[name].relative_error if name in self.data_losses else None,
            )
            for name, loss in self.losses.items()
        ]
        columns = [*COLUMNS, *([DATA_ERROR] if self.data_losses else [])]
        return [Table(f"{self.source}: {len(self.before)} modules, r before and r' after", columns, rows)]

    def sentences(self) -> list[str]:
        """Errors and sizes of the whole, notes, and what was written."""
        lines = [f"error       ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.relative_error)} over all modules"]
        if self.data_losses:
            measured = f"{percent(self.data_error)} over the {len(self.data_losses)} modules measured"
            lines.append(f"on data     √(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) = {measured}")
        lines += [
            f"parameters  {change(self.before.parameters, self.adapter.parameters, '{:,}'.format)}",
            f"file        {change(self.bytes_before, self.bytes_after, exact_size)}",
            *self.notes,
        ]
        if self.target.written:
            lines.append(f"wrote {self.target.written}: {self.format}; the errors are those of this file, read back")
        elif self.target.output or self.target.dry_run:
            lines.append(f"would write {self.format}" + (f" to {self.target.output}" if self.target.output else ""))
        return lines

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "source": self.source,
            "target": str(self.target.written) if self.target.written else None,
            "format": self.format,
            "modules": self.tables()[0].records(),
            "total": {
                "relative_error": self.relative_error,
                **({"data_error": self.data_error} if self.data_losses else {}),
                "modules_before": len(self.before),
                "modules_after": len(self.adapter),
                "parameters_before": self.before.parameters,
                "parameters_after": self.adapter.parameters,
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
            },
            "notes": self.notes,
        }


@dataclass(frozen=True, slots=True)
class _Decision:
    """Ranks of the modules of a plan, and the form in whose bits they are written."""

    plan: TruncationPlan
    ranks: Mapping[str, int]
    form: OutputFormat

    @property
    def adapter(self) -> Adapter:
        """The smaller adapter, nothing computed yet."""
        return self.plan.at(self.ranks)


def compress(
    source: AdapterSource,
    *,
    output: str | PathLike[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    sv_ratio: float | None = None,
    parameters: float | None = None,
    size: int | str | None = None,
    uniform: bool = False,
    weights: str | PathLike[str] | Mapping[str, float] = "absolute",
    activations: str | PathLike[str] | Moments | None = None,
    base: str | PathLike[str] | None = None,
    to: TargetFormat | None = None,
    dtype: FloatType | IntegerType | None = None,
    modules: Sequence[str] = (),
    drop_dead: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **reading: Unpack[Reading],
) -> CompressResult:
    """Write an adapter with fewer directions: the best update of the smaller ranks, and the error that it has.

    One of the rules has to be given. ``rank``, ``energy``, ``error`` and ``sv_ratio`` look at each module alone.
    ``parameters`` and ``size`` are budgets for all modules together: they give directions (and for loralens-q also
    bits) to the modules where they reduce the error most. The scale of every module stays. Tensors that belong to no
    pair of factors are copied. The errors are those of the written file, read back. The source is never overwritten. ΔW
    is never formed: the cost is O((out + in)·r²) per module.

    Parameters
    ----------
    source : path or Adapter
        It is never written over.
    output : path, optional
        The file or folder to write; without it the result holds what would be written.
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
        to
        weights, which may be in a JSON file.
    activations : path or Moments, optional
        The second moments of real inputs, as `calibrate` measures them; the error on those inputs is then minimised.
    base : path, optional
        The base model, for DoRA's magnitudes, and for GGUF.
    to : str, optional
        The dialect to write; the adapter's own by default.
    dtype : str, optional
        The dtype of all factors: ``f32``, ``bf16`` or ``f16``; ``int8`` and ``int4`` are written as loralens-q.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns become smaller.
    drop_dead : bool
        Leave out modules whose update is zero, or that get no rank from the budget.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Check everything, and write nothing.
    **reading : Reading
        How the file is read: ``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``.

    Raises
    ------
    OptionError
        No rule, or several; a budget too small for rank 1 everywhere; a glob that matches nothing; a target that exists
        or is where something is that was read.
    FormatError
        A file that is no adapter; a module that holds NaN or Inf.
    MismatchError
        Activations of another adapter.
    """
    rule = rank_rule(rank=rank, energy=energy, error=error, sv_ratio=sv_ratio, parameters=parameters, size=size)
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    (label,) = labels([source])
    before = read_adapter(source, reading, base=base, label=label)
    form = OutputFormat.of(before, to=to, base=base, dtype=dtype)
    activations_file = None if isinstance(activations, Moments) else activations
    form.check_target(target, source, other_inputs={"the moments": activations_file})
    protect, moments = read_protection(weights), read_moments(activations)
    with place(label):
        plan = _plan(before, form, dtype, modules, moments)
        if rule.name == "bytes" and form.bits is not None and dtype is None and not uniform:
            # With data, a plan that follows the data and one that follows the weights are tried (_least_data_error).
            plans = [plan, *([_plan(before, form, dtype, modules)] if moments else [])]
            decisions = [_choose_bits(each, rule, form, protect=protect, drop_dead=drop_dead) for each in plans]
            decision = _least_data_error(before, moments, decisions) if moments else decisions[0]
        else:
            cost = form.cost if form.bits else None
            ranks = plan.ranks(rule, one_rank=uniform, protect=protect, drop_dead=drop_dead, size=form.size, cost=cost)
            decision = _Decision(plan, ranks, form)
        smaller, magnitude_notes = _solve_magnitudes(before, decision.adapter, base)
    # Errors are measured on what is read back, so that rounding and the writer are included.
    after, bytes_after = decision.form.write(smaller, target)
    with progress("measuring", len(before)) as step:
        module_losses = losses(before, after, threads=cpu_count() or 1, step=step)
    return CompressResult(
        label,
        after,
        before,
        form.name,
        target,
        module_losses,
        data_losses(before, after, moments) if moments else {},
        source_bytes(source, before, form),
        bytes_after,
        [*magnitude_notes, *_notes(plan, decision, after, rank)],
        plan,
        decision.form,
    )


def _plan(
    adapter: Adapter, form: OutputFormat, dtype: str | None, modules: Sequence[str], moments: Moments | None = None
) -> TruncationPlan:
    """The plan; towards few bits in float32, so that nothing is rounded twice."""
    narrow = np.dtype(np.float32) if form.bits and adapter.format != QUANTISED else numpy_dtype(dtype)
    with progress("reading", len(adapter)) as step:
        return TruncationPlan.of(
            adapter, modules=modules, dtype=narrow, moments=moments, threads=cpu_count() or 1, step=step
        )


def _choose_bits(
    plan: TruncationPlan, rule: Rule, form: OutputFormat, *, protect: Protection, drop_dead: bool
) -> _Decision:
    """Ranks and bits in one decision, by reverse water-filling over directions."""
    spectra = {name: directions.s for name, directions in plan.directions.items()}
    unchosen = [(name, module) for name, module in plan.adapter.items() if name not in spectra]
    unchosen_bits = {name: (PLAIN_BITS,) * min(module.rank, *module.shape) for name, module in unchosen}

    def in_bits(bits: Mapping[str, tuple[int, ...]]) -> _Decision:
        """The chosen modules in these bits, and the other modules in 8."""
        kept_bits = {name: each for name, each in bits.items() if each}
        ranks = {name: len(each) for name, each in bits.items()}
        return _Decision(plan, ranks, form.with_bits({**unchosen_bits, **kept_bits}))

    def file_size(bits: Mapping[str, tuple[int, ...]]) -> int:
        decision = in_bits(bits)
        return decision.form.size(decision.adapter)

    allocation = allocate_bits(
        spectra,
        {name: plan.adapter[name].shape for name in spectra},
        int(rule.value),
        weights=protection(spectra, protect),
        shared=shared_ranks(plan.adapter.modules),
        least=plan.least(drop_dead=drop_dead),
        size=file_size,
    )
    return in_bits(allocation.bits)


def _least_data_error(adapter: Adapter, moments: Moments, decisions: Sequence[_Decision]) -> _Decision:
    """The decision that loses least on the data: the first of equals.

    Data say which directions to keep. In a few bits most of the error is that of rounding, which lies beside them, and
    whether it pays to follow the data depends on the adapter.
    """

    def error(decision: _Decision) -> float:
        return total_error(data_losses(adapter, decision.form.rehearse(decision.adapter)[0], moments))

    return min(decisions, key=error)


def _solve_magnitudes(before: Adapter, after: Adapter, base: str | PathLike[str] | None) -> tuple[Adapter, list[str]]:
    """DoRA's magnitudes, solved anew where the base is there; and which it was, in words."""
    changed = {name: after[name] for name in magnitudes(after) if after[name] is not before[name]}
    if not changed:
        return after, []
    if base is None:
        return after, [f"magnitudes of {len(changed)} DoRA modules kept; with --base they are solved anew"]
    solved = solve_magnitudes(before, after, base_weights(base, changed).modules)
    return solved, [f"magnitudes of {len(changed)} DoRA modules solved anew"]


def _notes(plan: TruncationPlan, decision: _Decision, after: Adapter, rank: float | None) -> list[str]:
    """What became of modules that are no plain pairs, and of those that have fewer directions than ``rank``.

    And what PEFT would not load; and where the decision does not follow the data that the plan follows.
    """
    ranks = decision.ranks
    grouped_convolutions = sum(map(keeps_rank, plan.adapter.modules.values()))
    of_full_rank = [plan.adapter[name] for name, each in ranks.items() if each == plan.adapter[name].rank]
    blocks = sum(map(is_fused_module, of_full_rank))
    pairs = sum(isinstance(plan.adapter[name], Structured) for name in ranks)
    return [
        *(
            [f"{grouped_convolutions} grouped convolutions kept as they are: smaller ones would not be grouped"]
            if grouped_convolutions
            else []
        ),
        *([f"{blocks} modules of fused projections kept whole, in blocks"] if blocks else []),
        *([f"{pairs} modules that were no pair (LoKr, LoHa, full) are pairs now"] if pairs else []),
        *rank_notes(rank, ranks),
        *([f"{each.text} ({each.fix})" for each in experts_differ(after)] if decision.form.name == "peft" else []),
        *([BY_WEIGHTS] if decision.plan is not plan else []),
    ]


COLUMNS: tuple[Column[ModuleLoss], ...] = (
    Column("name", lambda row: row.name, "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: list(row.shape), "out × in", shape, priority=2, csv=False),
    Column("out", lambda row: row.shape[0], json=False),
    Column("in", lambda row: row.shape[1], json=False),
    Column("rank_before", lambda row: row.loss.rank_before, "r", priority=7),
    Column("rank_after", lambda row: row.loss.rank_after, "r'", lambda rank: str(rank) if rank else "gone", priority=8),
    Column("relative_error", lambda row: row.loss.relative_error, "error", percent, priority=ALWAYS),
    Column("spectral_error", lambda row: row.loss.spectral_error, "spectral", percent, priority=4),
    Column("energy_kept", lambda row: row.loss.energy_kept, "energy kept", fixed(".2%"), priority=3),
)
DATA_ERROR: Column[ModuleLoss] = Column("data_error", lambda row: row.data_error, "on data", percent, priority=8)
