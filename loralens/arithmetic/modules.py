"""All modules of a combination, for methods that look at whole adapters before they combine the first module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from loralens.core.joint import Joint
from loralens.core.threads import Step, in_threads

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Modules:
    """All modules of a combination; each is read into its joint space when it is needed, and not kept.

    Attributes
    ----------
    joint : callable
        Module name → its joint space.
    entries : int
        Σ out·in over all modules.
    step : callable, optional
        Called with 1 after every module of a pass that reports its progress.
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
