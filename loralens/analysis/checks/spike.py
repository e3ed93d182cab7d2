"""Updates of which a single direction holds nearly all the energy, whatever their rank."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.tables.numbers import fixed

CODES = {
    "spike": "One direction holds nearly all of the energy of a module of rank 4 or more. Good runs end like this too, "
    "those at low learning rates most often."
}
SMALLEST_RANK = 4  # at a lower rank, one dominant direction is to be expected
ENERGY = 0.99  # smallest σ₁²/Σσ² that is reported: a stable rank below 1.01


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module, the lowest stable rank first."""
    spikes = [
        (spectrum.stable_rank, name, spectrum)
        for name, spectrum in exam.spectra.items()
        if min(spectrum.rank, *spectrum.shape) >= SMALLEST_RANK and 0 < spectrum.stable_rank < 1 / ENERGY
    ]
    for stable, name, spectrum in sorted(spikes, key=lambda spike: spike[:2]):  # spectra have no order
        rounding = spectrum.numerical_rank < 2  # the other singular values are rounding errors of 0
        ratio = ", the others are 0 up to rounding" if rounding else f", σ₁/σ₂ = {spectrum.s[0] / spectrum.s[1]:.3g}"
        evidence = f"one of {spectrum.rank} directions holds {fixed('.2%')(1 / stable)} of the energy{ratio}"
        yield Diagnosis("note", "spike", evidence, module=name)
