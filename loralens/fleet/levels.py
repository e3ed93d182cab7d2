"""Levels of likeness of two adapters: copy, run, family and kin, what they mean, and what chance alone would give."""

from dataclasses import dataclass
from math import log, sqrt
from typing import Literal, final

from loralens.analysis.two_adapters import SAME_START
from loralens.fleet.sketching.sketches import START_WIDTH, WIDTH
from loralens.tables.numbers import number

Level = Literal["copy", "run", "family", "kin", ""]

COPY = 0.995  # smallest cosine of two updates that may be copies
COPY_NORM = 0.005  # largest relative difference of their norms
# A copy in bfloat16 differs by 2.3e-3, so two such copies of one adapter, at most 4.6e-3 apart, are found too.
SAME = 5e-3  # largest ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of any module of a copy
RUN = SAME_START  # smallest cosine of the starts of two adapters that began from the same A
# Among 207 published adapters of 58 repositories, adapters of different repositories never had more than 0.5, and those
# of one repository and one start had 0.785 or more in nine of ten pairs.
FAMILY = 0.5  # smallest mean cosine within a family
# The same task by different authors gave 0.20 to 0.44, and unrelated bases of equal shape 0.0008 at most.
KIN = 0.2  # smallest cosine of adapters that do something alike

MEANINGS: dict[Level, str] = {
    "copy": "the same update up to rounding, whatever the dialect, dtype, factors or rank",
    "run": "both began from the same random A: checkpoints of one run, or runs with one seed",
    "family": f"cosine at least {FAMILY}: mostly one author, one task, or one adapter trained on",
    "kin": f"cosine at least {KIN}: often the same task by different authors",
    "": f"cosine below {KIN}: nothing in common that the update shows",
}


@final
@dataclass(frozen=True, slots=True)
class ChanceLevels:
    """What unrelated adapters give by chance alone.

    Attributes
    ----------
    cosine : float or None
        Standard deviation of the exact cosine of two updates with random directions; its mean is 0. None if it is not
        known, because no update was read.
    among : int
        The number of adapters among which the nearest was looked for.
    """

    cosine: float | None
    among: int

    @property
    def sketch(self) -> float:
        """Standard deviation of the cosine by sketches of two unrelated updates; its mean is 0."""
        return 1 / sqrt(WIDTH)

    @property
    def start(self) -> float:
        """Standard deviation of the cosine by start sketches of two independent A; its mean is 0."""
        return 1 / sqrt(START_WIDTH)

    @property
    def largest(self) -> float | None:
        """About the largest cosine among that many unrelated adapters: √(2 ln n) standard deviations, at most 1."""
        return None if self.cosine is None else min(1.0, self.cosine * sqrt(2 * log(max(self.among, 2))))

    def sentence(self, *, sketched: bool) -> str:
        """The levels in one sentence."""
        if sketched or self.cosine is None:
            by_sketch = f"0 ± {number(self.sketch, 2)} by sketches of {WIDTH:,} numbers"
            return f"chance: two unrelated updates have a cosine of {by_sketch}"
        return (
            f"chance: two unrelated updates of these shapes have a cosine of 0 ± {number(self.cosine, 2)}, "
            f"and the largest of {self.among:,} is about {number(self.largest, 2)}"
        )

    def record(self) -> dict[str, float | None]:
        """The levels as a JSON object."""
        return {"cosine": self.cosine, "largest": self.largest, "sketch": self.sketch, "start": self.start}


def level_of(cosine: float, *, start: float = 0.0, copy: bool = False) -> Level:
    """The closest level of a pair.

    Parameters
    ----------
    cosine : float
        Of the whole updates.
    start : float
        Of the start sketches; 0 if one of them has no A.
    copy : bool
        Whether the pair was confirmed to be the same update.
    """
    if copy:
        return "copy"
    if start >= RUN:
        return "run"
    return "family" if cosine >= FAMILY else "kin" if cosine >= KIN else ""
