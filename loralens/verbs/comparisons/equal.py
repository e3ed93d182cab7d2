"""The verb ``equal``: tests whether two adapters are the same update."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite

from loralens.analysis.equality import UpdateDifference, differences
from loralens.core.messages import progress, tell_findings
from loralens.core.model_in_memory import ModelPath
from loralens.errors import MismatchError, OptionError
from loralens.exports import takes_options
from loralens.formats.dialects.expert_layouts import divide_as
from loralens.formats.dialects.gguf import has_permuted_rows, restore_rows
from loralens.tables.numbers import count, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.shared.adapters import AdapterSource, labels, read_where_unknown, warn_of_bases
from loralens.verbs.shared.options import Reading

ROUNDED = 0.01  # relative difference up to which 16-bit factors may be the reason: bfloat16 leaves 0.4 % at most


@dataclass(frozen=True, slots=True, repr=False)
class EqualResult(Tabular):
    """The differences of two adapters. Its truth value says whether they are the same update.

    Attributes
    ----------
    differences : sequence of UpdateDifference
        The differences of all modules, in natural order.
    tolerance : float
        The largest relative difference of modules that count as equal.
    not_compared : int
        The number of tensors of both that belong to no pair: heads, biases, magnitudes.
    """

    differences: Sequence[UpdateDifference]
    tolerance: float
    not_compared: int

    @property
    def equal(self) -> bool:
        """Whether no module differs by more than the tolerance."""
        return not self.beyond

    @property
    def answer(self) -> bool:
        """The same as `equal`: the answer that the exit code gives."""
        return self.equal

    def __bool__(self) -> bool:
        return self.equal

    @property
    def beyond(self) -> list[UpdateDifference]:
        """The modules that differ by more than the tolerance, in natural order."""
        # "not ≤" instead of ">", so that a difference of NaN does not count as equal.
        return [difference for difference in self.differences if not difference.relative <= self.tolerance]

    @property
    def largest(self) -> float:
        """‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the module that differs most; 0 if there are no modules."""
        return max((difference.relative for difference in self.differences), default=0.0)

    def tables(self) -> list[Table[UpdateDifference]]:
        """The modules that differ most."""
        worst = sorted(self.differences, key=lambda difference: -difference.relative)
        # Most modules have no note, and an empty column would only take room.
        columns = COLUMNS if any(difference.note for difference in worst) else COLUMNS[:-1]

        def is_equal(row: UpdateDifference) -> bool:
            return row.relative <= self.tolerance

        def sum_up(modules: int) -> str:
            # Where all are equal, the conclusion has said so.
            return "" if self.equal else f"equal: {count(modules, 'module')}"

        return [Table("‖ΔW₁−ΔW₂‖/‖ΔW‖, the largest first", columns, worst, is_equal, sum_up)]

    def conclusion(self) -> list[str]:
        """Whether the two are the same update, and by how much they differ."""
        modules, tolerance = count(len(self.differences), "module"), f"tolerance {self.tolerance:g}"
        if self.equal and not self.largest:
            return [f"Equal: no difference at all in {modules}."]
        if self.equal:
            return [f"Equal: the largest difference in {modules} is {self.largest:.3g} of ‖ΔW‖ ({tolerance})."]
        beyond = f"{len(self.beyond)} of {modules} differ" if len(self.differences) > 1 else "the only module differs"
        # A module that only one of the two adapters has differs by 100 %, and rounding changes ΔW by thousandths.
        close = " That is rounding or little more." if self.largest <= ROUNDED else ""
        return [f"Different: {beyond}, by up to {self.largest:.3g} of ‖ΔW‖ ({tolerance}).{close}"]

    def listing(self) -> list[Table[UpdateDifference]]:
        """All modules, one module per row."""
        return [Table("differences", COLUMNS, self.differences)]

    def sentences(self) -> list[str]:
        """The number of tensors that were not compared."""
        # Two adapters with one ΔW and different heads are equal here, which must be said.
        if not self.not_compared:
            return []
        return [f"not compared: {self.not_compared} tensors that do not belong to a pair (heads, biases, magnitudes …)"]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "equal",
            "tolerance",
            "not_compared",
            rows_key("modules", COLUMNS, source="differences"),
        )


COLUMNS: Columns[UpdateDifference] = (
    label_column("name", "module"),
    Column("relative", "relative", "difference", partial(number, digits=3), priority=ALWAYS, matters="largest"),
    Column("note", "note", "note", align="left"),
)


@takes_options
def equal(
    first: AdapterSource,
    second: AdapterSource,
    *,
    tolerance: float = 1e-06,
    base: ModelPath | None = None,
    reading: Reading,
) -> EqualResult:
    """Test whether two adapters are the same update, whatever their dialects, ranks or factors.

    Modules are matched by name; if that fails, dots and underscores are taken as the same. ``alpha`` and ``scale`` are
    used for the adapter that does not state its own. If one of two GGUF files states the head counts, they are used for
    both; otherwise ``base`` is needed. The exit code is 0 if they are equal, 1 if not.

    Parameters
    ----------
    first : path, Adapter or model
    second : path, Adapter or model
    tolerance : float
        The largest relative difference ‖ΔW₁−ΔW₂‖/‖ΔW‖ of equal modules.
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Says the head counts for
        GGUF files, and how stacks of experts are ordered.

        The base model. Its head counts determine the order of rows of q and k in GGUF files, and its type how gate and
        up lie in stacks of experts.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A tolerance that is negative or not finite; stacks of experts of PEFT and of mlx-lm without a base.
    FormatError
        A file that is not an adapter; a module that holds NaN or Inf.
    MismatchError
        The rows of q and k of one adapter are in another order, and no head counts are known to restore it.

    Examples
    --------
    $ loralens equal adapter other
    """
    # A tolerance of 0 is allowed: equal factors differ by exactly 0.
    if not isfinite(tolerance) or tolerance < 0:
        raise OptionError(f"tolerance {tolerance!r} is not possible", fix="give a finite number of 0 or more")
    names = labels([first, second])
    adapter, other = (read_where_unknown(source, reading, base=base) for source in (first, second))
    # Each adapter uses the head counts of the other, if the other states them.
    adapter, other = restore_rows(adapter, other), restore_rows(other, adapter)
    # Two adapters with rows in the same unknown order can be compared as they are.
    if has_permuted_rows(adapter) != has_permuted_rows(other):
        permuted = names[0] if has_permuted_rows(adapter) else names[1]
        raise MismatchError(
            f"{permuted}: rows of q and k are in llama.cpp's order, and nothing "
            "says the head counts by which to compare them with the other's",
            fix="give the base that it was trained on: --base DIR",
        )
    # Told after the rows are restored, as a finding about their order may be gone then.
    for name, findings in zip(names, (adapter.findings, other.findings), strict=True):
        tell_findings(name, findings)
    warn_of_bases(names, (adapter, other))
    # What PEFT has in one stack, llama.cpp and mlx-lm have in two.
    config = None
    if base:
        # Most comparisons need no reader of bases.
        from loralens.formats.models.checkpoint import model_config

        config = model_config(base)
    adapter, other = divide_as(adapter, other, config), divide_as(other, adapter, config)
    with progress("comparing", max(len(adapter), len(other))) as step:
        measured = differences(adapter, other, step=step)
    return EqualResult(measured, tolerance, len(adapter.extra) + len(other.extra))
