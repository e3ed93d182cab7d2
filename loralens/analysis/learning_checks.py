"""Checks for what was learned: random spectra, spikes, outliers, rank without use, and a common initialisation."""

from collections.abc import Iterator, Sequence
from functools import cache
from math import floor

import numpy as np

from loralens.analysis.diagnosis import Diagnosis, Examination
from loralens.analysis.every_pair import connected_groups, initial_cosines, known_mean, match_collection
from loralens.analysis.spectrum import mean_effective_rank
from loralens.analysis.two_adapters import SAME_START
from loralens.core.messages import quote_word
from loralens.core.names import some
from loralens.linalg.factor import Floats
from loralens.tables.numbers import fixed, whole_percent

FLAT_RANK = 4  # below it, a trained spectrum may be flat by chance
LARGEST_RANK = 512  # wider pairs are full differences of weights, and their null distribution would take minutes
DRAWS = 200  # samples of the null distribution for every shape and rank
WORK = 200 * 64**3  # draws · rank³ at most: at high rank the null distribution is narrow, so fewer draws are enough
REJECTED = 0.01  # quantile of the null below which a spectrum is not random, which errs for 1 module in 100
MOST = 0.5  # the share of modules that must look random; one or two among hundreds always do
FEWEST = 2  # tested modules at least, so that a single one does not decide about the adapter


def find_random_spectra(exam: Examination) -> Iterator[Diagnosis]:
    """Report an adapter if most of its modules look random.

    Only the shape of the spectra is compared, so that norms and scales do not matter: the participation ratio
    (Σσ²)²/Σσ⁴, which is r for equal singular values and which training lowers.
    """
    tested, alike, first = 0, 0, ""
    for name, spectrum in exam.spectra.items():
        if spectrum.spectral == 0 or not FLAT_RANK <= spectrum.rank <= min(*spectrum.shape, LARGEST_RANK):
            continue
        # The null distribution is cached, so that it is sampled once for all modules of the same shape.
        null = random_participation(spectrum.shape, spectrum.rank)
        tested += 1
        # The test is one-sided: training concentrates the energy, so only spectra below the null show learning.
        if spectrum.participation_ratio >= np.quantile(null, REJECTED):
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


def _bartlett(rng: "np.random.Generator", n: int, rank: int) -> Floats:
    R = np.triu(rng.standard_normal((rank, rank)), 1)
    R[np.diag_indices(rank)] = np.sqrt(rng.chisquare(n - np.arange(rank)))
    return R


SPIKE_RANK = 4  # at a lower rank, one dominant direction is to be expected
SPIKE_ENERGY = 0.99  # smallest σ₁²/Σσ² that is reported: a stable rank below 1.01


