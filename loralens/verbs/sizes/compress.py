"""The verb ``compress``: truncates an adapter to fewer directions, and measures the error of the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from loralens.compression.loss import UpdateLoss, data_losses, losses, total_error
from loralens.compression.truncation_plan import TruncationPlan, is_fused_module, keeps_rank
from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import is_expert_alone
from loralens.core.ranks import Rule
from loralens.core.stored import Moments
from loralens.core.structured import Structured
from loralens.core.threads import processor_count
from loralens.core.together import magnitudes
from loralens.errors import place
from loralens.exports import takes_options
from loralens.tables.numbers import change, count, fixed, percent, shape, size
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.batches.batch import BatchResult, in_batches
from loralens.verbs.files.output import SAME_SIZE, AdapterTarget, OutputFormat, Target, Written, source_bytes
from loralens.verbs.shared.adapters import Source, find_source, read_adapter
from loralens.verbs.shared.options import (
    RULES,
    ModuleChoice,
    RankRules,
    Reading,
    numpy_dtype,
    rank_notes,
    read_directions,
    read_moments,
    read_protection,
)

if TYPE_CHECKING:
    from loralens.compression.truncation_plan import CurvePoint


@dataclass(frozen=True, slots=True)
class ModuleLoss:
    """One row: the error of a module. ``data_error`` is None if its inputs were not measured."""

    name: str
    shape: tuple[int, int]
    loss: UpdateLoss
    data_error: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class CompressResult(Written):
    """A smaller adapter, and the error of each of its modules.

    Attributes
    ----------
    source : str
        The path of the adapter, or the name of an object in messages.
    adapter : Adapter
        The smaller adapter as it was written and read back. If nothing was written, it has the same numbers, and the
        names of modules that the source has.
    format : str
        The dialect of the result.
    losses : mapping of str to UpdateLoss
        The error of every module of ``before``, with that of rounding.
    data_losses : mapping of str to UpdateLoss
        The errors on the inputs whose moments were given, for the modules that these moments cover; empty without
        moments.
    bytes_before, bytes_after : int
        The sizes of the files of weights. For an object, ``bytes_before`` is the size that its file would have.
    notes : list of str
        Remarks for the user, such as modules that were kept whole.
    plan : TruncationPlan
        The directions of the modules, from which `trade_off` is computed.
    kept_whole : bool
        Whether the result is the adapter as it was, because the compressed file would not be smaller.
    only_if_smaller, force : bool
        The options of `compress`.
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
    kept_whole: bool = False
    only_if_smaller: bool = False
    force: bool = False

    @property
    def smaller(self) -> bool:
        """Whether the file of weights became smaller, or would become so."""
        return self.bytes_after < self.bytes_before

    @property
    def larger(self) -> bool:
        """Whether the file of weights became larger, or would become so."""
        return self.bytes_after > self.bytes_before and not self.kept_whole

    @property
    def answer(self) -> bool:
        """False if nothing was written, or if the file became larger without ``force``."""
        return not self.withheld and (self.force or not self.larger)

    @property
    def withheld(self) -> bool:
        """Whether nothing was written, since the file would not become smaller."""
        return self.only_if_smaller and not self.smaller

    @property
    def relative_error(self) -> float:
        """‖ΔW−ΔW'‖_F/‖ΔW‖_F over all modules."""
        return total_error(self.losses)

    @property
    def data_error(self) -> float | None:
        """√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) over the modules that the moments cover; None without activations."""
        return total_error(self.data_losses) if self.data_losses else None

    def numbers(self) -> dict[str, Any]:
        """What matters of this adapter among several, as JSON values; ranks are those of the widest module."""
        return {
            "modules": len(self.before),
            "rank_before": max((module.rank for module in self.before.modules.values()), default=0),
            "rank_after": max((module.rank for module in self.adapter.modules.values()), default=0),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "relative_error": self.relative_error,
            "smaller": self.smaller,
        }

    def trade_off(self) -> "list[CurvePoint]":
        """The sizes and errors of every rank, as `loralens.curve` computes them."""
        from loralens.verbs.sizes.curve import trade_off  # only figures show it

        return trade_off(self.plan, self.form)

    def tables(self) -> list[Table[ModuleLoss]]:
        """The modules, one per row."""
        on_data = {name: loss.relative_error for name, loss in self.data_losses.items()}
        rows = [
            ModuleLoss(name, self.before[name].shape, loss, on_data.get(name)) for name, loss in self.losses.items()
        ]
        # Without moments the column would be empty.
        columns = [*COLUMNS, *([DATA_ERROR] if self.data_losses else [])]
        return [
            Table(
                f"{self.source}: {count(len(self.before), 'module')}, r before and r' after",
                columns,
                rows,
                uneventful=lambda row: row.loss.rank_after == row.loss.rank_before and row.loss.relative_error == 0,
                sum_up=lambda unchanged: f"{count(unchanged, 'module')} unchanged",
            )
        ]

    def conclusion(self) -> list[str]:
        """How much smaller the file is, and how much of the update is lost."""
        before = size(self.bytes_before)
        if self.withheld:
            return [f"Nothing was written: the file would not be smaller than {self.source} ({before})."]
        if self.kept_whole:
            what = f"{self.source} unchanged ({before}), as the file would not become smaller"
        else:
            less = 1 - self.bytes_after / self.bytes_before
            same = less < SAME_SIZE and not self.larger
            than = "as large as" if same else f"{percent(abs(less))} {'larger' if self.larger else 'smaller'} than"
            what = f"{than} {self.source} ({before} → {size(self.bytes_after)}), {self._loss}"
        return [self.target.conclusion(what)]

    @property
    def _loss(self) -> str:
        if not self.relative_error:
            return "without loss"
        energy = max(0.0, 1 - self.relative_error**2)
        return f"with {percent(energy)} of the energy (error {percent(self.relative_error)})"

    def sentences(self) -> list[str]:
        """The error on data, the exact sizes, and the notes."""
        lines = []
        if self.data_losses:
            measured = f"{percent(self.data_error)} over the {len(self.data_losses)} modules measured"
            lines.append(f"on data     √(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) = {measured}")
        # Sizes are those of the file of weights alone, which --size counts too.
        if not self.kept_whole:
            lines += [
                f"parameters  {change(self.before.parameters, self.adapter.parameters, '{:,}'.format)}",
                f"bytes       {change(self.bytes_before, self.bytes_after, '{:,}'.format)}",
            ]
        measured = "; errors are measured on the file, read back" if self.output and not self.kept_whole else ""
        return [*lines, f"format      {self.format}{measured}", *self.notes]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "source",
            Column("target", "target.written"),
            "format",
            rows_key(
                "modules", (*COLUMNS, replace(DATA_ERROR, may_lack=True)), ModuleLoss, lambda result: result.tables()[0]
            ),
            Column(("total", "relative_error"), "relative_error"),
            # Only with moments.
            Column(
                ("total", "data_error"),
                lambda result: result.data_error if result.data_losses else ...,
                type=float,
                may_lack=True,
            ),
            Column(("total", "modules_before"), "before.len", type=int),
            Column(("total", "modules_after"), "adapter.len", type=int),
            Column(("total", "parameters_before"), "before.parameters"),
            Column(("total", "parameters_after"), "adapter.parameters"),
            *(Column(("total", key), key) for key in ("bytes_before", "bytes_after")),
            "smaller",
            "notes",
        )


