"""Subject: one adapter of a report, and everything that was measured of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

from loralens.analysis.base.amplification import Amplification
from loralens.analysis.base.intruders import Intruders
from loralens.analysis.checks.base import MergeEffect
from loralens.analysis.checks.examination import Examination
from loralens.analysis.groups import total_norm
from loralens.analysis.spectrum import Spectrum
from loralens.compression.curve import CurvePoint, rank_curve
from loralens.compression.loss import losses, total_error
from loralens.compression.plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.moments import Moments
from loralens.core.ranks import Rule
from loralens.core.threads import Step
from loralens.errors import LoraLensError, place
from loralens.reporting.allotment import Dialect, Layout, layout, size_by

LOSS = 0.01  # of the energy that a recommended rank may lose: an error of 10 %


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What the weights of the base make of an adapter.

    Attributes
    ----------
    amplified : mapping of str to Amplification
    intruders : mapping of str to Intruders, or None
        None where they were not looked for.
    without : str
        Why they were not.
    """

    amplified: Mapping[str, Amplification] = field(default_factory=dict)
    intruders: Mapping[str, Intruders] | None = None
    without: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """One adapter.

    Attributes
    ----------
    path : str
        As it was given.
    label : str
        What the page calls it.
    patient : Patient
        The adapter as the doctor read it; with a base also how each update would land in its weights.
    adapter : Adapter
        Its modules that are finite numbers, of those asked for: all that is measured below.
    sick : sequence of str
        Modules that are left out, as they hold NaN or Inf.
    spectra : mapping of str to Spectrum
    plan : Plan or None
        Its directions by which ranks are chosen; None where there is nothing to choose, ``without`` says why.
    dialect : Dialect
        How a smaller one would be written.
    form : Layout or None
        The rule by which its file has its size; None where there is none.
    points : sequence of Point
        What every rank takes and loses.
    on_data : bool
        Whether errors are those on real inputs.
    activations : str
        The file that these were measured into; empty without one.
    positions : int
        How many inputs that were, of the module that saw most; 0 without them.
    plain : float or None
        ‖ΔW−ΔW'‖/‖ΔW‖ at the recommended rank, where ``on_data`` says that errors are others.
    beside : Beside or None
        What the base makes of it, where one was given.
    """

    path: str
    label: str
    patient: Examination
    adapter: Adapter
    sick: Sequence[str]
    spectra: Mapping[str, Spectrum]
    plan: TruncationPlan | None
    without: str
    dialect: Dialect
    form: Layout | None
    points: Sequence[CurvePoint]
    on_data: bool
    activations: str = ""
    positions: int = 0
    plain: float | None = None
    beside: Beside | None = None

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return total_norm(self.spectra.values())

    @cached_property
    def shares(self) -> dict[str, float]:
        """Module name → its part of the energy, in [0, 1]."""
        return {name: (one.frobenius / self.norm) ** 2 if self.norm else 0.0 for name, one in self.spectra.items()}

    @property
    def landings(self) -> Mapping[str, MergeEffect]:
        """What the base's weight makes of each module."""
        return self.patient.merge_effects

    @cached_property
    def recommended(self) -> CurvePoint | None:
        """The least rank for all modules that loses at most `LOSS` of the energy; None where there is no plan."""
        return _recommended(self.points)

    @property
    def most(self) -> CurvePoint | None:
        """The point of all ranks as they are."""
        return max(self.points, key=lambda point: point.rank, default=None)


def _recommended(points: Sequence[CurvePoint]) -> CurvePoint | None:
    fitting = [point for point in points if point.uniform.error**2 <= LOSS]
    return min(fitting, key=lambda point: point.rank, default=None)


def subject(
    patient: Examination,
    label: str,
    dialect: Dialect,
    *,
    moments: Moments | None = None,
    activations: str = "",
    beside: Beside | None = None,
    threads: int = 1,
    step: Step | None = None,
) -> Subject:
    """Everything about one adapter but what needs the weights of a base.

    Parameters
    ----------
    patient : Patient
        As `loralens.analysis.doctor.examine_all` gives it.
    label : str
    dialect : Dialect
    moments : Moments, optional
        What real inputs excite: ranks are then chosen by the error on them.
    activations : str
        The file that they stand in, for commands.
    beside : Beside, optional
    threads : int
        Modules worked on at a time.
    step : callable, optional
        Called with 1 after every module.

    Raises
    ------
    MismatchError
        The moments are those of another adapter.
    """
    sick = [name for name, one in patient.readings.items() if one.spectrum is None]
    spectra = patient.spectra
    adapter = patient.adapter.without([name for name in patient.adapter if name not in spectra])
    plan, without = None, "no module is left to choose ranks for"
    points: list[CurvePoint] = []
    plain, form = None, None
    if moments is not None:
        moments.check(patient.adapter)
    moments = None if sick else moments
    whole = patient.adapter.without(sick)
    if spectra:
        try:
            with place(patient.path):
                kept = TruncationPlan.of(whole, modules=list(spectra), moments=moments, threads=threads, step=step)
                form = layout(kept, dialect)
                size = size_by(form, kept, dialect) if form else dialect.size
                points = rank_curve(kept, size=size, one_rank=dialect.one_rank)
                if moments is not None:
                    plain = _plain(adapter, kept, _recommended(points), one_rank=dialect.one_rank)
                plan, without = kept, ""
        except LoraLensError as error:  # a dialect that cannot hold it smaller
            without = error.what
    return Subject(
        path=patient.path,
        label=label,
        patient=patient,
        adapter=adapter,
        sick=sick,
        spectra=spectra,
        plan=plan,
        without=without,
        dialect=dialect,
        form=form,
        points=points,
        on_data=moments is not None,
        activations=activations if moments is not None else "",
        positions=max((one.count for _, one in moments.items()), default=0) if moments is not None else 0,
        plain=plain,
        beside=beside,
    )


def _plain(adapter: Adapter, plan: TruncationPlan, best: CurvePoint | None, *, one_rank: bool) -> float | None:
    """‖ΔW−ΔW'‖/‖ΔW‖ of the rank that is recommended by another error."""
    if best is None:
        return None
    chosen = plan.ranks(Rule("rank", best.rank), one_rank=one_rank)
    return total_error(losses(adapter, plan.at(chosen)))
