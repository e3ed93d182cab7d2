"""One adapter of a report, and everything that was measured of it."""

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
from loralens.reporting.slider_stops import Dialect, FileLayout, find_layout, layout_size

# The share of the energy that a recommended rank may lose. It is the square of the error, so the error is 10 %.
LOSS = 0.01


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BaseMeasurements:
    """An adapter measured against the weights of its base.

    Attributes
    ----------
    intruders : mapping of str to Intruders, or None
        None where they were not looked for; ``without`` is the reason.
    """

    amplified: Mapping[str, Amplification] = field(default_factory=dict)
    intruders: Mapping[str, Intruders] | None = None
    without: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Subject:
    """One adapter with its measurements.

    Attributes
    ----------
    path : str
        As the user gave it.
    label : str
        Its name on the page.
    patient : Patient
        The adapter as the doctor read it, with the predicted merge of each module where a base was given.
    adapter : Adapter
        The chosen modules that hold finite numbers: only these are measured.
    sick : sequence of str
        Modules that are left out because they hold NaN or Inf.
    plan : Plan or None
        The directions from which ranks are chosen; None where there is nothing to choose, for the reason ``without``.
    dialect : Dialect
        How a smaller adapter would be written.
    form : FileLayout or None
        The rule that gives the size of its file at any ranks; None where there is none.
    points : sequence of Point
        Size and error at every rank.
    on_data : bool
        Whether errors are measured on real inputs.
    activations : str
        The file of these inputs' second moments; empty without one.
    positions : int
        The number of inputs of the module that saw most of them; 0 without inputs.
    plain : float or None
        ‖ΔW−ΔW'‖/‖ΔW‖ at the recommended rank, where the other errors are those on inputs (``on_data``).
    against_base : BaseMeasurements or None
        The measurements against a base, where one was given.
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
    form: FileLayout | None
    points: Sequence[CurvePoint]
    on_data: bool
    activations: str = ""
    positions: int = 0
    plain: float | None = None
    against_base: BaseMeasurements | None = None

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return total_norm(self.spectra.values())

    @cached_property
    def shares(self) -> dict[str, float]:
        """Module name → its share of the energy, in [0, 1]."""
        return {
            name: (spectrum.frobenius / self.norm) ** 2 if self.norm else 0.0 for name, spectrum in self.spectra.items()
        }

    @property
    def landings(self) -> Mapping[str, MergeEffect]:
        """Module name → how a merge into the weight of the base is predicted to turn out."""
        return self.patient.merge_effects

    @cached_property
    def recommended(self) -> CurvePoint | None:
        """The lowest rank for all modules that loses at most `LOSS` of the energy; None where there is no plan."""
        return _recommended(self.points)

    @property
    def most(self) -> CurvePoint | None:
        """The point of the highest rank, at which nothing is lost."""
        return max(self.points, key=lambda point: point.rank, default=None)


def _recommended(points: Sequence[CurvePoint]) -> CurvePoint | None:
    fitting = [point for point in points if point.uniform.error**2 <= LOSS]
    return min(fitting, key=lambda point: point.rank, default=None)


def measure_subject(
    patient: Examination,
    label: str,
    dialect: Dialect,
    *,
    moments: Moments | None = None,
    activations: str = "",
    against_base: BaseMeasurements | None = None,
    threads: int = 1,
    step: Step | None = None,
) -> Subject:
    """Measure one adapter: spectra, and the size and error of every rank.

    Parameters
    ----------
    patient : Patient
        As `loralens.analysis.doctor.examine_all` gives it.
    label : str
    dialect : Dialect
    moments : Moments, optional
        Second moments of real inputs: ranks are then chosen by the error on these inputs.
    activations : str
        The file of the moments, for the commands that the page shows.
    against_base : BaseMeasurements, optional
        The measurements against a base.
    threads : int
        How many modules are measured at a time.
    step : callable, optional
        Called with 1 after every module.

    Raises
    ------
    MismatchError
        The moments belong to another adapter.
    """
    sick = [name for name, reading in patient.readings.items() if reading.spectrum is None]
    spectra = patient.spectra
    adapter = patient.adapter.without([name for name in patient.adapter if name not in spectra])
    plan, without = None, "no module is left to choose ranks for"
    points: list[CurvePoint] = []
    plain, form = None, None
    if moments is not None:
        moments.check(patient.adapter)
    # Errors on inputs are those of the whole adapter, and modules with NaN or Inf have none.
    moments = None if sick else moments
    chosen = patient.adapter.without(sick)
    if spectra:
        try:
            with place(patient.path):
                drawn_plan = TruncationPlan.of(
                    chosen, modules=list(spectra), moments=moments, threads=threads, step=step
                )
                form = find_layout(drawn_plan, dialect)
                size = layout_size(form, drawn_plan, dialect) if form else dialect.size
                points = rank_curve(drawn_plan, size=size, one_rank=dialect.one_rank)
                if moments is not None:
                    plain = _error_of_update(adapter, drawn_plan, _recommended(points), one_rank=dialect.one_rank)
                plan, without = drawn_plan, ""
        except LoraLensError as error:  # a dialect that cannot hold a smaller adapter
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
        positions=max((covariance.count for _, covariance in moments.items()), default=0) if moments is not None else 0,
        plain=plain,
        against_base=against_base,
    )


def _error_of_update(
    adapter: Adapter, plan: TruncationPlan, best: CurvePoint | None, *, one_rank: bool
) -> float | None:
    """‖ΔW−ΔW'‖/‖ΔW‖ at the rank that was recommended by the error on inputs."""
    if best is None:
        return None
    chosen = plan.ranks(Rule("rank", best.rank), one_rank=one_rank)
    return total_error(losses(adapter, plan.at(chosen)))
