"""Adapters whose spectra cannot be distinguished from those of random factors."""

from collections.abc import Iterator
from functools import cache

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.linalg.factor import Floats

CODES = {
    "random-spectrum": "The singular values are as flat as those of random factors of the same norm: nothing was "
    "learned, the factors were initialised at random and never trained, or noise was added."
}
SMALLEST_RANK = 4  # below it, a trained spectrum may be flat by chance
LARGEST_RANK = 512  # wider pairs are full differences of weights, and their null distribution would take minutes
DRAWS = 200  # samples of the null distribution for every shape and rank
WORK = 200 * 64**3  # draws · rank³ at most: at high rank the null distribution is narrow, so fewer draws are enough
REJECTED = 0.01  # quantile of the null below which a spectrum is not random, which errs for 1 module in 100
MOST = 0.5  # the share of modules that must look random; one or two among hundreds always do
FEWEST = 2  # tested modules at least, so that a single one does not decide about the adapter


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report an adapter if most of its modules look random.

    Only the shape of the spectra is compared, so that norms and scales do not matter: the participation ratio
    (Σσ²)²/Σσ⁴, which is r for equal singular values and which training lowers.
    """
    tested, alike, first = 0, 0, ""
    for name, spectrum in exam.spectra.items():
        if spectrum.spectral == 0 or not SMALLEST_RANK <= spectrum.rank <= min(*spectrum.shape, LARGEST_RANK):
            continue
        # The null distribution is cached, so that it is sampled once for all modules of the same shape.
        null = random_participation(spectrum.shape, spectrum.rank)
        tested += 1
        # The test is one-sided: training concentrates the energy, so only spectra below the null show learning.
        if spectrum.participation_ratio >= _rejected_below(spectrum.shape, spectrum.rank):
            alike += 1
            first = first or f"{name} {spectrum.participation_ratio:.2f} (random {null.min():.2f}–{null.max():.2f})"
    if tested >= FEWEST and alike > MOST * tested:
        evidence = f"{alike} of {tested} spectra are as flat as random ones; participation ratio (at most r) of {first}"
        fix = "check that this is the trained checkpoint, not the initial one"
        yield Diagnosis("warning", "random-spectrum", evidence, fix)


@cache
def random_participation(shape: tuple[int, int], rank: int) -> Floats:
    """Sorted participation ratios of random products B A, with Gaussian B (out, rank) and A (rank, in), float64.

    They are computed from independent Bartlett factors R, upper triangular with N(0, 1) above the diagonal and R_ii =
    √χ²(n − i). B A has the singular values of R_B R_Aᵀ, so a draw costs O(rank³) for any shape. The seed is fixed.
    """
    rng = np.random.default_rng(0)
    draws = int(np.clip(WORK // rank**3, 20, DRAWS))
    ratios = np.empty(draws)
    for i in range(draws):
        # M has the nonzero singular values of B A, so the cost does not depend on out and in.
        M = _bartlett(rng, shape[0], rank) @ _bartlett(rng, shape[1], rank).T
        G = M.T @ M
        ratios[i] = np.trace(G) ** 2 / np.sum(G**2)  # (Σσ²)²/Σσ⁴
    return np.sort(ratios)


@cache
def _rejected_below(shape: tuple[int, int], rank: int) -> float:
    """The participation ratio below which a spectrum is not random."""
    return float(np.quantile(random_participation(shape, rank), REJECTED))


def _bartlett(rng: "np.random.Generator", n: int, rank: int) -> Floats:
    R = np.triu(rng.standard_normal((rank, rank)), 1)
    R[np.diag_indices(rank)] = np.sqrt(rng.chisquare(n - np.arange(rank)))
    return R