def find_spikes(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module, the lowest stable rank first."""
    spikes = [
        (spectrum.stable_rank, name, spectrum)
        for name, spectrum in exam.spectra.items()
        if min(spectrum.rank, *spectrum.shape) >= SPIKE_RANK and 0 < spectrum.stable_rank < 1 / SPIKE_ENERGY
    ]
    for stable, name, spectrum in sorted(spikes, key=lambda spike: spike[:2]):  # spectra have no order
        rounding = spectrum.numerical_rank < 2  # the other singular values are rounding errors of 0
        ratio = ", the others are 0 up to rounding" if rounding else f", σ₁/σ₂ = {spectrum.s[0] / spectrum.s[1]:.3g}"
        evidence = f"one of {spectrum.rank} directions holds {fixed('.2%')(1 / stable)} of the energy{ratio}"
        yield Diagnosis("note", "spike", evidence, module=name)


def report_outliers(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module, the farthest first."""
    for outlier in exam.outliers:
        ratio = outlier.value / outlier.typical if outlier.typical > 0 else 0.0
        times = f", {ratio:.3g} × what its kind suggests for its depth" if ratio else ""
        evidence = f"‖ΔW‖ {outlier.value:.4g}{times} ({outlier.deviations:.0f} median deviations)"
        leave_out = exam.writes("drop", "without", "-m", quote_word(outlier.name))
        fix = (
            f"compare it with earlier checkpoints of the run, and take the last sound one; `{leave_out}` leaves it out"
        )
        yield Diagnosis("warning", "outlier", evidence, fix, outlier.name)


ENERGY_KEPT = 0.99  # the share of Σσ² that a truncation must keep
LEAST = 0.3  # the share of the parameters that truncation must save to be worth a note


def find_unused_rank(exam: Examination) -> Iterator[Diagnosis]:
    """Report ranks above that of the weight, and what ``compress --energy 0.99`` would save."""
    for name, reading in exam.readings.items():
        rank, most = reading.module.rank, min(reading.module.shape)
        if rank > most:
            out, in_ = reading.module.shape
            cut = exam.compress("cut", "--energy 1")
            fix = f"train it with r = {most}; `{cut}` drops them"
            yield Diagnosis("note", "rank-impossible", f"r = {rank} for a weight of {out} × {in_}", fix, name)
    before = after = 0
    for reading in exam.readings.values():
        if reading.A is None or reading.spectrum is None:
            continue
        stored = reading.module.parameters
        before += stored
        # A module that is 0 keeps one direction. A fused projection is stored as blocks, and may grow when truncated.
        after += min(stored, max(1, reading.spectrum.energy_rank(ENERGY_KEPT)) * sum(reading.module.shape))
    # The whole adapter counts, because that is what the suggested command makes smaller.
    saved = 1 - after / before if before else 0.0
    ranks = [one.module.rank for one in exam.pairs.values()]
    if saved < LEAST or not ranks:
        return
    mean = mean_effective_rank(one.spectrum for one in exam.pairs.values() if one.spectrum)
    ranks_text = f"r={ranks[0]}" if len(set(ranks)) == 1 else f"r={min(ranks)}–{max(ranks)}"
    evidence = (
        f"{ranks_text}, effective rank {mean:.1f} on average: {ENERGY_KEPT} of the energy needs "
        f"{whole_percent(1 - saved)} of the parameters"
    )
    fix = f"`{exam.compress('e99', f'--energy {ENERGY_KEPT}')}`"
    # The file has a header and other tensors too, so that its share is another one than that of the parameters.
    if exam.saving and (share := exam.saving(exam, ENERGY_KEPT)) is not None:
        fix += f" saves {whole_percent(share)} of the file"
    yield Diagnosis("note", "rank-unused", evidence, fix)


def find_shared_initialisations(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
    """Report every group of adapters with similar A, once, for its first adapter."""
    modules = match_collection([one.adapter for one in exams])
    cosines = np.full((len(modules), len(exams), len(exams)), np.nan)
    for table, module in zip(cosines, modules, strict=True):
        readings = {i: exams[i].readings.get(name or "") for i, name in enumerate(module.holders)}
        pairs = {i: reading.module for i, reading in readings.items() if reading and reading.A}
        table[np.ix_([*pairs], [*pairs])] = initial_cosines([*pairs.values()])
    similar = known_mean(cosines)
    for group in connected_groups(similar, SAME_START):
        if len(group) < 2:
            continue
        first, same_start = exams[group[0]], [exams[i] for i in group[1:]]
        # Members of a group need not all be similar to each other: each is similar to at least one, and this is stated.
        least = min(similar[i, j] for i in group for j in group if i != j and similar[i, j] >= SAME_START)
        # The cosine is rounded down, so that "or more" stays true.
        cosine = "cosine 1" if least > 1 - 1e-6 else f"cosine {floor(100 * least) / 100:.2f} or more"
        evidence = (
            f"its A has nearly the same direction as that of {some([one.path for one in same_start])} ({cosine}): they "
            "began from one random A, or belong to one run"
        )
        command = first.command("similarity", same_start[0].quoted, "--side out")
        fix = f"compare them on the side that the seed does not fix: `{command}`"
        yield Diagnosis("note", "shared-initialisation", evidence, fix, adapter=first.path)
