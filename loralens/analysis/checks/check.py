"""The description of a check: the codes that it can report, and its functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient


@final
@dataclass(frozen=True, slots=True)
class Check:
    """A check of `loralens doctor`: a row of the table `CHECKS`.

    Attributes
    ----------
    rules : mapping of str to str
        Code → what it means and why it matters, in one or two sentences.
    one : callable or None
        The function that checks one adapter.
    all : callable or None
        The function that checks two or more adapters together; its diagnoses name their ``adapter``.
    """

    rules: Mapping[str, str]
    one: Callable[[Patient], Iterable[Diagnosis]] | None = None
    all: Callable[[Sequence[Patient]], Iterable[Diagnosis]] | None = None
