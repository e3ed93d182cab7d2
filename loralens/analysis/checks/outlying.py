"""Modules far from the others of their kind."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.analysis.groups import outliers

RULES = {
    "outlier": "Norm or effective rank is far from that of the other modules of its kind (robust z beyond 3.5): a "
    "layer that training treats differently, or that was damaged."
}
WORDS = {"frobenius": "‖ΔW‖", "effective_rank": "effective rank"}


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for every module and quantity, farthest first."""
    for one in outliers(patient.spectra):
        evidence = f"{WORDS[one.quantity]} {one.value:.4g}, {one.value / one.typical:.2f} × the median (z {one.z:+.1f})"
        yield Diagnosis("note", "outlier", evidence, "", one.name)
