"""One adapter of a report, and everything that was measured of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import hypot
from typing import final

from loralens.analysis.amplification import Amplification
from loralens.analysis.diagnosis import Examination
from loralens.analysis.intruders import Intruders
from loralens.analysis.merge_effect import MergeEffect
from loralens.analysis.spectrum import Spectrum, total_norm
from loralens.compression.loss import losses, total_error
from loralens.compression.plan import CurvePoint, TruncationPlan, rank_curve, recommended_point
from loralens.core.adapter import Adapter
from loralens.core.ranks import Rule
from loralens.core.stored import Moments
from loralens.core.threads import Step
from loralens.errors import LoraLensError, place
from loralens.reporting.slider_stops import Dialect


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BaseMeasurements:
    """An adapter measured against the weights of its base.

    Attributes
    ----------
    intruders : mapping of str to Intruders
        Empty where they were not looked for; ``no_intruders`` is the reason.
    bf16_errors : mapping of str to float
        Module name → the error that a merge into bfloat16 would have, as a share of ‖ΔW‖.
    """

    amplified: Mapping[str, Amplification] = field(default_factory=dict)
    intruders: Mapping[str, Intruders] = field(default_factory=dict)
    no_intruders: str = ""
    bf16_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def intruder_counts(self) -> tuple[int, int]:
        """The number of leading directions of W + ΔW that were tested, and of intruders among them."""
        return sum(x.s.size for x in self.intruders.values()), sum(x.count for x in self.intruders.values())


# Without slots: the cached properties keep their values in the dictionary of the object.
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
    examination : Examination
        The adapter as the doctor read it, with the predicted merge of each module where a base was given.
    adapter : Adapter
        The chosen modules that hold finite numbers: only these are measured.
    non_finite : sequence of str
        Modules that are left out because they hold NaN or Inf.
    plan : TruncationPlan or None
        The directions from which ranks are chosen; None where there is nothing to choose, for the reason ``no_plan``.
    dialect : Dialect
        How a smaller adapter would be written.
    points : sequence of CurvePoint
        Size and error at every rank, from the highest down to 1.
    on_data : bool
        Whether errors are measured on real inputs.
    activations : str
        The file of these inputs' second moments; empty without one.
    positions : int
        The largest number of inputs that any module saw; 0 without ``activations``.
    update_error : float or None
        ‖ΔW−ΔW'‖/‖ΔW‖ at the recommended rank, where the other errors are those on inputs (``on_data``).
    file_bytes : int or None
        The size of the file that was read; None for an adapter in memory.
    """

    path: str
    label: str
    examination: Examination
    adapter: Adapter
    non_finite: Sequence[str]
    spectra: Mapping[str, Spectrum]
    plan: TruncationPlan | None
    no_plan: str
    dialect: Dialect
    points: Sequence[CurvePoint]
    on_data: bool
    activations: str = ""
    positions: int = 0
    update_error: float | None = None
    against_base: BaseMeasurements = field(default_factory=BaseMeasurements)
    file_bytes: int | None = None

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return total_norm(self.spectra.values())

    @cached_property
    def shares(self) -> dict[str, float]:
        """Module name → its share of the energy, in [0, 1]."""
        return {
            # Divided first: the square of a large norm may not be a float.
            name: (spectrum.frobenius / self.norm) ** 2 if self.norm else 0.0
            for name, spectrum in self.spectra.items()
        }

    @property
    def merge_effects(self) -> Mapping[str, MergeEffect]:
        """Module name → the predicted effect of a merge into the weight of the base."""
        return self.examination.merge_effects

    @property
    def worst_merge(self) -> str:
        """The module whose merge has the largest predicted error; there must be one."""
        return max(self.merge_effects, key=lambda name: self.merge_effects[name].rounding.error)

    @property
    def strength(self) -> float | None:
        """‖ΔW‖/‖W‖ of all modules that have a weight in the base, as one number; None without such a weight."""
        amplified = self.against_base.amplified
        weight = hypot(*(amplified[name].weight_norm for name in amplified))
        return hypot(*(self.spectra[name].frobenius for name in amplified)) / weight if weight else None

    @property
    def bf16_loss(self) -> float | None:
        """‖W'−W−ΔW‖/‖ΔW‖ of all modules together, where W' is W + ΔW rounded to bfloat16; None without a base."""
        errors = self.against_base.bf16_errors
        norms = {name: self.spectra[name].frobenius for name in errors}
        total = hypot(*norms.values())
        return hypot(*(errors[name] * norms[name] for name in errors)) / total if total else None

    @property
    def recommended(self) -> CurvePoint | None:
        """The rank for all modules that is recommended, see `recommended_point`; None where there is no plan."""
        return recommended_point(self.points)

    @property
    def bytes_before(self) -> int:
        """The size of the file that was read, or of a file of the highest rank; there must be a point."""
        return self.points[0].uniform.bytes if self.file_bytes is None else self.file_bytes

    @property
    def highest(self) -> CurvePoint | None:
        """The point of the highest rank, at which nothing is lost."""
        return self.points[0] if self.points else None


