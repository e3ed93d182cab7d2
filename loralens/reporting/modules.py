"""The last section: a table of all modules, which can be sorted and filtered."""

from collections.abc import Mapping, Sequence

from loralens.reporting.document import PageTable, Section
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject

Numbers = Mapping[str, int]
FEW = 60  # modules up to which the table stands open


def section(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> Section:
    """The section of all modules: one table per adapter."""
    parts = [
        PageTable(tables.modules(one), [[numbers[name]] for name in one.spectra], folded=len(one.spectra) > FEW)
        for one in subjects
    ]
    return Section(
        "modules",
        "Every module",
        "Click a column heading to sort. The filter at the top of the page selects modules.",
        parts,
    )
