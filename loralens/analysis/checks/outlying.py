"""Modules whose norm is far from that of the other modules of their kind."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.core.messages import quote_word

CODES = {
    "outlier": "‖ΔW‖ of the module is at least four times, or at most a quarter, of what the other modules of its kind "
    "and shape suggest for its depth: the run diverged there, or the module was scaled or damaged afterwards."
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module, the farthest first."""
    for outlier in exam.outliers:
        ratio = outlier.value / outlier.typical if outlier.typical > 0 else 0.0
        times = f", {ratio:.3g} × what its kind suggests for its depth" if ratio else ""
        evidence = f"‖ΔW‖ {outlier.value:.4g}{times} ({outlier.deviations:.0f} median deviations)"
        leave_out = exam.writes("drop", "without", "-m", quote_word(outlier.name))
        fix = (
            f"compare it with earlier checkpoints of the run, and take the last sound one; `{leave_out}` leaves it out"
        )
        yield Diagnosis("warning", "outlier", evidence, fix, outlier.name)