def measure_subject(
    examination: Examination,
    label: str,
    dialect: Dialect,
    *,
    file_bytes: int | None = None,
    moments: Moments | None = None,
    activations: str = "",
    against_base: BaseMeasurements | None = None,
    threads: int = 1,
    step: Step | None = None,
) -> Subject:
    """Measure one adapter: spectra, and the size and error of every rank.

    Parameters
    ----------
    examination : Examination
        As `loralens.analysis.doctor.examine_all` returns it.
    label : str
        The name of the adapter on the page.
    dialect : Dialect
        How a smaller adapter would be written.
    file_bytes : int, optional
        The size of the file that was read.
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
    non_finite = [name for name, reading in examination.readings.items() if reading.spectrum is None]
    spectra = examination.spectra
    adapter = examination.adapter.without([name for name in examination.adapter if name not in spectra])
    plan, no_plan, update_error = None, "no module is left to choose ranks for", None
    points: list[CurvePoint] = []
    # Checked even where they are not used below: activations of another adapter are a mistake in any case.
    if moments is not None:
        moments.check(examination.adapter)
    # Errors on inputs are those of the whole adapter, and modules with NaN or Inf have none.
    moments = None if non_finite else moments
    if spectra:
        # The plan has the modules that were not chosen too: they stay in the file, so they count in its size.
        finite = examination.adapter.without(non_finite)
        try:
            with place(examination.path):
                new = _plan_of(finite, spectra, moments, threads, step)
                points = rank_curve(new, size=dialect.size, one_rank=dialect.one_rank)
                best = recommended_point(points)
                if moments is not None and best is not None:
                    ranks = new.ranks(Rule("rank", best.rank), one_rank=dialect.one_rank)
                    update_error = total_error(losses(adapter, new.at(ranks)))
                # The plan is set last. If an earlier step fails, the plan stays None, and `no_plan` has the reason.
                plan, no_plan = (new, "") if points else (None, "every ΔW is 0")
        except LoraLensError as error:  # a dialect that cannot hold a smaller adapter
            no_plan = error.what
    return Subject(
        path=examination.path,
        label=label,
        examination=examination,
        adapter=adapter,
        non_finite=non_finite,
        spectra=spectra,
        plan=plan,
        no_plan=no_plan,
        dialect=dialect,
        points=points,
        on_data=moments is not None,
        activations=activations if moments is not None else "",
        positions=max((covariance.count for _, covariance in moments.items()), default=0) if moments is not None else 0,
        update_error=update_error,
        against_base=against_base or BaseMeasurements(),
        file_bytes=file_bytes,
    )


def _plan_of(
    adapter: Adapter, spectra: Mapping[str, Spectrum], moments: Moments | None, threads: int, step: Step | None
) -> TruncationPlan:
    if moments is not None:
        return TruncationPlan.of(adapter, modules=list(spectra), moments=moments, threads=threads, step=step)
    # The doctor has computed the singular values already.
    return TruncationPlan.of_values(adapter, {name: x.s for name, x in spectra.items()}, threads=threads, step=step)