# A narrow terminal loses the shape first: names and ranks tell modules apart, and the error is what one looks for.
COLUMNS: Columns[ModuleLoss] = (
    label_column("name", "module"),
    Column("shape", "shape", "out × in", shape, priority=2, csv=False),
    Column("out", "shape.0", json=False),
    Column("in", "shape.1", json=False),
    Column("rank_before", "loss.rank_before", "r", priority=7),
    Column("rank_after", "loss.rank_after", "r'", lambda rank: str(rank) if rank else "gone", priority=8),
    Column("relative_error", "loss.relative_error", "error", percent, priority=ALWAYS, matters="largest"),
    Column("spectral_error", "loss.spectral_error", "spectral", percent, priority=4),
    Column("energy_kept", "loss.energy_kept", "energy kept", fixed(".2%"), priority=3),
)
DATA_ERROR: Column[ModuleLoss] = Column("data_error", "data_error", "on data", percent, priority=8)


@in_batches(
    lambda result: {
        "numbers": result.numbers(),
        "answer": result.answer,
        **({"status": "larger"} if result.larger else {"status": "unchanged"} if result.kept_whole else {}),
    },
    check=lambda options: RankRules(**{name: options[name] for name in RULES if name in options}).required(),
)
@takes_options
def compress(
    source: Source,
    *,
    rules: RankRules,
    uniform: bool = False,
    weights: str | PathLike[str] | Mapping[str, float] = "absolute",
    activations: str | PathLike[str] | Moments | None = None,
    drop_dead: bool = False,
    only_if_smaller: bool = False,
    force: bool = False,
    jobs: int | None = None,
    writing: AdapterTarget,
    selection: ModuleChoice,
    reading: Reading,
) -> CompressResult | BatchResult:
    """Write an adapter with fewer directions: the best update of the smaller ranks, and the error that it has.

    One of the rules has to be given. ``rank``, ``energy``, ``error``, ``sv_ratio`` and ``sv_cumulative`` look at each
    module alone. ``parameters`` and ``size`` are budgets for the whole adapter, whose directions go to the modules
    where they reduce the error most. With another rule, ``rank`` is a ceiling: no module gets more directions. The
    scale of every module stays. Tensors that belong to no pair of factors are copied. Errors are measured on the
    written file. The source is never overwritten.

    If the file would not become smaller, the adapter is written as it was, unless ``to``, ``dtype`` or ``uniform`` asks
    for another form. If such a file is larger than the source, the command exits with 1 unless ``force`` is given.

    Several adapters, or a folder of them, are written into the folder OUT, each under its own name. What exists there
    is skipped, unless ``overwrite`` is given.

    Parameters
    ----------
    source : path, Adapter or model, or a list of them
        Several adapters, or a folder that has some in it, give a `BatchResult` with one row for each.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    weights : str, path or mapping of str to float
        The error that a budget minimises: absolute, relative to each module, or weighted by a JSON file that maps globs
        to weights.

        Or by the mapping itself.
    activations : path or Moments, optional
        The second moments of real inputs, as `loralens.calibrate` writes them. The error on such inputs is minimised.
    drop_dead : bool
        Leave out modules whose update is zero, or that get no rank from the budget.
    only_if_smaller : bool
        Write nothing, and exit with 1, if the file would not become smaller.

        The ``answer`` of the result is then False.
    force : bool
        Exit with 0 also if the file becomes larger, as with another ``dtype``.

        The ``answer`` of the result then stays True.
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process. [default: 1]
    rules : RankRules
        The options ``rank``, ``energy``, ``error``, ``sv_ratio``, ``sv_cumulative``, ``parameters``, ``size``.
    writing : AdapterTarget
        The options ``output``, ``to``, ``base``, ``dtype``, ``overwrite``, ``dry_run``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        No rule or several were given, the budget is too small for rank 1 everywhere, a glob pattern matches no module,
        or the target exists or overlaps with an input.
    FormatError
        The file is not an adapter, or a module holds NaN or Inf.
    MismatchError
        The activations are those of another adapter.

    Notes
    -----
    For each module, the update of rank r' that is nearest to ΔW in the Frobenius and the spectral norm is the sum of
    its r' leading singular triplets (Eckart and Young 1936). They are computed from the factors: ΔW is never formed,
    and the cost is O((out + in)·r²) per module.

    Examples
    --------
    $ loralens compress adapter --energy 0.99 -o smaller
    $ loralens compress adapter --size 20MB -o smaller
    """
    del jobs  # one adapter is one job
    modules = selection.globs
    # Several rules or none are refused before anything is read.
    rule = rules.required()
    base, dtype, target = writing.base, writing.dtype, writing
    source, label = find_source(source)
    before = read_adapter(source, reading, base=base, label=label)
    form = writing.form(before)
    # Moments in memory have no place that the target could overwrite.
    activations_file = None if isinstance(activations, Moments) else activations
    protect, moments = read_protection(weights), read_moments(activations)
    # The target is checked before any factor is read, so that a wrong one costs no work.
    form.check_target(target, source, other_inputs={"the moments": activations_file})
    with place(label):
        plan = read_directions(before, modules=modules, dtype=numpy_dtype(dtype), moments=moments)
        ranks = plan.ranks(rule, one_rank=uniform, protect=protect, drop_dead=drop_dead, size=form.size)
        new, notes = _solve_magnitudes(before, plan.at(ranks), base)
    bytes_before = source_bytes(source, before, form)
    gained = form.size(new) < bytes_before
    # If another form was requested by name, it is written even if the file becomes larger.
    unchanged = not gained and form.name == before.format and dtype is None and not uniform
    # The products of a LoHa, for example, cannot be written as they were.
    unchanged = unchanged and not any(m.origin and m.origin.format != before.format for m in before.modules.values())
    if unchanged:
        new, notes = before, []
    if only_if_smaller and not gained:
        target = replace(target, dry_run=True)
    # Errors are measured on what is read back, so that rounding and the writer are included.
    after, bytes_after = form.write(new, target)
    with progress("measuring", len(before)) as step:
        module_losses = losses(before, after, bases=plan.bases, threads=processor_count(), step=step)
    on_data = data_losses(before, after, moments) if moments else {}
    notes += _notes(before, ranks, after, rule, form.name)
    measured = module_losses, on_data, bytes_before, bytes_after, notes
    chosen = plan, form, unchanged, only_if_smaller, force
    return CompressResult(label, after, before, form.name, target, *measured, *chosen)


