"""Check: something that can be wrong with an adapter, and how to see it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient


@final
@dataclass(frozen=True, slots=True)
class Check:
    """What a check looks at, what it may say, and why that matters.

    Attributes
    ----------
    rules : mapping of str to str
        Code → what it means and why it matters, in one or two sentences.
    one : callable or None
        Diagnoses of one patient.
    all : callable or None
        Diagnoses of two or more, told apart by their ``adapter``.
    """

    rules: Mapping[str, str]
    one: Callable[[Patient], Iterable[Diagnosis]] | None = None
    all: Callable[[Sequence[Patient]], Iterable[Diagnosis]] | None = None
