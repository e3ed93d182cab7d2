"""Adapters that belong to another base than the given one, and adapters of different bases."""

from collections.abc import Iterator, Sequence

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.core.naming.base_model import contradiction, find_contradiction

CODES = {
    "base-differs": "The adapter names another base than this one. Even if names and shapes match, measurements and "
    "merges with this base mean nothing.",
}
OF_SEVERAL = {
    "bases-differ": "The adapters belong to different bases. An update has a meaning only for the weights that it was "
    "trained on, so comparisons between them have none.",
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report a base that is not the one that the adapter names."""
    if exam.base is None or not exam.adapter.base_model:
        return
    if why := contradiction(exam.named, exam.base):
        evidence = f"it names {exam.adapter.base_model} as its base, and this is another: {why}"
        yield Diagnosis("warning", "base-differs", evidence, "give the base that it was trained on")


def look_at_all(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
    """Report adapters of different bases, once, for the first adapter."""
    paths, adapters = [exam.path for exam in exams], [exam.adapter for exam in exams]
    if difference := find_contradiction(paths, adapters, [exam.named for exam in exams]):
        yield Diagnosis("warning", "bases-differ", difference, "take adapters of one base", adapter=exams[0].path)
