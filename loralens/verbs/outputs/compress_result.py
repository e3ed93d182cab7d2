"""The result of ``compress``: the smaller adapter, with one row per module, and the sizes before and after."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loralens.compression.loss import UpdateLoss, total_error
from loralens.compression.plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.tables.numbers import change, count, fixed, percent, shape, size
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.form import OutputFormat
from loralens.verbs.outputs.target import Target, Written

if TYPE_CHECKING:
    from loralens.compression.curve import CurvePoint


@dataclass(frozen=True, slots=True)
class ModuleLoss:
    """One row: the error of a module. ``data_error`` is None if its inputs were not measured."""

    name: str
    shape: tuple[int, int]
    loss: UpdateLoss
    data_error: float | None = None


@dataclass(frozen=True, slots=True)
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

    def __repr__(self) -> str:
        return (
            f"CompressResult({self.before.parameters:,} → {self.adapter.parameters:,} parameters, "
            f"error {percent(self.relative_error)})"
        )

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
        from loralens.verbs.curve import trade_off  # only figures show it

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
            than = f"{percent(abs(less))} {'larger' if self.larger else 'smaller'} than" if less else "as large as"
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

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "source": self.source,
            "target": self.target.record(),
            "format": self.format,
            "modules": self.tables()[0].records(),
            "total": {
                "relative_error": self.relative_error,
                # Only with moments, as docs/json.md says.
                **({"data_error": self.data_error} if self.data_losses else {}),
                "modules_before": len(self.before),
                "modules_after": len(self.adapter),
                "parameters_before": self.before.parameters,
                "parameters_after": self.adapter.parameters,
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
            },
            "smaller": self.smaller,
            "notes": self.notes,
        }


# A narrow terminal loses the shape first: names and ranks tell modules apart, and the error is what one looks for.
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
