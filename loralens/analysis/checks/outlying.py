"""Modules whose norm or effective rank is far from that of the other modules of their kind."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.outliers import PER_MODULE, QUANTITIES
from loralens.tables.numbers import whole_percent

CODES = {
    "outlier": "The norm or the effective rank is separated from those of the other modules of its kind and shape by a "
    f"gap that occurs by chance for at most {whole_percent(PER_MODULE)} of the modules: training treats this layer "
    "differently, or it was damaged."
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module and quantity, the least likely first."""
    for outlier in exam.outliers:
        ratio = outlier.value / outlier.typical if outlier.typical > 0 else 0.0
        times = f", {ratio:.2f} × the median of the nearest of its kind" if ratio else ""
        rare = f"{outlier.chance:.1g}" if outlier.chance >= 1e-9 else "less than 1e-9"
        evidence = f"{QUANTITIES[outlier.quantity]} {outlier.value:.4g}{times} (chance of such a gap: {rare})"
        yield Diagnosis("note", "outlier", evidence, "", outlier.name)
