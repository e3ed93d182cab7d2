"""Modules: all modules of a combination, for methods that look at the whole adapters before they make the first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from loralens.core.joint import Joint
from loralens.core.threads import Step, in_threads

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Modules:
    """Every module, brought into its joint space when it is looked at, and let go afterwards.

    Attributes
    ----------
    names : sequence of str
    joint : callable
        Of a name.
    entries : int
        Σ out·in over all of them.
    threads : int
    step : callable, optional
        Is told 1 for every module of a long look.
    """

    names: Sequence[str]
    joint: Callable[[str], Joint]
    entries: int
    threads: int = 1
    step: Step | None = None

    def map(self, work: Callable[[Joint], T], *, report: bool = False) -> list[T]:
        """The results of ``work`` on every module, in order; with ``report``, ``step`` is called after each."""
        results = in_threads(
            lambda name: work(self.joint(name)), self.names, self.threads, self.step if report else None
        )
        return list(results.values())
