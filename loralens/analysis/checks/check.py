"""Check: something that can be wrong with an adapter, and how to see it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient

Needs = Literal["adapter", "base", "several"]


@final
@dataclass(frozen=True, slots=True)
class Check:
    """What a check looks at, what it may say, and why that matters.

    Attributes
    ----------
    rules : mapping of str to str
        Code → what it means and why it matters, in one or two sentences.
    needs : str
        ``adapter``; ``base``: the base's weights too; ``several``: two adapters or more.
    one : callable or None
        Diagnoses of one patient.
    all : callable or None
        Diagnoses of several, told apart by their ``adapter``.
    """

    rules: Mapping[str, str]
    needs: Needs
    one: Callable[[Patient], Iterable[Diagnosis]] | None = None
    all: Callable[[Sequence[Patient]], Iterable[Diagnosis]] | None = None
