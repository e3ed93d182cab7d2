"""Adapters of another base than the one they are held against, and of several bases."""

from collections.abc import Iterator, Sequence

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.core.naming.base_model import apart, contradiction

RULES = {
    "base-differs": "The adapter names another base than this one. Names and shapes may match all the same: what is "
    "measured and merged then means nothing.",
}
OF_SEVERAL = {
    "bases-differ": "The adapters are of different bases: an update means something beside its own weights only, and "
    "what is compared of them means nothing.",
}


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis where the base is not the one that the adapter names."""
    if patient.base is None or not patient.adapter.base_model:
        return
    why = contradiction(patient.named, patient.base)
    if why:
        evidence = f"it names {patient.adapter.base_model} as its base, and this is another: {why}"
        yield Diagnosis("warning", "base-differs", evidence, "give the base that it was trained on")


def look_at_all(patients: Sequence[Patient]) -> Iterator[Diagnosis]:
    """One diagnosis for all, at the first of them."""
    difference = apart(
        [one.path for one in patients], [one.adapter for one in patients], [one.named for one in patients]
    )
    if difference:
        yield Diagnosis("warning", "bases-differ", difference, "take adapters of one base", adapter=patients[0].path)
