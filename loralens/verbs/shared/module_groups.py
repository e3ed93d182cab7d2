"""Modules in groups: values by kind, tables of the spectra of kinds and blocks, and of modules that stand apart."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from loralens.analysis.spectrum import Group, Outlier
from loralens.core.names import kind, natural_key
from loralens.tables.numbers import UNDEFINED, fixed, number
from loralens.tables.table import ALWAYS, Column, Table

Value = TypeVar("Value")

BAR = 20  # characters of the longest bar, so that one of them is 5 % of the largest share


def group_by_kind(values: Mapping[str, Value]) -> dict[str, list[Value]]:
    """The values of modules by the kind of the module; kinds in natural order, modules in the given one."""
    kinds: dict[str, list[Value]] = {}
    for name in sorted(values, key=lambda name: natural_key(kind(name))):
        kinds.setdefault(kind(name), []).append(values[name])
    return kinds


def groups_table(what: str, groups: Sequence[Group]) -> Table[Group]:
    """The energies and effective ranks of kinds or of blocks, one group a row.

    Parameters
    ----------
    what : str
        ``kind`` or ``block``: the heading of the first column.
    groups : sequence of Group
    """
    # In a model with one stack of blocks the stack has nothing to tell; with several, the number alone would not do.
    stacks = {group.name.rpartition(".")[0] for group in groups if group.name != "outside"}
    short = what == "block" and len(stacks) == 1
    largest = max((group.share for group in groups), default=0.0)

    def label(group: Group) -> str:
        return group.name.rpartition(".")[2] if short else group.name

    def bar(group: Group) -> str:
        # Bars are relative to the largest group: shares of a deep model are all small, and their bars would be empty.
        return "█" * round(BAR * group.share / largest) if largest else ""

    columns: tuple[Column[Group], ...] = (
        Column(what, label, what, align="left", priority=ALWAYS),
        Column("modules", "modules", "modules"),
        Column(
            "frobenius",
            "frobenius",
            "‖ΔW‖F",
            number,
            priority=3,
            about="√Σ‖ΔW‖² of its modules",
            matters="largest",
        ),
        Column(
            "energy",
            "share",
            "energy",
            fixed(".1%"),
            priority=3,
            about="part of the ‖ΔW‖² of all modules chosen",
            bar=True,
        ),
        Column(
            "effective_rank",
            "effective_rank",
            "effective",
            fixed(".2f"),
            priority=2,
            about="effective rank, mean over modules that are not 0",
        ),
        # Blank instead of 0, so that the rare group with such modules catches the eye.
        Column("zero", "zero", "zero", lambda zero: str(zero) if zero else "", about="modules with ΔW = 0"),
        # The bar repeats the energy, so it is the first column to go on a narrow terminal.
        Column("share", bar, "share of energy", align="left", priority=0, drawn=True),
    )
    return Table(f"by {what}", columns, groups)


OUTLIER_COLUMNS: tuple[Column[Outlier], ...] = (
    Column("module", "name", "module", align="left", priority=ALWAYS),
    Column("value", "value", "‖ΔW‖F", number, about="Frobenius norm of ΔW"),
    Column(
        "typical",
        "typical",
        "typical",
        number,
        about="of a module of its kind and shape at its depth, by a line through all of them",
    ),
    Column(
        "ratio",
        lambda row: row.value / row.typical if row.typical > 0 else None,  # most of its kind may be 0
        "ratio",
        lambda ratio: UNDEFINED if ratio is None else f"{ratio:.2f} ×",
    ),
    Column(
        "deviations",
        "deviations",
        "deviations",
        fixed(".1f"),
        about="distance of the logarithms, in median absolute deviations of its kind",
    ),
)
