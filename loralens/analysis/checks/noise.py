"""Adapters whose spectra do not differ from those of random factors."""

from collections.abc import Iterator
from functools import cache

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.linalg.factor import Floats

RULES = {
    "random-spectrum": "The singular values are as flat as those of random factors of the same norm: nothing was "
    "learned, the factors were initialised at random and never trained, or noise was added."
}
SMALLEST_RANK = 4  # below it a trained spectrum may be flat by chance
LARGEST_RANK = 512  # so wide a pair is a full difference, and its null would take minutes
DRAWS = 200  # of the null, a shape and rank
WORK = 200 * 64**3  # of rank³ and draw: fewer draws at high rank, where the null is narrow
REJECTED = 0.01  # quantile of the null below which a spectrum is not random: 1 module in 100 by mistake
MOST = 0.5  # of the modules must look random: one or two of hundreds will
FEWEST = 2


def look(patient: Patient) -> Iterator[Diagnosis]:
    """One diagnosis for the adapter, if most of its modules look random.

    The norm is matched by comparing the shape of the spectrum alone: its participation ratio (Σσ²)²/Σσ⁴, which is r for
    equal values and which training lowers. Neither the norms of B and A nor the scale change it.
    """
    tested, alike, first = 0, 0, ""
    for name, spectrum in patient.spectra.items():
        if spectrum.spectral == 0 or not SMALLEST_RANK <= spectrum.rank <= min(*spectrum.shape, LARGEST_RANK):
            continue
        null = random_participation(spectrum.shape, spectrum.rank)
        tested += 1
        if spectrum.participation_ratio >= np.quantile(null, REJECTED):
            alike += 1
            first = first or f"{name} {spectrum.participation_ratio:.2f} (random {null.min():.2f}–{null.max():.2f})"
    if tested >= FEWEST and alike > MOST * tested:
        evidence = f"{alike} of {tested} spectra are as flat as random ones; participation ratio of r: {first}"
        fix = "check that this is the trained checkpoint, not the initial one"
        yield Diagnosis("warning", "random-spectrum", evidence, fix)


@cache
def random_participation(shape: tuple[int, int], rank: int) -> Floats:
    """Participation ratios of B A with Gaussian B (out, rank) and A (rank, in), float64, one a draw, sorted.

    From independent Bartlett factors: R upper triangular, N(0, 1) above the diagonal, R_ii = √χ²(n − i). B A has the
    singular values of R_B R_Aᵀ, so a draw costs O(rank³) whatever the shape. Seeded: the same every time.
    """
    rng = np.random.default_rng(0)
    draws = int(np.clip(WORK // rank**3, 20, DRAWS))
    ratios = np.empty(draws)
    for i in range(draws):
        M = _bartlett(rng, shape[0], rank) @ _bartlett(rng, shape[1], rank).T
        G = M.T @ M
        ratios[i] = np.trace(G) ** 2 / np.sum(G**2)  # (Σσ²)²/Σσ⁴
    return np.sort(ratios)


def _bartlett(rng: np.random.Generator, n: int, rank: int) -> Floats:
    R = np.triu(rng.standard_normal((rank, rank)), 1)
    R[np.diag_indices(rank)] = np.sqrt(rng.chisquare(n - np.arange(rank)))
    return R
