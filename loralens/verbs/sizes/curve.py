"""The verb ``curve``: computes size and error of every rank before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike

from loralens.choices import FLOAT_TYPES, FloatType, TargetFormat
from loralens.compression.directions import Protection
from loralens.compression.truncation_plan import (
    LOSS,
    Choice,
    CurvePoint,
    TruncationPlan,
    curve_ranks,
    energy_choice,
    rank_curve,
    recommended_point,
)
from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.model_in_memory import ModelPath
from loralens.core.stored import Moments
from loralens.core.threads import processor_count
from loralens.errors import place
from loralens.exports import takes_options
from loralens.tables.numbers import count, fixed, percent, size, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.files.output import AdapterTarget, OutputFormat, source_bytes
from loralens.verbs.shared.adapters import AdapterSource, find_source, read_adapter
from loralens.verbs.shared.options import (
    ModuleChoice,
    Reading,
    check_choice,
    numpy_dtype,
    read_moments,
    read_protection,
)

HEADER = 0.005  # a smaller share of the file is not named: it would be 0 %


@dataclass(frozen=True, slots=True, repr=False)
class CurveResult(Tabular):
    """The size and the error of every rank of an adapter.

    Attributes
    ----------
    source : str
        The label of the adapter: its path, if it was read from a file.
    format : str
        The dialect of the files.
    points : sequence of CurvePoint
        The points of the curve, the largest rank first.
    bytes_before : int
        The size of the file that was read; for an adapter in memory, that of a file of its own dialect.
    activations : str or None
        The path of the moments on which errors were measured, or ``moments``; None if errors are those of ΔW.
    by_energy : Choice or None
        The file that ``compress --energy 0.99`` writes, with a rank for each module; None if there is no module.
    """

    source: str
    adapter: Adapter
    format: str
    points: Sequence[CurvePoint]
    bytes_before: int
    activations: str | None = None
    by_energy: Choice | None = None

    @property
    def on_data(self) -> bool:
        """Whether errors are those on real inputs and not those of ΔW."""
        return self.activations is not None

    def conclusion(self) -> list[str]:
        """What `compress` to 99 % of the energy saves, and what one rank for all modules would save."""
        best, largest = recommended_point(self.points), self.points[0] if self.points else None
        if best is None or largest is None or self.by_energy is None:
            return [f"{self.source}: nothing can be made smaller."]
        quantity = "of what ΔW does to the inputs" if self.on_data else "of the energy"
        first = f"{1 - LOSS:.0%}".replace("%", " %") + f" {quantity} of {self.source} "
        if 1 - self.by_energy.bytes / self.bytes_before > HEADER:
            ranks = span(self.by_energy.ranks)
            first += f"fits, with a rank for each module ({ranks}), into {_saving(self.by_energy, self.bytes_before)}."
        else:
            first += "needs the whole file."
        if best is not largest:
            uniform = _saving(best.uniform, self.bytes_before)
            return [first, f"Rank {best.rank} in every module keeps {_energy(best)} {quantity}: {uniform}."]
        text = f"No rank below {largest.rank} in every module keeps so much"
        half = next((point for point in self.points if 2 * point.rank <= largest.rank), None)
        if half is None:
            return [first, f"{text}."]
        uniform = _saving(half.uniform, self.bytes_before)
        return [first, f"{text}; rank {half.rank} keeps {_energy(half)}: {uniform}."]

    def tables(self) -> list[Table[CurvePoint]]:
        """The points of the curve, one rank per row."""
        error = "√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) on the data" if self.on_data else "‖ΔW−ΔW'‖/‖ΔW‖"
        title = f"{self.source}: {count(len(self.adapter), 'module')}; {error} over all of them"
        return [Table(title, point_columns(self.format, on_data=self.on_data), self.points)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        # The columns of both kinds of errors, of which a point has one.
        both = {column.key: column for on_data in (False, True) for column in point_columns("", on_data=on_data)}
        columns = [replace(column, may_lack="error" in column.key[1]) for column in both.values()]
        return (
            "source",
            "format",
            "activations",
            Column("modules", "adapter.len", type=int),
            "bytes_before",
            "by_energy",
            rows_key("points", columns, CurvePoint, "tables.0"),
        )


@takes_options
def curve(
    source: AdapterSource,
    *,
    to: TargetFormat | None = None,
    dtype: FloatType | None = None,
    weights: str | PathLike[str] | Mapping[str, float] = "absolute",
    activations: str | PathLike[str] | Moments | None = None,
    base: ModelPath | None = None,
    selection: ModuleChoice,
    reading: Reading,
) -> CurveResult:
    """Show the file size and the error at every rank: for one rank in all modules, and for ranks chosen by a budget.

    Every row stands for two files that `loralens.compress` would write: one with --rank, and one with --size and the
    same number of bytes. Errors are those of truncation. Rounding adds about 0.2 % of ‖ΔW‖ in bfloat16, and 0.03 % in
    float16, in quadrature.

    Parameters
    ----------
    source : path, Adapter or model
    to : str, optional
        The dialect to write. [default: the dialect of the source, or the nearest that can be written]
    dtype : str, optional
        Round all factors to this dtype. [default: the dtypes of the source]
    weights : str, path or mapping of str to float
        The error that a budget minimises: absolute, relative to each module, or weighted by a JSON file that maps globs
        to weights.
    activations : path or Moments, optional
        The second moments of real inputs, as `loralens.calibrate` writes them. Errors are measured on such inputs.
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Needed for GGUF.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob that matches nothing; an unknown dialect or dtype.
    FormatError
        A file that is not an adapter; a module that holds NaN or Inf.
    MismatchError
        Activations of another adapter.

    Examples
    --------
    $ loralens curve adapter
    """
    modules = selection.globs
    check_choice("dtype", dtype, FLOAT_TYPES)
    source, label = find_source(source)
    adapter = read_adapter(source, reading, base=base, label=label)
    form = AdapterTarget(to=to, dtype=dtype, base=base).form(adapter)
    # Both may be files, whose faults are told before the adapter is decomposed.
    protect, moments = read_protection(weights), read_moments(activations)
    with place(label):
        with progress("reading", len(adapter)) as step:
            plan = TruncationPlan.of(
                adapter,
                modules=modules,
                dtype=numpy_dtype(dtype),
                moments=moments,
                threads=processor_count(),
                step=step,
            )
        points = trade_off(plan, form, protect=protect)
        by_energy = energy_choice(plan, size=form.size, one_rank=form.one_rank) if points else None
    measured_on = None
    if activations is not None:
        measured_on = "moments" if isinstance(activations, Moments) else str(activations)
    before = source_bytes(source, adapter, form)
    return CurveResult(label, adapter, form.name, points, before, measured_on, by_energy)


def trade_off(plan: TruncationPlan, form: OutputFormat, *, protect: Protection = "absolute") -> list[CurvePoint]:
    """The points of the curve for a dialect."""
    # Only the modules that may become smaller count: the others keep their ranks.
    most = max((plan.adapter[name].rank for name in plan.directions), default=0)
    with progress("choosing ranks", len(curve_ranks(most))) as step:
        return rank_curve(plan, size=form.size, one_rank=form.one_rank, protect=protect, step=step)


def _energy(point: CurvePoint) -> str:
    return percent(1 - point.uniform.error**2)


def _saving(choice: Choice, before: int) -> str:
    """The size of a file, and how much smaller it is: ``110.2 kB instead of 221.0 kB, 50 % less``."""
    # A file in another dialect or dtype may be larger.
    change = 1 - choice.bytes / before
    words = f"{fixed('.0%')(abs(change))} {'less' if change >= 0 else 'more'}"
    return f"{size(choice.bytes)} instead of {size(before)}, {words}"


def point_columns(format: str, *, on_data: bool) -> list[Column[CurvePoint]]:
    """The columns of a point of the curve.

    Parameters
    ----------
    format : str
        The dialect, for the heading of the sizes.
    on_data : bool
        Whether errors are those on real inputs. They have keys of their own, as the two cannot be compared.
    """
    error = "data_error" if on_data else "relative_error"
    # The uniform rank is never left out; a budget is an alternative to it.
    return [
        Column("rank", "rank", "rank", priority=ALWAYS, about="one for all modules"),
        Column(("uniform", "ranks"), "uniform.ranks"),
        Column(("uniform", "parameters"), "uniform.parameters", "parameters", "{:,}".format, priority=3),
        Column(("uniform", "bytes"), "uniform.bytes", f"{format} file", size, priority=ALWAYS),
        Column(
            ("uniform", error),
            "uniform.error",
            "error",
            percent,
            priority=ALWAYS,
            about="‖ΔW−ΔW'‖/‖ΔW‖ of this rank in all modules" if not on_data else "of the outputs on the data",
        ),
        Column(
            ("budget", error),
            "budget.error",
            "by budget",
            percent,
            priority=7,
            about="the error of the best ranks in as many bytes (compress --size)",
        ),
        Column(
            ("budget", "ranks"),
            "budget.ranks",
            "its ranks",
            span,
            priority=4,
            about="the lowest and the highest of these ranks",
        ),
        Column(("budget", "parameters"), "budget.parameters"),
        Column(("budget", "bytes"), "budget.bytes"),
    ]