def _solve_magnitudes(before: Adapter, after: Adapter, base: ModelPath | None) -> tuple[Adapter, list[str]]:
    """The adapter with DoRA's magnitudes solved anew, m' = m·cos∠, if a base is given; and a note about them."""
    # The magnitude of a module that stayed as it was is still the best one.
    changed = {name: after[name] for name in magnitudes(after) if after[name] is not before[name]}
    if not changed:
        return after, []
    if base is None:
        return after, [f"magnitudes of {len(changed)} DoRA modules kept; with --base they are solved anew"]
    # Imported here, as reading a base takes 6 ms to import.
    from loralens.compression.truncation_plan import solve_magnitudes
    from loralens.verbs.shared.adapters import base_weights

    solved = solve_magnitudes(before, after, base_weights(base, changed).modules)
    return solved, [f"magnitudes of {len(changed)} DoRA modules solved anew"]


def _notes(adapter: Adapter, ranks: Mapping[str, int], after: Adapter, rule: Rule, dialect: str) -> list[str]:
    """Remarks about modules that are not plain pairs, have fewer directions than asked for, or are refused by PEFT."""
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
    notes += rank_notes(rule.values, ranks)
    # transformers 5 joins such experts into one stack, for which PEFT has one rank and one α.
    if dialect == "peft" and any(map(is_expert_alone, after)):
        # Imported here, as the rules of all clients take long to import, and only notes on this dialect need one.
        from loralens.analysis.clients import experts_differ

        notes += [f"{finding.text} ({finding.fix})" for finding in experts_differ(after)]
    return notes
